/* SPDX-License-Identifier: Apache-2.0
 * random.h - random operands for the C drivers, each in memory that ends where its last element
 * does.
 */
#ifndef WAN_ATTN_TESTS_RANDOM_H
#define WAN_ATTN_TESTS_RANDOM_H

#include <stdio.h>
#include <stdlib.h>

#include "elements.h"

#define FAIL(...)                                                                                  \
    do {                                                                                           \
        fprintf(stderr, __VA_ARGS__);                                                              \
        fprintf(stderr, "\n");                                                                     \
        return 1;                                                                                  \
    } while (0)

enum { PACKED, FUSED, TRANSPOSED, EXPANDED, LAYOUTS };
enum { POISON = 0xff, UNTOUCHED = 0xa5, GAP = 5 }; /* 0xff..ff is NaN in f32, f16 and bf16 */

static uint64_t random_state;

static int64_t pick(int64_t below) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (int64_t)(random_state % (uint64_t)below);
}

#define PICK(array) (array)[pick((int64_t)(sizeof(array) / sizeof((array)[0])))]

/* Exact in every dtype, so that rounding the inputs is no source of error. */
static double random_value(void) { return (double)(pick(255) - 127) / 64.0; }

/* A buffer that ends where the tensor's last element ends: one byte further is a heap overflow. */
static size_t buffer_size(const wan_attn_tensor *t) {
    int64_t last = 0;
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] == 0)
            return 0;
        last += t->shape[d] > 1 ? (t->shape[d] - 1) * t->stride[d] : 0;
    }
    return (size_t)(last + 1) * element_size(t->dtype);
}

static void allocate(wan_attn_tensor *t, int byte) {
    size_t size = buffer_size(t);
    t->data = malloc(size ? size : 1);
    memset(t->data, byte, size);
}

static wan_attn_tensor operand(int32_t dtype, const int64_t shape[4], int layout) {
    wan_attn_tensor t = {NULL, dtype, WAN_ATTN_CPU, 0, 4, {0}, {0}};
    int64_t length = shape[1], heads = shape[2], head_dim = shape[3];
    memcpy(t.shape, shape, sizeof(t.shape));
    t.stride[3] = 1;
    t.stride[2] = layout == TRANSPOSED ? length * head_dim : head_dim;
    t.stride[1] = layout == TRANSPOSED ? head_dim
                  : layout == FUSED    ? 3 * heads * head_dim + GAP
                                       : heads * head_dim;
    t.stride[0] = layout == EXPANDED ? 0
                  : layout == FUSED  ? length * t.stride[1] + GAP
                                     : length * heads * head_dim;
    for (int d = 0; d < 3; d++) /* never walked along: any number is right */
        if (shape[d] <= 1 && pick(2))
            t.stride[d] = pick(2) ? INT64_MAX - 7 : INT64_MIN;
    return t;
}

static wan_attn_tensor input(int32_t dtype, const int64_t shape[4],
                             const wan_attn_tensor *lengths) {
    wan_attn_tensor t = operand(dtype, shape, (int)pick(LAYOUTS));
    allocate(&t, POISON);
    for (int64_t b = 0; b < shape[0]; b++)
        for (int64_t i = 0; i < real_length(lengths, b, shape[1]); i++)
            for (int64_t h = 0; h < shape[2]; h++)
                for (int64_t d = 0; d < shape[3]; d++)
                    write_element(element(&t, b, i, h, d), dtype, random_value());
    return t;
}

/* Bytes between the elements of an output must be as they were. */
static int wrote_between_elements(const wan_attn_tensor *t) {
    size_t size = buffer_size(t), width = element_size(t->dtype);
    char *copy = malloc(size ? size : 1);
    wan_attn_tensor rest = *t;
    memcpy(copy, t->data, size);
    rest.data = copy;
    for (int64_t a = 0; a < t->shape[0]; a++)
        for (int64_t b = 0; b < t->shape[1]; b++)
            for (int64_t c = 0; c < t->shape[2]; c++)
                for (int64_t d = 0; d < (t->ndim == 4 ? t->shape[3] : 1); d++)
                    memset(element(&rest, a, b, c, d), UNTOUCHED, width);
    int wrote = 0;
    for (size_t n = 0; n < size; n++)
        wrote |= (unsigned char)copy[n] != UNTOUCHED;
    free(copy);
    return wrote;
}

#endif /* WAN_ATTN_TESTS_RANDOM_H */
