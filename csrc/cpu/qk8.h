/* SPDX-License-Identifier: Apache-2.0
 * qk8.h - q and k in INT8: what every row of 8-bit scores computes of them, bit by bit. Knows no
 * row and no instruction set.
 *
 *   score[i,j] = softmax_scale * <q[i], k[j] - mean> + softmax_scale * <q[i], mean>
 *
 * The second term is the same for all keys of a row, so softmax does not see it; lse does. The
 * first is what INT8 stands for: a rotation R spreads what lies in few channels over all of them
 * and changes no product, <R q, R k> = <q, k>; then each row has a scale of its own.
 *
 *   mean     over the real keys of a sample and head, masked ones included: block sums of 64 keys,
 *            one after the other in float32, which are added in float64; the quotient by the number
 *            of keys, in float32. Numbers that are infinite or NaN count as 0, and so does a
 *            quotient that is.
 *   rotated  x[d] (a key: x[d] - mean[d] in float32), negated where SIGNS has a bit, followed by
 *            zeros up to `depth`, the next power of two; then for half = 1, 2, 4 to depth / 2, each
 *            pair (a, b) that lies half apart becomes (a + b, a - b), in float32. This is a
 *            rotation, times sqrt(depth).
 *   INT8     rint(rotated * (127 / largest)), of the largest magnitude in the row: quotient and
 *            product in float32, halves to even. One of it is worth largest / 127, the row's step.
 *
 * A row whose largest is below 2^-100 becomes zeros with step 0. One that has an infinity or a NaN
 * becomes zeros with step NaN, so that whoever sees it is NaN.
 */
#ifndef WAN_ATTN_CPU_QK8_H
#define WAN_ATTN_CPU_QK8_H

#include "core/util.h"

enum { WAN_ATTN_QK8_MAX_DEPTH = 256, WAN_ATTN_QK8_BLOCK = 64 };

/* The power of two that head_dim is filled up to. */
int64_t wan_attn_qk8_depth(int64_t head_dim);

/* sums[head_dim]: of keys [first, first + count) of a head, count <= WAN_ATTN_QK8_BLOCK. */
void wan_attn_qk8_sum_keys(const wan_attn_problem *p, int64_t b, int64_t head_k, int64_t first,
                           int64_t count, float *sums);

/* mean[head_dim] of `keys` keys, from the sums [blocks][head_dim] of all their blocks. */
void wan_attn_qk8_find_mean(const float *sums, int64_t keys, int64_t head_dim, float *mean);

/* x[head_dim] -> to[depth]; returns the row's step. x becomes what was rotated, and has room for
 * depth numbers. */
float wan_attn_qk8_quantise(float *x, int64_t head_dim, int8_t *to);

/* Parts of it, for rows that have the rest in vectors. Bit d: channel first + d is negated; for
 * multiples of 8, and d < 8. */
uint32_t wan_attn_qk8_signs(int64_t first);

/* What the numbers of a row are multiplied by, whose largest magnitude has these bits, and the
 * row's step. 0: they all become 0. */
float wan_attn_qk8_inverse(uint32_t top, float *step);

/* What a product of integers of a query row with this step is multiplied by, beside the key's step,
 * in the exponent of e. */
static inline float wan_attn_qk8_factor(const wan_attn_problem *p, float q_step, int64_t depth) {
    double scale = p->softmax_scale < 0 ? -p->softmax_scale : p->softmax_scale;
    double factor = (double)q_step * scale / (double)depth;
    return factor > 0x1p127 ? 0x1p127f : (float)factor; /* finite, or 0 times it would be NaN */
}

#endif /* WAN_ATTN_CPU_QK8_H */
