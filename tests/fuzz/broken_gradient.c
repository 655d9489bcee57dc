/* SPDX-License-Identifier: Apache-2.0
 * broken_gradient.c - calls of wan_attn_backward that the contract forbids, one fault at a time and
 * two at once: each must be refused with words that name the argument, and nothing may be written.
 *
 *     broken_gradient SEED FIRST COUNT [SECONDS]
 * prints every case that was not refused as it should be.
 */
#include "refusing.h"

/* The operands, as bits of a set. */
enum {
    QUERY = 1,
    KEY = 2,
    VALUE = 4,
    OUT = 8,
    LSE = 16,
    Q_LENS = 32,
    K_LENS = 64,
    GRAD_OUT = 128,
    GRAD_LSE = 256,
    GRADIENTS = 512 + 1024 + 2048, /* of query, key and value */
    FLOATS = QUERY | KEY | VALUE | OUT | GRAD_OUT | GRADIENTS,
    LENGTHS = Q_LENS | K_LENS,
    ALL = 4095,
    TENSORS = 12,
    OUTPUTS = 4
};

/* The two structs of a call; a.forward is f, or what a fault has made of it. */
typedef struct fault_params {
    wan_attn_params f;
    wan_attn_backward_params a;
} fault_params;

typedef struct good_call {
    fault_params c;
    buffer *outputs[OUTPUTS]; /* gradients, workspace */
} good_call;

static wan_attn_tensor *tensor_at(fault_params *p, int which) {
    wan_attn_tensor *const tensors[TENSORS] = {
        &p->f.q,         &p->f.k,    &p->f.v,    &p->f.out, &p->f.lse, &p->f.seqused_q,
        &p->f.seqused_k, &p->a.dout, &p->a.dlse, &p->a.dq,  &p->a.dk,  &p->a.dv};
    return tensors[which];
}

/* No size is 1, so that every stride is walked along; what is read is 0, and out and lse are as if
 * forward had left them. */
static void make_good_call(good_call *g) {
    wan_attn_params *p = &g->c.f;
    wan_attn_backward_params *a = &g->c.a;
    size_t size = 0;
    memset(g, 0, sizeof(*g));
    p->struct_size = sizeof(*p);
    p->kernel = -1;
    p->q = p->out = a->dout = a->dq = dense(WAN_ATTN_F32, 4, 2, 70, 4, 16);
    p->k = p->v = a->dk = a->dv = dense(WAN_ATTN_F32, 4, 2, 100, 2, 16);
    p->lse = a->dlse = dense(WAN_ATTN_F32, 3, 2, 4, 70, 0);
    p->seqused_q = p->seqused_k = dense(WAN_ATTN_I32, 1, 2, 0, 0, 0);
    p->window_size_left = p->window_size_right = -1;
    p->num_threads = 2;
    a->struct_size = sizeof(*a);
    a->kernel = -1;
    a->forward = p;
    if (wan_attn_backward_select(a, NULL, &size, NULL) != WAN_ATTN_OK)
        abort();
    for (int n = 0; n < TENSORS; n++) {
        int is_output = GRADIENTS >> n & 1;
        buffer *memory = give_memory(tensor_at(&g->c, n), is_output ? UNTOUCHED : 0);
        if (is_output)
            g->outputs[n - (TENSORS - 3)] = memory;
        else if (!(LENGTHS >> n & 1))
            make_read_only(memory);
    }
    for (int64_t b = 0; b < 2; b++) {
        write_element(element(&p->seqused_q, b, 0, 0, 0), WAN_ATTN_I32, 3.0);
        write_element(element(&p->seqused_k, b, 0, 0, 0), WAN_ATTN_I32, 3.0);
    }
    g->outputs[3] = make_buffer(size + 64, 64, 0, UNTOUCHED);
    p->workspace = g->outputs[3]->at;
    p->workspace_size = size;
}

/* Ways to break a tensor's description. */
#define TENSOR_FAULTS(F)                                                                           \
    DESCRIPTION_FAULTS(F)                                                                          \
    F(dtype_lengths, FLOATS | LSE | GRAD_LSE, t->dtype = WAN_ATTN_I64)                             \
    F(dtype_float, LENGTHS, t->dtype = WAN_ATTN_F32)                                               \
    F(dtype_half, OUT | LSE | GRAD_LSE | GRADIENTS, t->dtype = WAN_ATTN_F16)                       \
    F(dtype_double, FLOATS | LSE | GRAD_LSE, t->dtype = WAN_ATTN_F64)                              \
    F(is_absent, OUT | LSE | GRAD_OUT | GRADIENTS, memset(t, 0, sizeof(*t)))                       \
    F(last_stride_2, FLOATS, t->stride[3] = 2)                                                     \
    F(last_stride_0, FLOATS, t->stride[3] = 0)                                                     \
    F(last_stride_negative, FLOATS, t->stride[3] = -1)                                             \
    F(elements_are_one, OUT | LSE | GRADIENTS, t->stride[d < 3 && d < t->ndim ? d : 0] = 0)        \
    F(elements_overlap, OUT | LSE | GRADIENTS, t->stride[d < 3 && d < t->ndim ? d : 0] -= 1)       \
    F(length_negative, LENGTHS, ((int32_t *)t->data)[d % 2] = -1)                                  \
    F(length_beyond, LENGTHS, ((int32_t *)t->data)[d % 2] = 101)                                   \
    F(length_huge, LENGTHS, ((int32_t *)t->data)[d % 2] = INT32_MAX)

