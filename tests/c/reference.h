/* SPDX-License-Identifier: Apache-2.0
 * reference.h - attention in double precision, straight from the formula in wan_attn.h, and access
 * to the elements of a wan_attn_tensor. Shares no code with csrc/: includes nothing of it but the
 * public header.
 */
#ifndef WAN_ATTN_TESTS_REFERENCE_H
#define WAN_ATTN_TESTS_REFERENCE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "wan_attn.h"

static size_t element_size(int32_t dtype) {
    return dtype == WAN_ATTN_I64 || dtype == WAN_ATTN_F64    ? 8
           : dtype == WAN_ATTN_F16 || dtype == WAN_ATTN_BF16 ? 2
                                                             : 4;
}

static double decode_half(uint16_t bits, int exponent_bits) {
    int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
    int mantissa = bits & ((1 << mantissa_bits) - 1);
    double sign = bits >> 15 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1)
        return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0)
        return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

/* Only for values that the format holds exactly. */
static uint16_t encode_half(double value, int exponent_bits) {
    int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1, exponent;
    if (value == 0.0)
        return 0;
    double fraction = frexp(fabs(value), &exponent); /* in [0.5, 1) */
    int mantissa = (int)ldexp(fraction, mantissa_bits + 1) - (1 << mantissa_bits);
    return (uint16_t)((value < 0) << 15 | (exponent - 1 + bias) << mantissa_bits | mantissa);
}

static double read_element(const void *at, int32_t dtype) {
    union {
        float f;
        uint16_t h;
        int32_t i;
        int64_t l;
        double d;
    } raw;
    memcpy(&raw, at, element_size(dtype));
    switch (dtype) {
    case WAN_ATTN_F32: return raw.f;
    case WAN_ATTN_F16: return decode_half(raw.h, 5);
    case WAN_ATTN_BF16: return decode_half(raw.h, 8);
    case WAN_ATTN_I32: return raw.i;
    case WAN_ATTN_F64: return raw.d;
    default: return (double)raw.l;
    }
}

static void write_element(void *at, int32_t dtype, double value) {
    float f = (float)value;
    uint16_t h = dtype == WAN_ATTN_F16 || dtype == WAN_ATTN_BF16
                     ? encode_half(value, dtype == WAN_ATTN_F16 ? 5 : 8)
                     : 0;
    int32_t i = (int32_t)value;
    int64_t l = (int64_t)value;
    const void *from = dtype == WAN_ATTN_F32   ? (const void *)&f
                       : dtype == WAN_ATTN_I32 ? (const void *)&i
                       : dtype == WAN_ATTN_I64 ? (const void *)&l
                       : dtype == WAN_ATTN_F64 ? (const void *)&value
                                               : (const void *)&h;
    memcpy(at, from, element_size(dtype));
}

/* Address of t[a, b, c, d]; indices beyond t's rank are 0. */
static void *element(const wan_attn_tensor *t, int64_t a, int64_t b, int64_t c, int64_t d) {
    int64_t offset = a * t->stride[0] + b * t->stride[1] + c * t->stride[2] + d * t->stride[3];
    return (char *)t->data + offset * (int64_t)element_size(t->dtype);
}

static double value_at(const wan_attn_tensor *t, int64_t a, int64_t b, int64_t c, int64_t d) {
    return read_element(element(t, a, b, c, d), t->dtype);
}

static int64_t real_length(const wan_attn_tensor *lengths, int64_t sample, int64_t padded) {
    return lengths->data ? (int64_t)value_at(lengths, sample, 0, 0, 0) : padded;
}

static int sees(const wan_attn_params *p, int64_t sample, int64_t i, int64_t j) {
    int64_t len_q = real_length(&p->seqused_q, sample, p->q.shape[1]);
    int64_t len_k = real_length(&p->seqused_k, sample, p->k.shape[1]);
    int64_t distance = j - (i + len_k - len_q);
    return i < len_q && j < len_k && !(p->is_causal && distance > 0) &&
           !(p->window_size_left >= 0 && distance < -p->window_size_left) &&
           !(p->window_size_right >= 0 && distance > p->window_size_right);
}

