/* SPDX-License-Identifier: Apache-2.0
 * softmax.cuh - the online softmax of one 16-row tile of a warp, in the registers of its mma
 * accumulators (ptx/mma.cuh): element e of S tile j is row g + 8 * (e / 2), key 8j + 2t + e % 2.
 * Includer sets HEAD_DIM, BLOCK_N and P_SHIFT: weights, and with them their sums, are 2^P_SHIFT
 * times as large as the definition has them, which cancels in the quotient.
 *
 * Scores stay unscaled; the scale is part of exp2's argument, one fused multiply-add. row_max is
 * the largest score times the row's scale, rounded once: every weight of a row is relative to that
 * very number, so that its rounding cancels in the quotient.
 */
#ifndef WAN_ATTN_CUDA_TILE_SOFTMAX_H
#define WAN_ATTN_CUDA_TILE_SOFTMAX_H

#include "cuda/tile/work.cuh"

enum { S_TILES = BLOCK_N / 8, O_TILES = HEAD_DIM / 8 };

DEVICE float minus_infinity() { return float_from_bits(0xff800000u); }

/* The maximum of no scores. Finite: less it, a score of -inf weighs 0, where -inf - -inf would be
 * NaN. */
DEVICE float lowest() { return float_from_bits(0xff7fffffu); }

/* Over the four lanes that share a row; all get the result. */
DEVICE float quad_max(float x) {
    x = larger(x, shfl_xor(x, 1));
    return larger(x, shfl_xor(x, 2));
}

DEVICE float quad_sum(float x) {
    x += shfl_xor(x, 1);
    return x + shfl_xor(x, 2);
}

/* keys: what one of the lane's rows sees. first_key: the key of s[0][0]. */
DEVICE void mask_scores(float s[S_TILES][4], int r, const key_range &keys, int first_key) {
    int begin = keys.begin - first_key, end = keys.end - first_key;
#pragma unroll
    for (int j = 0; j < S_TILES; j++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (8 * j + e < begin || 8 * j + e >= end)
                s[j][2 * r + e] = minus_infinity();
}

/* The maximum of row r of this tile and of the tiles before it. */
DEVICE float grown_max(const float s[S_TILES][4], int r, float row_max, float scale) {
    float score = larger(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
    for (int j = 1; j < S_TILES; j++)
        score = larger(score, larger(s[j][2 * r], s[j][2 * r + 1]));
    return larger(row_max, quad_max(score) * scale);
}

#if SKIPS /* lost.cuh; of m tile m */
DEVICE void shrink_lost(int m, int r, float factor);
#endif

/* Scores become weights; o and row_sum are brought to the new maximum. scale: of scores in base 2,
 * for each of the lane's two rows. A row that has still seen no key keeps its maximum, `lowest`.
 * m: the m tile; has_lost: there is a skip_threshold. */
DEVICE void softmax_tile(float s[S_TILES][4], float o[O_TILES][4], float row_max[2],
                         float row_sum[2], const float scale[2], [[maybe_unused]] int m,
                         [[maybe_unused]] bool has_lost) {
    const float new_max[2] = {grown_max(s, 0, row_max[0], scale[0]),
                              grown_max(s, 1, row_max[1], scale[1])};
    /* Almost never after the first tiles. Skipping is exact: the factor would be 1. */
    if (any_lane(new_max[0] > row_max[0] || new_max[1] > row_max[1])) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float factor = exp2_approx(row_max[r] - new_max[r]);
            row_max[r] = new_max[r];
            row_sum[r] *= factor;
#pragma unroll
            for (int j = 0; j < O_TILES; j++) {
                o[j][2 * r] *= factor;
                o[j][2 * r + 1] *= factor;
            }
#if SKIPS
            if (has_lost)
                shrink_lost(m, r, factor);
#endif
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float shift = P_SHIFT - new_max[r], sum = 0.0f;
#pragma unroll
        for (int j = 0; j < S_TILES; j++) {
            float *weight = &s[j][2 * r];
            weight[0] = exp2_approx(fused_multiply_add(weight[0], scale[r], shift));
            weight[1] = exp2_approx(fused_multiply_add(weight[1], scale[r], shift));
            sum = j == 0 ? weight[0] + weight[1] : sum + (weight[0] + weight[1]);
        }
        row_sum[r] += sum; /* of one tile at a time: rounding grows with the tiles, not the keys */
    }
}

#endif /* WAN_ATTN_CUDA_TILE_SOFTMAX_H */
