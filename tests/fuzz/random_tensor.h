/* SPDX-License-Identifier: Apache-2.0
 * random_tensor.h - the operands of random calls: any strides that the contract allows, memory that
 * ends where they do, and numbers of any size.
 */
#ifndef WAN_ATTN_TESTS_RANDOM_TENSOR_H
#define WAN_ATTN_TESTS_RANDOM_TENSOR_H

#include "c/elements.h"
#include "fuzz.h"

enum { POISON = 0xff, UNTOUCHED = 0xa5 }; /* 0xff..ff is NaN in every floating dtype */
enum { MOST_ELEMENTS = 1 << 22 };

static int one_in(int64_t n) { return pick(n) == 0; }

typedef struct exponents {
    int low, high;
} exponents;

/* Exactly +-1.random * 2^exponent, or the nearest that the dtype has; denormal at the bottom. */
static void put(void *at, int32_t dtype, int exponent) {
    int mantissa_bits = dtype == WAN_ATTN_F32 ? 23 : dtype == WAN_ATTN_F16 ? 10 : 7;
    int bias = dtype == WAN_ATTN_F16 ? 15 : 127, biased = exponent + bias;
    biased = biased < 0 ? 0 : biased > 2 * bias ? 2 * bias : biased;
    uint64_t random = random_bits();
    uint32_t bits = (uint32_t)(random & ((1u << mantissa_bits) - 1));
    bits |= (uint32_t)biased << mantissa_bits;
    bits |= (uint32_t)(random >> 63) << (dtype == WAN_ATTN_F32 ? 31 : 15);
    uint16_t half = (uint16_t)bits;
    memcpy(at, dtype == WAN_ATTN_F32 ? (void *)&bits : (void *)&half, element_size(dtype));
}

static void put_infinity(void *at, int32_t dtype, int is_negative) {
    static const uint32_t BITS[] = {0x7f800000, 0x7c00, 0x7f80};
    uint32_t bits = BITS[dtype] | (uint32_t)is_negative << (dtype == WAN_ATTN_F32 ? 31 : 15);
    uint16_t half = (uint16_t)bits;
    memcpy(at, dtype == WAN_ATTN_F32 ? (void *)&bits : (void *)&half, element_size(dtype));
}

static int64_t count_of(const wan_attn_tensor *t) {
    int64_t count = 1;
    for (int d = 0; d < t->ndim; d++)
        count *= t->shape[d];
    return count;
}

static int64_t huge_stride(void) {
    int64_t stride = INT64_MAX >> pick(24);
    return one_in(2) ? stride : -stride;
}

/* Dense in a random order of the first `free` dimensions, with gaps; the last has stride 1 if it is
 * none of these. Inputs may overlap or be broadcast, and any stride that is never walked along may
 * be anything. */
static void choose_strides_of(wan_attn_tensor *t, int free, int is_output) {
    int order[WAN_ATTN_MAX_NDIM] = {0, 1, 2, 3};
    for (int n = free - 1; n > 0; n--) {
        int other = (int)pick(n + 1), moved = order[n];
        order[n] = order[other], order[other] = moved;
    }
    int has_gaps = one_in(3);
    int64_t step = free < t->ndim ? t->shape[free] : 1;
    for (int n = 0; n < free; n++) {
        int d = order[n];
        step += has_gaps ? pick(9) : 0;
        t->stride[d] = step;
        step *= t->shape[d] > 1 ? t->shape[d] : 1;
        if (!is_output && one_in(12))
            t->stride[d] = 0;
        else if (!is_output && one_in(20))
            t->stride[d] = 1 + pick(t->stride[d]);
        if (one_in(16))
            t->stride[d] = -t->stride[d];
        if ((t->shape[d] <= 1 || count_of(t) == 0) && one_in(3))
            t->stride[d] = huge_stride();
    }
    if (free < t->ndim)
        t->stride[free] = t->shape[free] == 1 && one_in(3) ? huge_stride() : 1;
}

/* Of an operand, a result, or a list of lengths: only head_dim has stride 1. */
static void choose_strides(wan_attn_tensor *t, int is_output) {
    choose_strides_of(t, t->ndim == 4 ? 3 : t->ndim, is_output);
}

/* Memory for the tensor, which begins or ends where its first or last element does. */
static buffer *give_memory(wan_attn_tensor *t, int fill) {
    int64_t lowest = 0, highest = 0, size = (int64_t)element_size(t->dtype);
    int is_empty = count_of(t) == 0;
    for (int d = 0; d < t->ndim && !is_empty; d++) {
        int64_t last = t->shape[d] > 1 ? (t->shape[d] - 1) * t->stride[d] : 0;
        *(last < 0 ? &lowest : &highest) += last;
    }
    if (highest - lowest >= MOST_ELEMENTS)
        abort();
    size_t bytes = is_empty ? 0 : (size_t)((highest - lowest + 1) * size);
    buffer *b = make_buffer(bytes, (size_t)size, !one_in(4), fill);
    t->data = is_empty && t->ndim == 4 && one_in(2) ? NULL : b->at - lowest * size;
    return b;
}

static wan_attn_tensor describe(int32_t dtype, int32_t ndim, int64_t a, int64_t b, int64_t c,
                                int64_t d) {
    wan_attn_tensor t = {NULL, dtype, WAN_ATTN_CPU, 0, ndim, {a, b, c, d}, {0}};
    return t;
}

#endif /* WAN_ATTN_TESTS_RANDOM_TENSOR_H */