/* Whether the list of query i's block names block n of keys. */
static int is_listed(const wan_attn_params *p, int64_t sample, int64_t head, int64_t i, int64_t n) {
    if (!p->block_counts.ndim)
        return 1;
    double count = value_at(&p->block_counts, sample, head, i / WAN_ATTN_BLOCK, 0);
    for (int64_t at = 0; at < (int64_t)count; at++)
        if (value_at(&p->block_indices, sample, head, i / WAN_ATTN_BLOCK, at) == (double)n)
            return 1;
    return 0;
}

/* Keys that count as one for row i: one key, or all of a block that is pooled. */
typedef struct key_group {
    int64_t first, count;
} key_group;

/* The next group from key j on; its count is 0 behind the last. A key that is not seen is passed. */
static key_group next_group(const wan_attn_params *p, int64_t sample, int64_t head, int64_t i,
                            int64_t j) {
    int64_t keys = real_length(&p->seqused_k, sample, p->k.shape[1]);
    key_group none = {keys, 0};
    for (; j < keys; j++) {
        key_group one = {j, 1};
        if (is_listed(p, sample, head, i, j / WAN_ATTN_BLOCK)) {
            if (sees(p, sample, i, j))
                return one;
        } else if (p->pools_others && j % WAN_ATTN_BLOCK == 0) {
            one.count = keys - j < WAN_ATTN_BLOCK ? keys - j : WAN_ATTN_BLOCK;
            int64_t seen = 0;
            for (int64_t n = j; n < j + one.count; n++)
                seen += sees(p, sample, i, n);
            if (seen == one.count)
                return one;
        }
    }
    return none;
}

static double mean_at(const wan_attn_tensor *t, int64_t sample, key_group g, int64_t head,
                      int64_t d) {
    double sum = 0.0;
    for (int64_t j = g.first; j < g.first + g.count; j++)
        sum += value_at(t, sample, j, head, d);
    return sum / (double)g.count;
}

/* out[0 .. head_dim) and the log-sum-exp of one row. scores: room for seqlen_k numbers. */
static double reference_row(const wan_attn_params *p, int64_t sample, int64_t head, int64_t i,
                            double *scores, double *out) {
    int64_t head_dim = p->q.shape[3], head_k = head / (p->q.shape[2] / p->k.shape[2]);
    double scale = p->has_softmax_scale ? p->softmax_scale : 1.0 / sqrt((double)head_dim);
    double top = -INFINITY, sum = 0.0;
    key_group g;
    for (g = next_group(p, sample, head, i, 0); g.count;
         g = next_group(p, sample, head, i, g.first + g.count)) {
        double *score = &scores[g.first];
        *score = 0.0;
        for (int64_t d = 0; d < head_dim; d++)
            *score += value_at(&p->q, sample, i, head, d) * mean_at(&p->k, sample, g, head_k, d);
        *score *= scale;
        top = fmax(top, *score);
    }
    for (int64_t d = 0; d < head_dim; d++)
        out[d] = 0.0;
    for (g = next_group(p, sample, head, i, 0); g.count;
         g = next_group(p, sample, head, i, g.first + g.count)) {
        double weight = scores[g.first] == -INFINITY ? 0.0 : exp(scores[g.first] - top);
        sum += (double)g.count * weight;
        for (int64_t d = 0; d < head_dim; d++)
            out[d] += (double)g.count * weight * mean_at(&p->v, sample, g, head_k, d);
    }
    for (int64_t d = 0; d < head_dim && sum > 0.0; d++)
        out[d] /= sum;
    return sum > 0.0 ? top + log(sum) : -INFINITY;
}

#endif /* WAN_ATTN_TESTS_REFERENCE_H */