/* One more row of one of these would begin where the other ends. */
#define ROWS_BEFORE(from, rows) beyond(from, 0 - (uint64_t)(4 * 64 * (rows)))

/* Ways to break the rest: F(name, the argument that the message must name, code). */
#define OTHER_FAULTS(F)                                                                            \
    F(struct_size_0, "params.struct_size", p->a.struct_size = 0)                                   \
    F(struct_size_less, "params.struct_size", p->a.struct_size -= 8)                               \
    F(struct_size_more, "params.struct_size", p->a.struct_size += 8)                               \
    F(struct_size_beyond, "params.struct_size", p->a.struct_size = UINT32_MAX)                     \
    F(forward_size_0, "params.struct_size", p->f.struct_size = 0)                                  \
    F(forward_size_less, "params.struct_size", p->f.struct_size -= 8)                              \
    F(forward_size_more, "params.struct_size", p->f.struct_size += 8)                              \
    F(forward_null, "forward", p->a.forward = NULL)                                                \
    F(kernel_below, "kernel", p->a.kernel = -2)                                                    \
    F(kernel_min, "kernel", p->a.kernel = INT32_MIN)                                               \
    F(kernel_beyond, "kernel", p->a.kernel = wan_attn_backward_kernel_count())                     \
    F(kernel_max, "kernel", p->a.kernel = INT32_MAX)                                               \
    F(scale_nan, "scale", p->f.has_softmax_scale = 1, p->f.softmax_scale = NAN)                    \
    F(scale_inf, "scale", p->f.has_softmax_scale = -1, p->f.softmax_scale = INFINITY)              \
    F(scale_minus_inf, "scale", p->f.has_softmax_scale = 1, p->f.softmax_scale = -INFINITY)        \
    F(precision_below, "precision", p->f.precision = -1)                                           \
    F(precision_beyond, "precision", p->f.precision = 2)                                           \
    F(precision_lossy, "precision", p->f.precision = WAN_ATTN_QK8)                                 \
    F(threshold, "skip_threshold", p->f.skip_threshold = 0.05)                                     \
    F(threshold_nan, "skip_threshold", p->f.skip_threshold = NAN)                                  \
    F(threshold_beyond, "skip_threshold", p->f.skip_threshold = 2.0)                               \
    F(guard, "guard", p->f.guard = p->f.workspace, p->f.guard_size = sizeof(wan_attn_guard))       \
    F(guard_size_0, "guard_size", p->f.guard = p->f.workspace, p->f.guard_size = 0)                \
    F(lists, "block_counts", give_lists(&p->f))                                                    \
    F(window_left, "window_left", p->f.window_size_left = -2)                                      \
    F(window_left_min, "window_left", p->f.window_size_left = INT64_MIN)                           \
    F(window_right, "window_right", p->f.window_size_right = -2)                                   \
    F(window_right_min, "window_right", p->f.window_size_right = INT64_MIN)                        \
    F(workspace_null, "workspace", p->f.workspace = NULL)                                          \
    F(workspace_less, "workspace", p->f.workspace_size -= 1)                                       \
    F(workspace_none, "workspace", p->f.workspace_size = 0)                                        \
    F(workspace_misaligned_1, "workspace", p->f.workspace = beyond(p->f.workspace, 1))             \
    F(workspace_misaligned_32, "workspace", p->f.workspace = beyond(p->f.workspace, 32))           \
    F(workspace_is_dv, "workspace", p->f.workspace = p->a.dv.data)                                 \
    F(workspace_is_dout, "workspace", p->f.workspace = p->a.dout.data)                             \
    F(workspace_is_lse, "workspace", p->f.workspace = p->f.lse.data)                               \
    F(dq_is_query, "grad_query", p->a.dq.data = p->f.q.data)                                       \
    F(dq_is_out, "grad_query", p->a.dq.data = p->f.out.data)                                       \
    F(dq_is_dout, "grad_query", p->a.dq.data = p->a.dout.data)                                     \
    F(dq_is_in_dlse, "grad_query", p->a.dq.data = beyond(p->a.dlse.data, 64))                      \
    F(dq_ends_in_key, "grad_query", p->a.dq.data = ROWS_BEFORE(p->f.k.data, 139))                  \
    F(dk_is_value, "grad_key", p->a.dk.data = p->f.v.data)                                         \
    F(dk_is_dq, "grad_key", p->a.dk.data = p->a.dq.data)                                           \
    F(dk_is_a_row_of_dq, "grad_key", p->a.dk.data = beyond(p->a.dq.data, 4 * 64))                  \
    F(dv_is_dk, "grad_value", p->a.dv.data = p->a.dk.data)                                         \
    F(dv_is_in_lse, "grad_value", p->a.dv.data = beyond(p->f.lse.data, 64))                        \
    F(dv_is_k_lens, "grad_value", p->a.dv.data = p->f.seqused_k.data)

