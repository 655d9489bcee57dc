/* SPDX-License-Identifier: Apache-2.0
 * lost.cuh - a skip_threshold: which tiles a warp leaves out, and what share of its weights a row
 * lacks at most. The same certificate as cpu/lost.h. Includer has LOST_SMEM, where what rows have
 * lost begins in shared memory; score_scales() and what softmax.cuh and walk_listed.cuh want.
 *
 * A warp decides for its own rows, after Q K^T, by the maxima so far: no warp waits for another.
 * Weights of a tile that is left out are summed all the same, beside row_sum and in its unit; what
 * is saved is P V. `lost` is touched when a tile is left out or a maximum grows, so it waits in
 * shared memory, where WIDE tiles have the last room for it: 16 bytes of the first of four lanes
 * that share rows.
 */
#ifndef WAN_ATTN_CUDA_TILE_LOST_H
#define WAN_ATTN_CUDA_TILE_LOST_H

#include "cuda/tile/softmax.cuh"
#include "cuda/tile/walk_listed.cuh"

static_assert(M_TILES <= 2, "a lane's rows are four numbers at most");
static_assert(NUM_THREADS / 4 * 16 == WAN_ATTN_CUDA_SMEM_LOST(NUM_WARPS), "lost_at()");

/* What weights below float32's normal numbers, which count as 0, may add up to in a row. */
#define LOST_AT_LEAST 0x1p-100f
/* The rounding of scores and weights; of sums, which take a few for each block of keys. */
#define LOST_ROUNDING 1.001f
#define LOST_ROUNDING_OF_BLOCK 0x1p-21f

DEVICE bool skips(const wan_attn_cuda_args &args) { return listed_of(args).nonfinite != 0; }

/* The first of a head's blocks of keys, among those of all heads: the workspace has as many. */
DEVICE u32 first_block_of(const wan_attn_cuda_args &args, const block_place &place) {
    u32 heads = (u32)(args.num_heads_q / args.heads_per_key_head);
    u32 head = (u32)place.sample * heads + (u32)(place.head / args.heads_per_key_head);
    return head * (u32)blocks_of(args.seqlen_k);
}

/* Whether this lane keeps what its rows have lost. */
DEVICE bool keeps_lost() { return thread_index_again() % 4 == 0; }
DEVICE u32 lost_at() { return shared_base() + LOST_SMEM + (u32)(thread_index_again() / 4) * 16; }

/* 0 for the other lanes. */
DEVICE void load_lost(float lost[M_TILES][2]) {
    u32 words[4];
    load_shared_b32x4_or_zero(words, lost_at(), !keeps_lost());
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++)
        lost[i / 2][i % 2] = float_from_bits(words[i]);
}

DEVICE void store_lost(const float lost[M_TILES][2]) {
    u32 words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++)
        words[i] = bits_from_float(lost[i / 2][i % 2]);
    if (keeps_lost())
        store_shared_b32x4(lost_at(), words);
}

/* Nothing is lost yet. Rows that are not there must not keep a tile from being left out: with this
 * maximum nothing weighs anything. */
DEVICE void begin_lost(float row_max[M_TILES][2], int rows) {
    const float none[M_TILES][2] = {};
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++)
        if (row_in_block(i / 2) + i % 2 * 8 >= rows)
            row_max[i / 2][i % 2] = -lowest();
    store_lost(none);
}

/* The maximum of row r of m tile m has risen: what came before is worth `factor` of it. All lanes
 * must call. */
DEVICE void shrink_lost(int m, int r, float factor) {
    float lost[M_TILES][2];
    load_lost(lost);
    float smaller = lost[m][r] * factor + LOST_AT_LEAST;
    lost[m][r] = lost[m][r] > 0.0f ? smaller : 0.0f;
    store_lost(lost);
}

/* Whether a weight of these scores may reach the threshold, for this lane's part of a row. */
DEVICE bool is_large(const float s[S_TILES][4], int r, float scale, float row_max,
                     float log2_threshold) {
    float score = larger(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
    for (int j = 1; j < S_TILES; j++)
        score = larger(score, larger(s[j][2 * r], s[j][2 * r + 1]));
    return !(fused_multiply_add(score, scale, -row_max) < log2_threshold);
}

/* Whether no row of the warp needs the tile; then what they lack has been counted. block: of keys,
 * among those of all heads. */
DEVICE bool leave_out(const wan_attn_cuda_args &args, i64 block, const q_fragments &q,
                      const float s[M_TILES][S_TILES][4], const float row_max[M_TILES][2]) {
    bool is_needed = load_global_i32(listed_of(args).nonfinite + block) != 0;
    float scale[M_TILES][2];
    score_scales(scale, args, q);
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++)
        is_needed |= is_large(s[i / 2], i % 2, scale[i / 2][i % 2], row_max[i / 2][i % 2],
                              listed_of(args).log2_threshold);
    if (any_lane(is_needed))
        return false;
    float weights[M_TILES][2], lost[M_TILES][2];
    float all = 0.0f; /* finite, if every score is */
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++) {
        float shift = P_SHIFT - row_max[i / 2][i % 2], sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 2 * S_TILES; j++) {
            float score = s[i / 2][j / 2][i % 2 * 2 + j % 2];
            sum += exp2_approx(fused_multiply_add(score, scale[i / 2][i % 2], shift));
            all += score;
        }
        weights[i / 2][i % 2] = quad_sum(sum);
    }
    if (any_lane(!(all < -minus_infinity() && all > minus_infinity())))
        return false;
    load_lost(lost);
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++)
        lost[i / 2][i % 2] += weights[i / 2][i % 2] + LOST_AT_LEAST;
    store_lost(lost);
    return true;
}

/* Tells the guard of the rows' largest share, if it wants to know. rows: those of the block that
 * are there. */
DEVICE void tell_lost(const wan_attn_cuda_args &args, const float row_sum[M_TILES][2], int rows) {
    unsigned *to = listed_of(args).lost_mass;
    if (!to)
        return;
    float lost[M_TILES][2], largest = 0.0f;
    float rounding = LOST_ROUNDING + (float)blocks_of(args.seqlen_k) * LOST_ROUNDING_OF_BLOCK;
    load_lost(lost);
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++) {
        float of_row = lost[i / 2][i % 2], sum = quad_sum(row_sum[i / 2][i % 2]) + of_row;
        float share = of_row * rounding * reciprocal(sum) + LOST_AT_LEAST;
        share = share < 1.0f ? share : 1.0f; /* NaN, too */
        if (of_row > 0.0f && row_in_block(i / 2) + i % 2 * 8 < rows)
            largest = larger(largest, share);
    }
    int bits = largest_of_warp((int)bits_from_float(largest));
    if (bits && thread_index_again() % 32 == 0)
        raise_global_u32(to, (u32)bits);
}

#endif /* WAN_ATTN_CUDA_TILE_LOST_H */
