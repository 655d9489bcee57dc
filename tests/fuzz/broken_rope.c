/* SPDX-License-Identifier: Apache-2.0
 * broken_rope.c - calls of wan_attn_rms_norm_rope that the contract forbids, one fault at a time
 * and two at once: each must be refused with words that name the argument, and nothing may be
 * written.
 *
 *     broken_rope SEED FIRST COUNT [SECONDS]    prints every case that was not refused as it should
 */
#include "refusing.h"

/* The operands, as bits of a set. */
enum { X = 1, OUT = 2, WEIGHT = 4, TABLE = 8, GRID = 16, ALL = 31, TENSORS = 5 };

typedef struct good_call {
    wan_attn_rope_params p;
    buffer *out;
} good_call;

/* No size is 1, so that every stride is walked along. The table has 7 positions, or, without grids,
 * the angles of each token. */
static good_call make_good_call(int has_grid) {
    good_call c;
    wan_attn_rope_params *p = &c.p;
    memset(&c, 0, sizeof(c));
    p->struct_size = sizeof(*p);
    p->kernel = -1;
    p->x = p->out = dense(WAN_ATTN_F32, 4, 2, 5, 4, 16);
    p->weight = dense(WAN_ATTN_F32, 1, 64, 0, 0, 0);
    p->table = has_grid ? dense(WAN_ATTN_F64, 2, 7, 16, 0, 0) : dense(WAN_ATTN_F64, 4, 2, 5, 4, 16);
    make_read_only(give_memory(&p->x, 0));
    make_read_only(give_memory(&p->weight, 0));
    make_read_only(give_memory(&p->table, 0));
    c.out = give_memory(&p->out, UNTOUCHED);
    if (has_grid) {
        p->grid_sizes = dense(WAN_ATTN_I32, 2, 2, 3, 0, 0);
        (void)give_memory(&p->grid_sizes, 0);
        for (int64_t n = 0; n < 6; n++)
            write_element(element(&p->grid_sizes, n / 3, n % 3, 0, 0), WAN_ATTN_I32, 2.0);
    }
    p->eps = 1e-6;
    p->has_norm = p->rounds_norm = 1;
    p->num_threads = 2;
    return c;
}

/* Ways to break a tensor's description. */
#define TENSOR_FAULTS(F)                                                                           \
    DESCRIPTION_FAULTS(F)                                                                          \
    F(dtype_integer, X | OUT | WEIGHT | TABLE, t->dtype = WAN_ATTN_I64)                            \
    F(dtype_half, TABLE | GRID, t->dtype = WAN_ATTN_F16)                                           \
    F(dtype_double, X | OUT | WEIGHT | GRID, t->dtype = WAN_ATTN_F64)                              \
    F(last_stride_2, ALL & ~GRID, t->stride[t->ndim - 1] = 2)                                      \
    F(last_stride_0, ALL & ~GRID, t->stride[t->ndim - 1] = 0)                                      \
    F(last_stride_negative, ALL & ~GRID, t->stride[t->ndim - 1] = -1)                              \
    F(elements_are_one, OUT, t->stride[d < 3 ? d : 0] = 0)                                         \
    F(elements_overlap, OUT, t->stride[d < 3 ? d : 0] -= 1)                                        \
    F(grid_negative, GRID, ((int32_t *)t->data)[d] = -1)                                           \
    F(grid_beyond, GRID, ((int32_t *)t->data)[d + 2] = 8)                                          \
    F(grid_huge, GRID, ((int32_t *)t->data)[d + 3] = INT32_MAX)

/* Ways to break the rest: F(name, the argument that the message must name, code). */
#define OTHER_FAULTS(F)                                                                            \
    F(struct_size_0, "params.struct_size", p->struct_size = 0)                                     \
    F(struct_size_less, "params.struct_size", p->struct_size -= 8)                                 \
    F(struct_size_more, "params.struct_size", p->struct_size += 8)                                 \
    F(struct_size_beyond, "params.struct_size", p->struct_size = UINT32_MAX)                       \
    F(kernel_below, "kernel", p->kernel = -2)                                                      \
    F(kernel_min, "kernel", p->kernel = INT32_MIN)                                                 \
    F(kernel_beyond, "kernel", p->kernel = wan_attn_rope_kernel_count())                           \
    F(kernel_max, "kernel", p->kernel = INT32_MAX)                                                 \
    F(eps_nan, "eps", p->eps = NAN)                                                                \
    F(eps_inf, "eps", p->eps = INFINITY)                                                           \
    F(eps_minus_inf, "eps", p->eps = -INFINITY)                                                    \
    F(eps_negative, "eps", p->eps = -1e-300)                                                       \
    F(offset_negative, "seqlen_offset", p->seqlen_offset = -1)                                     \
    F(offset_min, "seqlen_offset", p->seqlen_offset = INT64_MIN)                                   \
    F(offset_max, "seqlen_offset", p->seqlen_offset = INT64_MAX)                                   \
    F(offset_beyond, "seqlen_offset", p->seqlen_offset = INT64_MAX / 2 + 1)                        \
    F(weight_without_norm, "weight", p->has_norm = 0)                                              \
    F(weight_per_head, "weight", p->is_per_head = 1)                                               \
    F(table_absent, "table", memset(&p->table, 0, sizeof(p->table)))                               \
    F(out_absent, "out", memset(&p->out, 0, sizeof(p->out)))                                       \
    F(head_dim_odd, "x", p->x.shape[3] = p->out.shape[3] = 15,                                     \
      memset(&p->weight, 0, sizeof(p->weight)))                                                    \
    F(head_dim_257, "x", p->x.shape[3] = p->out.shape[3] = 257)                                    \
    F(out_is_in_x, "out", p->out.data = beyond(p->x.data, 4 * 16))                                 \
    F(out_is_x_as_half, "out", p->out.data = p->x.data, p->out.dtype = WAN_ATTN_F16)               \
    F(out_is_x_turned, "out", p->out.data = p->x.data, p->out.stride[1] = 16,                      \
      p->out.stride[2] = 5 * 16)                                                                   \
    F(out_is_weight, "out", p->out.data = p->weight.data)                                          \
    F(out_is_table, "out", p->out.data = beyond(p->table.data, 64))                                \
    F(out_ends_in_weight, "out",                                                                   \
      p->out.data = beyond(p->weight.data, (uint64_t)(4 - 4 * 2 * 5 * 4 * 16)))