/* Lists that are right for forward. */
static void give_lists(wan_attn_params *p) {
    p->block_counts = dense(WAN_ATTN_I32, 3, 2, 4, 2, 0);
    p->block_indices = dense(WAN_ATTN_I32, 4, 2, 4, 2, 2);
    (void)give_memory(&p->block_counts, 0);
    (void)give_memory(&p->block_indices, 0);
}

static const char *const TENSOR_NAMES[TENSORS] = {
    "query",  "key",      "value",    "out",        "lse",      "q_lens",
    "k_lens", "grad_out", "grad_lse", "grad_query", "grad_key", "grad_value"};

#define TAKES(of, which) ((of) >> (which) & 1)
#include "faults.h"

/* The message begins with the argument; where query, key or value is broken, it may say that
 * another operand does not fit them. */
static int names(const char *message, const fault *f) {
    size_t length = (size_t)(strstr(message, " must ") - message);
    int is_named = strlen(f->argument) == length && !strncmp(message, f->argument, length);
    for (int n = 0; n < TENSORS && f->is_misfit && !is_named; n++)
        is_named = strlen(TENSOR_NAMES[n]) == length &&
                   !strncmp(message, TENSOR_NAMES[n], length) &&
                   (!strcmp(f->argument, "query") || !strcmp(f->argument, "key") ||
                    !strcmp(f->argument, "value"));
    return is_named;
}

/* Questions may refuse or answer; they must come back, and have words for a refusal. */
static outcome ask_everything(const wan_attn_backward_params *params) {
    wan_attn_backward_params a = *params;
    for (int32_t row = -2; row <= wan_attn_backward_kernel_count(); row++) {
        wan_attn_error err;
        int32_t found = -1;
        size_t size = SIZE_MAX;
        memset(&err, '?', sizeof(err));
        a.kernel = row == -2 ? params->kernel : row;
        wan_attn_status status = wan_attn_backward_select(&a, &found, &size, &err);
        if (!is_answer(status, &err) || status == WAN_ATTN_INTERNAL ||
            (status != WAN_ATTN_OK) != (found == -1 && size == SIZE_MAX) ||
            wan_attn_backward_select(&a, NULL, NULL, NULL) != status)
            return WORDS;
    }
    return REFUSED;
}

static void run_child(uint64_t number) {
    static good_call g;
    make_good_call(&g);
    fault faults[2];
    wan_attn_error err;
    int32_t row = -1;
    int count = number < FAULTS ? 1 : 2, numbers[2] = {(int)number, 0};
    if (count > 1) {
        numbers[0] = (int)pick(FAULTS);
        do
            numbers[1] = (int)pick(FAULTS);
        while (may_undo(numbers[0], numbers[1]));
    }
    told->found = REFUSED;
    for (int n = 0; n < count; n++)
        if (!break_call(&g.c, numbers[n], pick(4), &faults[n]))
            return; /* there is no such fault */
    tell(faults, count, "");
    told->found = CRASHED; /* unless this comes to its end */
    outcome found = ask_everything(&g.c.a);
    memset(&err, '?', sizeof(err));
    wan_attn_status status = wan_attn_backward(&g.c.a, &row, &err);
    err.message[sizeof(err.message) - 1] = 0;
    tell(faults, count, status == WAN_ATTN_OK ? "" : err.message);
    if (found == REFUSED)
        found = judge(status, &err, faults, count, names);
    told->found = found == REFUSED && (row != -1 || is_written(g.outputs, OUTPUTS)) ? WROTE : found;
}

/* Pointers and numbers beside the two structs, and the call that all faults are put into. */
static int check_rest(void) {
    static good_call g;
    wan_attn_error err = {0, ""};
    int32_t row = -1;
    int wrong = check_descriptions(wan_attn_backward_kernel_at, wan_attn_backward_kernel_count());
    EXPECT(wan_attn_backward(NULL, NULL, NULL) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_backward(NULL, &row, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "params") && row == -1);
    EXPECT(wan_attn_backward_select(NULL, &row, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "params") && row == -1);
    make_good_call(&g);
    EXPECT(wan_attn_backward(&g.c.a, &row, NULL) == WAN_ATTN_OK && row >= 0);
    EXPECT(is_written(g.outputs, OUTPUTS));
    memset(&g.c.a.dlse, 0, sizeof(g.c.a.dlse));
    EXPECT(wan_attn_backward(&g.c.a, NULL, &err) == WAN_ATTN_OK && err.status == WAN_ATTN_OK);
    release_buffers_from(0);
    return wrong;
}

int main(int argc, char **argv) {
    refusals all = {"broken_gradient", "gradients", FAULTS, run_child, check_rest};
    return refuse_all(&all, argc, argv);
}
