/* SPDX-License-Identifier: Apache-2.0
 * rope_call.h - one random call of wan_attn_rms_norm_rope that the contract of wan_attn.h allows.
 * Angles that no token turns by are NaN, and inputs cannot be written to.
 */
#ifndef WAN_ATTN_TESTS_ROPE_CALL_H
#define WAN_ATTN_TESTS_ROPE_CALL_H

#include "random_tensor.h"

/* What the numbers of x are like. The last puts infinities and NaN into some tokens. */
typedef enum numbers { ORDINARY, WIDE, LARGE, DENORMAL, ZERO, SPECIAL, NUMBERS } numbers;

static const int32_t FLOATS[] = {WAN_ATTN_F32, WAN_ATTN_F16, WAN_ATTN_BF16};

static exponents exponents_of(numbers kind, int32_t dtype) {
    int largest = dtype == WAN_ATTN_F16 ? 15 : 127, least = dtype == WAN_ATTN_F16 ? -24 : -149;
    exponents usual = {-4, 1}, wide = {-14, 6};
    exponents large = {one_in(2) ? largest - 1 : largest / 2 - 8, largest};
    exponents denormal = {least, one_in(2) ? least + 20 : 0};
    return kind == WIDE ? wide : kind == LARGE ? large : kind == DENORMAL ? denormal : usual;
}

static void put_x(wan_attn_tensor *x, numbers kind) {
    exponents range = exponents_of(kind, x->dtype);
    for (int64_t b = 0; b < x->shape[0]; b++)
        for (int64_t s = 0; s < x->shape[1]; s++)
            for (int64_t h = 0; h < x->shape[2]; h++)
                for (int64_t d = 0; d < x->shape[3]; d++) {
                    void *at = element(x, b, s, h, d);
                    int is_special = kind == SPECIAL && s % 3 == 1 && one_in(20);
                    if (kind == ZERO)
                        write_element(at, x->dtype, 0.0);
                    else if (!is_special)
                        put(at, x->dtype, range.low + (int)pick(range.high - range.low + 1));
                    else if (one_in(2))
                        put_infinity(at, x->dtype, one_in(2));
                    else
                        memset(at, POISON, element_size(x->dtype));
                }
}

static wan_attn_tensor random_weight(int64_t size) {
    static const exponents RANGES[] = {{-2, 0}, {-2, 0}, {-14, 12}, {-24, -14}, {14, 15}};
    wan_attn_tensor t = describe(PICK(FLOATS), 1, size, 0, 0, 0);
    t.stride[0] = size == 1 && one_in(2) ? huge_stride() : 1;
    buffer *memory = give_memory(&t, POISON);
    exponents range = PICK(RANGES);
    for (int64_t n = 0; n < size; n++)
        put(element(&t, n, 0, 0, 0), t.dtype, range.low + (int)pick(range.high - range.low + 1));
    make_read_only(memory);
    return t;
}

/* The numbers of a table: cos and sin, or what is no angle at all. */
static void put_angle(wan_attn_tensor *t, void *at, int kind) {
    static const double ODD[] = {0.0, 1.0, -1.0, -0.0, INFINITY, NAN, 0x1p-140, 0x1p100};
    double number = cos((double)pick(1 << 20) * 0x1p-12);
    if (kind == 1)
        number = ldexp(number, (int)pick(60) - 30);
    else if (kind == 2 && one_in(4))
        number = PICK(ODD);
    float narrow = (float)number;
    if (t->dtype == WAN_ATTN_F64)
        memcpy(at, &number, sizeof(number));
    else
        memcpy(at, &narrow, sizeof(narrow));
}

static int kind_of_angles(void) { return one_in(4) ? (int)pick(3) : 0; }

static wan_attn_tensor random_table_of_tokens(const wan_attn_tensor *x) {
    wan_attn_tensor t = *x;
    t.dtype = one_in(2) ? WAN_ATTN_F64 : WAN_ATTN_F32;
    choose_strides(&t, 0);
    if (one_in(3))
        t.stride[2] = 0; /* as most callers have it */
    buffer *memory = give_memory(&t, POISON);
    int kind = kind_of_angles();
    for (int64_t b = 0; b < t.shape[0]; b++)
        for (int64_t s = 0; s < t.shape[1]; s++)
            for (int64_t h = 0; h < t.shape[2]; h++)
                for (int64_t d = 0; d < t.shape[3]; d++)
                    put_angle(&t, element(&t, b, s, h, d), kind);
    make_read_only(memory);
    return t;
}

/* Sizes whose product is about the number of tokens, or anything up to the table's length. */
static wan_attn_tensor random_grid(int64_t batch, int64_t seqlen, int64_t positions) {
    wan_attn_tensor t = describe(one_in(2) ? WAN_ATTN_I32 : WAN_ATTN_I64, 2, batch, 3, 0, 0);
    choose_strides(&t, 0);
    buffer *memory = give_memory(&t, POISON);
    for (int64_t b = 0; b < batch; b++)
        for (int64_t axis = 0; axis < 3; axis++) {
            int64_t about = one_in(3) ? positions : seqlen / (1 + pick(4)) + 1;
            int64_t size = one_in(12) ? 0 : 1 + pick(about > 0 ? about : 1);
            write_element(element(&t, b, axis, 0, 0), t.dtype,
                          (double)(size < positions ? size : positions));
        }
    make_read_only(memory);
    return t;
}

