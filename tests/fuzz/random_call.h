/* SPDX-License-Identifier: Apache-2.0
 * random_call.h - one random call that the contract of wan_attn.h allows: shapes, strides, dtypes,
 * values, lengths and masks. What may not be used holds NaN, and inputs cannot be written to.
 */
#ifndef WAN_ATTN_TESTS_RANDOM_CALL_H
#define WAN_ATTN_TESTS_RANDOM_CALL_H

#include "random_tensor.h"

/* What the numbers of a call are like. The last four put something special into keys or values. */
typedef enum numbers {
    ORDINARY,
    WIDE,
    LARGE,
    DENORMAL,
    EQUAL,
    ONE_HOT,
    MINUS_INFINITY,
    INFINITE_VALUE,
    NAN_KEY,
    NUMBERS
} numbers;

static wan_attn_tensor random_lengths(int64_t batch, int64_t padded) {
    wan_attn_tensor t = describe(one_in(2) ? WAN_ATTN_I32 : WAN_ATTN_I64, 1, batch, 0, 0, 0);
    choose_strides(&t, 0);
    buffer *b = give_memory(&t, POISON);
    for (int64_t n = 0; n < batch; n++)
        write_element(element(&t, n, 0, 0, 0), t.dtype,
                      (double)(one_in(4) ? padded : pick(padded + 1)));
    make_read_only(b);
    return t;
}

/* What a campaign wants of its calls: how many query rows they may have, and which rows and keys
 * are used; the others stay NaN. */
typedef struct wanted {
    int64_t longest_q;
    int (*uses_row)(const wan_attn_params *p, int64_t sample, int64_t i);
    int (*uses_key)(const wan_attn_params *p, int64_t sample, int64_t j);
} wanted;

static buffer *random_operand(wan_attn_tensor *t, const wan_attn_params *p,
                              int (*uses)(const wan_attn_params *, int64_t, int64_t),
                              exponents range) {
    choose_strides(t, 0);
    buffer *b = give_memory(t, POISON);
    for (int64_t n = 0; n < t->shape[0]; n++)
        for (int64_t i = 0; i < t->shape[1]; i++)
            for (int64_t h = 0; h < t->shape[2] && uses(p, n, i); h++)
                for (int64_t d = 0; d < t->shape[3]; d++)
                    put(element(t, n, i, h, d), t->dtype,
                        range.low + (int)pick(range.high - range.low + 1));
    return b;
}

static void choose_shape(wan_attn_params *p, int64_t longest_q) {
    static const int64_t EDGES[] = {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65};
    static const int64_t HEAD_DIMS[] = {1, 2, 7, 8, 16, 40, 64, 80, 96, 128, 160, 255, 256};
    static const int32_t DTYPES[] = {WAN_ATTN_F32, WAN_ATTN_F16, WAN_ATTN_BF16};
    int64_t batch = one_in(40) ? 0 : 1 + pick(3), heads_k = 1 + pick(3), group = 1 + pick(4);
    int64_t seqlen_q = one_in(3) ? PICK(EDGES) : 1 + pick(longest_q);
    int64_t seqlen_k = one_in(3) ? PICK(EDGES) : one_in(8) ? 1 + pick(300) : 1 + pick(70);
    int64_t head_dim = one_in(2) ? PICK(HEAD_DIMS) : 1 + pick(256), most = 1 << (12 + pick(10));
    seqlen_q = one_in(40) ? 0 : one_in(6) ? 1 + pick(3) : seqlen_q;
    seqlen_k = one_in(40) ? 0 : seqlen_k;
    /* Many small calls find more than a few large ones. */
    while (batch * heads_k * group * (seqlen_q + 1) * (seqlen_k + 1) * head_dim > most) {
        int64_t *sizes[] = {&group, &heads_k, &batch, &head_dim, &seqlen_k, &seqlen_q};
        int64_t *size = sizes[pick(6)];
        *size = *size > 1 ? 1 + pick(*size) : 1;
    }
    int32_t dtype = PICK(DTYPES);
    p->q =
        describe(one_in(4) ? WAN_ATTN_F32 : dtype, 4, batch, seqlen_q, heads_k * group, head_dim);
    p->k = describe(one_in(4) ? WAN_ATTN_F32 : dtype, 4, batch, seqlen_k, heads_k, head_dim);
    p->v = describe(dtype, 4, batch, seqlen_k, heads_k, head_dim);
}