typedef wan_attn_rope_params fault_params;

static const char *const TENSOR_NAMES[TENSORS] = {"x", "out", "weight", "table", "grid_sizes"};

static wan_attn_tensor *tensor_at(wan_attn_rope_params *p, int which) {
    wan_attn_tensor *const tensors[] = {&p->x, &p->out, &p->weight, &p->table, &p->grid_sizes};
    return tensors[which];
}

#define TAKES(of, which) ((of) >> (which) & 1)
#include "faults.h"

/* What is a fault in another call, but none in this one. */
static int is_harmless(const wan_attn_rope_params *p, int number, int64_t d) {
    if (number == FIRST_OTHER + OTHER_table_absent)
        return !p->grid_sizes.ndim; /* then nothing is turned */
    return number / TENSOR_FAULT_COUNT == 3 && number % TENSOR_FAULT_COUNT == TENSOR_size_more &&
           p->table.ndim == 2 && d % 2 == 0; /* one more position is as good */
}

/* The message begins with the argument; where x or the table is broken, it may say that another
 * operand does not fit them. */
static int names(const char *message, const fault *f) {
    size_t length = (size_t)(strstr(message, " must ") - message);
    int is_named = strlen(f->argument) == length && !strncmp(message, f->argument, length);
    for (int n = 0; n < TENSORS && f->is_misfit && !is_named; n++)
        is_named = strlen(TENSOR_NAMES[n]) == length &&
                   !strncmp(message, TENSOR_NAMES[n], length) &&
                   (!strcmp(f->argument, "x") || (!strcmp(f->argument, "table") && n == 4));
    return is_named;
}

/* Questions may refuse or answer; they must come back, and have words for a refusal. */
static outcome ask_everything(const wan_attn_rope_params *params) {
    wan_attn_rope_params p = *params;
    for (int32_t row = -2; row <= wan_attn_rope_kernel_count(); row++) {
        wan_attn_error err;
        int32_t found = -1;
        memset(&err, '?', sizeof(err));
        p.kernel = row == -2 ? params->kernel : row;
        wan_attn_status status = wan_attn_rope_select(&p, &found, &err);
        if (!is_answer(status, &err) || status == WAN_ATTN_INTERNAL ||
            (status != WAN_ATTN_OK) != (found == -1))
            return WORDS;
    }
    return REFUSED;
}

static void run_child(uint64_t number) {
    int is_single = number < 2 * FAULTS;
    good_call c = make_good_call(is_single ? number < FAULTS : (int)pick(2));
    fault faults[2];
    wan_attn_error err;
    int count = is_single ? 1 : 2, numbers[2] = {(int)(number % FAULTS), 0};
    if (count > 1) {
        numbers[0] = (int)pick(FAULTS);
        do
            numbers[1] = (int)pick(FAULTS);
        while (may_undo(numbers[0], numbers[1]));
    }
    told->found = REFUSED;
    for (int n = 0; n < count; n++) {
        int64_t d = pick(4);
        if (is_harmless(&c.p, numbers[n], d) || !break_call(&c.p, numbers[n], d, &faults[n]))
            return; /* there is no such fault */
    }
    tell(faults, count, "");
    told->found = CRASHED; /* unless this comes to its end */
    outcome found = ask_everything(&c.p);
    memset(&err, '?', sizeof(err));
    wan_attn_status status = wan_attn_rms_norm_rope(&c.p, NULL, &err);
    err.message[sizeof(err.message) - 1] = 0;
    tell(faults, count, status == WAN_ATTN_OK ? "" : err.message);
    if (found == REFUSED)
        found = judge(status, &err, faults, count, names);
    told->found = found == REFUSED && is_written(&c.out, 1) ? WROTE : found;
}

/* Pointers and numbers beside wan_attn_rope_params, and the calls that all faults are put into. */
static int check_rest(void) {
    wan_attn_error err = {0, ""};
    int32_t row = -1;
    int wrong = check_descriptions(wan_attn_rope_kernel_at, wan_attn_rope_kernel_count());
    for (int has_grid = 0; has_grid < 2; has_grid++) {
        good_call c = make_good_call(has_grid);
        EXPECT(wan_attn_rope_select(&c.p, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
               strstr(err.message, "row"));
        EXPECT(wan_attn_rms_norm_rope(&c.p, &row, NULL) == WAN_ATTN_OK && row >= 0);
        c.p.grid_sizes = dense(WAN_ATTN_I32, 2, 2, 3, 0, 0);
        EXPECT(wan_attn_rms_norm_rope(&c.p, NULL, NULL) == WAN_ATTN_INVALID_ARGUMENT);
    }
    EXPECT(wan_attn_rms_norm_rope(NULL, NULL, NULL) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_rms_norm_rope(NULL, &row, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "params"));
    EXPECT(wan_attn_rope_select(NULL, &row, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "params"));
    release_buffers_from(0);
    return wrong;
}

int main(int argc, char **argv) {
    refusals all = {"broken_rope", "rms_norm_rope", 2 * FAULTS, run_child, check_rest};
    return refuse_all(&all, argc, argv);
}