/* Axis n has angles up to the largest grid; the rest of its columns are never looked at. */
static wan_attn_tensor random_table(const wan_attn_tensor *grid, int64_t head_dim,
                                    int64_t positions) {
    wan_attn_tensor t =
        describe(one_in(2) ? WAN_ATTN_F64 : WAN_ATTN_F32, 2, positions, head_dim, 0, 0);
    choose_strides_of(&t, 1, 1); /* no row lies in another: each has angles of its own */
    buffer *memory = give_memory(&t, POISON);
    int64_t of_axis = 2 * (head_dim / 2 / 3), begin = 0;
    int kind = kind_of_angles();
    for (int64_t axis = 0; axis < 3; axis++) {
        int64_t end = begin + (axis ? of_axis : head_dim - 2 * of_axis), most = 0;
        for (int64_t b = 0; b < grid->shape[0]; b++) {
            int64_t size = (int64_t)value_at(grid, b, axis, 0, 0);
            most = size > most ? size : most;
        }
        for (int64_t row = 0; row < most; row++)
            for (int64_t d = begin; d < end; d++)
                put_angle(&t, element(&t, row, d, 0, 0), kind);
        begin = end;
    }
    make_read_only(memory);
    return t;
}

static void choose_shape(wan_attn_rope_params *p, int is_turned) {
    static const int64_t EDGES[] = {1, 2, 15, 16, 17, 31, 32, 33, 48, 49};
    static const int64_t HEAD_DIMS[] = {1,  2,  4,  6,  8,  10,  16,  20,
                                        36, 40, 64, 80, 84, 128, 255, 256};
    static const int64_t HEADS[] = {1, 2, 3, 5, 12, 24, 40};
    int64_t batch = one_in(40) ? 0 : 1 + pick(3), seqlen = one_in(2) ? PICK(EDGES) : 1 + pick(60);
    int64_t heads = PICK(HEADS), head_dim = one_in(2) ? PICK(HEAD_DIMS) : 1 + pick(256);
    int64_t most = 1 << (6 + pick(11));
    seqlen = one_in(40) ? 0 : seqlen;
    while (batch * seqlen * heads * head_dim > most) {
        int64_t *sizes[] = {&heads, &batch, &head_dim, &seqlen};
        int64_t *size = sizes[pick(4)];
        *size = *size > 1 ? 1 + pick(*size) : 1;
    }
    if (is_turned && head_dim % 2)
        head_dim++;
    p->x = describe(PICK(FLOATS), 4, batch, seqlen, heads, head_dim);
    p->out = describe(one_in(2) ? p->x.dtype : PICK(FLOATS), 4, batch, seqlen, heads, head_dim);
}

static void choose_table(wan_attn_rope_params *p) {
    static const int64_t OFFSETS[] = {0, 0, 1, 5, 40, (int64_t)1 << 40, INT64_MAX / 2};
    int64_t seqlen = p->x.shape[1], positions = one_in(20) ? 0 : 1 + pick(2 * seqlen + 2);
    if (one_in(3)) {
        p->table = random_table_of_tokens(&p->x);
        return;
    }
    p->grid_sizes = random_grid(p->x.shape[0], seqlen, positions);
    p->table = random_table(&p->grid_sizes, p->x.shape[3], positions);
    p->seqlen_offset = PICK(OFFSETS);
}

static numbers random_call(wan_attn_rope_params *p) {
    static const double EPS[] = {1e-6, 1e-6, 1e-5, 0.0, 1.0, 1e-12, 1e-300, 1e30};
    memset(p, 0, sizeof(*p));
    p->struct_size = sizeof(*p);
    p->kernel = -1;
    int is_turned = !one_in(4);
    choose_shape(p, is_turned);
    choose_strides(&p->x, 0);
    choose_strides(&p->out, 1);
    numbers kind = one_in(2) ? ORDINARY : (numbers)pick(NUMBERS);
    buffer *memory = give_memory(&p->x, POISON);
    put_x(&p->x, kind);
    make_read_only(memory);
    p->has_norm = !one_in(4);
    p->is_per_head = one_in(3);
    p->rounds_norm = (int32_t)pick(2);
    p->eps = p->has_norm ? PICK(EPS) : NAN; /* NAN: not looked at */
    if (p->has_norm && !one_in(4))
        p->weight = random_weight(p->x.shape[3] * (p->is_per_head ? 1 : p->x.shape[2]));
    if (is_turned)
        choose_table(p);
    return kind;
}

#endif /* WAN_ATTN_TESTS_ROPE_CALL_H */
