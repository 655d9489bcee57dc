/* SPDX-License-Identifier: Apache-2.0
 * qk8.c - q and k in INT8, as qk8.h has it. Every operation is rounded by itself: a product that a
 * compiler could fuse with a sum stands in a statement of its own. Knows no row.
 */
#include "cpu/qk8.h"

#include <math.h>

#include "cpu/half.h"

/* Bit d: channel d is negated. The top bits of a linear congruence from 0x9e3779b9 on (multiplier
 * 1664525, increment 1013904223) are these inverted. Without signs, a row of equal numbers would be
 * rotated into a single spike. */
static const uint32_t SIGNS[WAN_ATTN_QK8_MAX_DEPTH / 32] = {
    0x6b080cadu, 0x0648dfecu, 0xcd1562feu, 0xfd1bd94eu,
    0x129c2837u, 0x8cba3866u, 0x76d494d1u, 0xc52b6767u,
};

/* Adding and taking it off again rounds to an integer, to nearest even, up to 2^22. */
#define ROUND 0x1.8p23f
#define SMALLEST 0x1p-100f

int64_t wan_attn_qk8_depth(int64_t head_dim) {
    int64_t depth = 1;
    while (depth < head_dim)
        depth *= 2;
    return depth;
}

void wan_attn_qk8_sum_keys(const wan_attn_problem *p, int64_t b, int64_t head_k, int64_t first,
                           int64_t count, float *sums) {
    float row[WAN_ATTN_QK8_MAX_DEPTH];
    memset(sums, 0, (size_t)p->head_dim * sizeof(float));
    for (int64_t n = first; n < first + count; n++) {
        wan_attn_load_floats(row, wan_attn_row_address(&p->k, b, n, head_k), p->k.dtype,
                             p->head_dim);
        for (int64_t d = 0; d < p->head_dim; d++)
            sums[d] += fabsf(row[d]) < INFINITY ? row[d] : 0.0f;
    }
}

void wan_attn_qk8_find_mean(const float *sums, int64_t keys, int64_t head_dim, float *mean) {
    int64_t blocks = wan_attn_divide_up(keys, WAN_ATTN_QK8_BLOCK);
    for (int64_t d = 0; d < head_dim; d++) {
        double sum = 0.0;
        for (int64_t block = 0; block < blocks; block++)
            sum += (double)sums[block * head_dim + d];
        float quotient = keys ? (float)(sum / (double)keys) : 0.0f;
        mean[d] = fabsf(quotient) < INFINITY ? quotient : 0.0f;
    }
}

uint32_t wan_attn_qk8_signs(int64_t first) { return SIGNS[first / 32] >> first % 32; }

static void rotate(float *x, int64_t head_dim, int64_t depth) {
    for (int64_t d = 0; d < head_dim; d++)
        x[d] = SIGNS[d / 32] >> d % 32 & 1u ? -x[d] : x[d];
    for (int64_t d = head_dim; d < depth; d++)
        x[d] = 0.0f;
    for (int64_t half = 1; half < depth; half *= 2)
        for (int64_t first = 0; first < depth; first += 2 * half)
            for (int64_t d = first; d < first + half; d++) {
                float a = x[d], b = x[d + half];
                x[d] = a + b;
                x[d + half] = a - b;
            }
}

float wan_attn_qk8_inverse(uint32_t top, float *step) {
    float largest = wan_attn_float_of_bits(top);
    int is_finite = largest < INFINITY;
    if (!is_finite || largest < SMALLEST) {
        *step = is_finite ? 0.0f : NAN;
        return 0.0f;
    }
    *step = largest / 127.0f;
    return 127.0f / largest;
}

float wan_attn_qk8_quantise(float *x, int64_t head_dim, int8_t *to) {
    int64_t depth = wan_attn_qk8_depth(head_dim);
    rotate(x, head_dim, depth);
    uint32_t top = 0; /* as bits: they are ordered as magnitudes are, NaN above all */
    for (int64_t d = 0; d < depth; d++) {
        uint32_t bits = wan_attn_bits_of_float(x[d]) & 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    float step, inverse = wan_attn_qk8_inverse(top, &step);
    for (int64_t d = 0; d < depth && inverse != 0.0f; d++) {
        float scaled = x[d] * inverse;
        float shifted = scaled + ROUND;
        to[d] = (int8_t)(shifted - ROUND);
    }
    if (inverse == 0.0f)
        memset(to, 0, (size_t)depth);
    return step;
}