/* A run of keys, often longer than any row's block of keys. */
static void put_special_keys(wan_attn_params *p, numbers kind) {
    int64_t first = pick(p->k.shape[1]), count = one_in(3) ? 1 + pick(4) : 32 + pick(64);
    int64_t dim = pick(p->k.shape[3]);
    first = one_in(2) ? 0 : first;
    wan_attn_tensor *t = kind == INFINITE_VALUE ? &p->v : &p->k;
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[2]; h++)
            for (int64_t j = first; j < t->shape[1] && j < first + count; j++) {
                void *at = element(t, b, j, h, dim);
                if (kind == NAN_KEY)
                    memset(at, POISON, element_size(t->dtype));
                else
                    put_infinity(at, t->dtype, kind == MINUS_INFINITY || one_in(2));
                if (kind == NAN_KEY || kind == INFINITE_VALUE)
                    j += pick(8); /* some of them */
            }
    for (int64_t b = 0; kind == MINUS_INFINITY && b < p->q.shape[0]; b++)
        for (int64_t i = 0; i < real_length(&p->seqused_q, b, p->q.shape[1]); i++)
            for (int64_t h = 0; h < p->q.shape[2]; h++)
                write_element(element(&p->q, b, i, h, dim), p->q.dtype, 1.0);
}

static void put_one_hot_key(wan_attn_params *p) {
    int64_t j = pick(p->k.shape[1]);
    for (int64_t b = 0; b < p->k.shape[0]; b++)
        for (int64_t h = 0; h < p->k.shape[2]; h++)
            for (int64_t d = 0; d < p->k.shape[3] && j < real_length(&p->seqused_k, b, j + 1); d++)
                write_element(element(&p->k, b, j, h, d), p->k.dtype, pick(2) ? 64.0 : -64.0);
}

/* Of values, and of what else is as large. */
static exponents exponents_of(numbers kind, int32_t dtype) {
    int bottom = dtype == WAN_ATTN_F16 ? -24 : -149;
    exponents usual = {-4, 0}, wide = {-20, 12}, denormal = {bottom, bottom + 12};
    exponents large = {12, dtype ? 15 : 60}; /* the largest of f16 is 1.999 * 2^15 */
    return kind == WIDE ? wide : kind == LARGE ? large : kind == DENORMAL ? denormal : usual;
}

static void choose_values(wan_attn_params *p, numbers kind, const wanted *w) {
    static const exponents USUAL = {-4, 0};
    exponents of_qk = USUAL, of_v = exponents_of(kind, p->v.dtype);
    if (kind == WIDE)
        of_qk.low = -14, of_qk.high = 3;
    else if (kind == LARGE)
        of_qk.low = 8, of_qk.high = 15;
    else if (kind == DENORMAL)
        of_qk.low = of_v.low, of_qk.high = one_in(2) ? of_v.low + 20 : 0;
    else if (kind == EQUAL) /* no key counts more than another */
        of_qk.low = of_qk.high = -300;
    buffer *inputs[3] = {random_operand(&p->q, p, w->uses_row, of_qk),
                         random_operand(&p->k, p, w->uses_key, of_qk),
                         random_operand(&p->v, p, w->uses_key, of_v)};
    int has_keys = count_of(&p->k) > 0 && count_of(&p->q) > 0;
    if (has_keys && kind == ONE_HOT)
        put_one_hot_key(p);
    if (has_keys && kind >= MINUS_INFINITY)
        put_special_keys(p, kind);
    for (int n = 0; n < 3; n++)
        make_read_only(inputs[n]);
}

static numbers random_call(wan_attn_params *p, const wanted *w) {
    static const int64_t WINDOWS[] = {-1, -1, -1, 0, 1, 7, 40, 1000, INT64_MAX};
    static const double SCALES[] = {1.0, 0.125, -0.25, 3.0, 0.0, 1e-3, -0.0};
    memset(p, 0, sizeof(*p));
    p->struct_size = sizeof(*p);
    p->kernel = -1;
    choose_shape(p, w->longest_q);
    if (one_in(2))
        p->seqused_q = random_lengths(p->q.shape[0], p->q.shape[1]);
    if (one_in(2))
        p->seqused_k = random_lengths(p->k.shape[0], p->k.shape[1]);
    p->is_causal = (int32_t)pick(2);
    p->window_size_left = PICK(WINDOWS);
    p->window_size_right = PICK(WINDOWS);
    numbers kind = one_in(2) ? ORDINARY : one_in(4) ? MINUS_INFINITY : (numbers)pick(NUMBERS);
    choose_values(p, kind, w);
    p->has_softmax_scale = (int32_t)pick(2);
    p->softmax_scale = p->has_softmax_scale ? PICK(SCALES) : NAN; /* NAN: not looked at */
    if (kind == MINUS_INFINITY && p->has_softmax_scale)
        p->softmax_scale = 0.5; /* else the scores are +inf or NaN */
    return kind;
}

#endif /* WAN_ATTN_TESTS_RANDOM_CALL_H */
