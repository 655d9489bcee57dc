/* SPDX-License-Identifier: Apache-2.0
 * means.cuh - blocks of keys that are not listed, each as one key (pools_others): the mean of its
 * keys and values, whose weight counts as often as it has keys. Such means are tiles of 64 like
 * keys, and follow the listed tiles; pool.cuh has made them. Includer has walk_listed.cuh and
 * softmax.cuh.
 */
#ifndef WAN_ATTN_CUDA_TILE_MEANS_H
#define WAN_ATTN_CUDA_TILE_MEANS_H

#include "cuda/tile/softmax.cuh"
#include "cuda/tile/walk_listed.cuh"

enum { GROUP_MEANS = 1024 / BLOCK_N }; /* tiles of means for which a warp has bits, 32 a lane */

/* The blocks of which a row with these keys sees every real one. */
DEVICE key_range whole_blocks(const key_range &keys, int num_keys) {
    key_range blocks;
    blocks.begin = blocks_of(larger_int(keys.begin, 0));
    blocks.end = keys.end == num_keys ? blocks_of(num_keys) : keys.end / BLOCK_N;
    return blocks;
}

/* The blocks that count for any row of this block of rows, were none listed. The others' means of
 * V are not read: a NaN there must not reach rows that see nothing of it. diagonal: the first
 * row's. */
DEVICE key_range seen_means(const wan_attn_cuda_args &args, int num_keys, int diagonal) {
    key_range top = visible_keys(args, diagonal, num_keys);
    key_range bottom = visible_keys(args, diagonal + BLOCK_M - 1, num_keys);
    return {whole_blocks(top, num_keys).begin, whole_blocks(bottom, num_keys).end};
}

/* Turns the sources of K and V to tile m of the means. */
DEVICE void find_means(tile_source &k, tile_source &v, const wan_attn_cuda_args &args,
                       const block_place &place, int m) {
    const wan_attn_cuda_listed_args &listed = listed_of(args);
    i64 head = (i64)place.sample * (args.num_heads_q / args.heads_per_key_head) +
               place.head / args.heads_per_key_head;
    i64 at = head * blocks_of(args.seqlen_k) * ROW_BYTES;
    i64 row = m * BLOCK_N + BLOCK_N - ROWS_PER_PASS + thread_index_again() / GROUP;
    at += row * ROW_BYTES + thread_index_again() % GROUP * 16;
    k.from = (const char *)listed.pooled_k + at;
    v.from = (const char *)listed.pooled_v + at;
    k.pass_bytes = v.pass_bytes = ROWS_PER_PASS * ROW_BYTES;
}

/* What many equal keys add to their score, in base 2. */
#define LOG2_OF_BLOCK 6.0f
static_assert(BLOCK_N == 64, "two to the LOG2_OF_BLOCK");

/* Scores of row r in tile m become those of as many keys, in base 2; what does not count is -inf.
 * own: what find_bits<32>() has found for n's group. scale: of the row's scores in base 2. n: the
 * tile of means. */
DEVICE void score_means(const wan_attn_cuda_args &args, float s[S_TILES][4], int m, int r,
                        float scale, u32 own, int num_keys, int diagonal, int n) {
    int lane = thread_index_again() % 32;
    int row = (thread_index_again() / 32 * (BLOCK_M / NUM_WARPS)) + 16 * m + lane / 4 + 8 * r;
    key_range blocks = whole_blocks(visible_keys(args, diagonal + row, num_keys), num_keys);
    int first = n * BLOCK_N + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        /* Bit 8 j + e: of column e in S tile j of this half. */
        int begin = first + 32 * half;
        u32 listed = shfl_xor_bits(own, lane ^ ((2 * n + half) & 31)) >> (lane % 4 * 2);
        u32 counts = bits_between(blocks.begin - begin, blocks.end - begin) & ~listed;
#pragma unroll
        for (int j = 0; j < S_TILES / 2; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float *score = &s[half * (S_TILES / 2) + j][2 * r + e];
                *score = counts >> (8 * j + e) & 1
                             ? fused_multiply_add(*score, scale, LOG2_OF_BLOCK)
                             : minus_infinity();
            }
    }
}

/* The last block may have fewer keys: in an m tile's scores of the last tile of means. */
DEVICE void score_last_mean(float s[S_TILES][4], int num_keys) {
    int last = blocks_of(num_keys) - 1;
    int at = last % BLOCK_N - thread_index_again() % 4 * 2; /* of the lane's columns 8 j + e */
    float less = natural_log((float)(num_keys - last * BLOCK_N)) * 1.44269504f - LOG2_OF_BLOCK;
#pragma unroll
    for (int i = 0; i < S_TILES * 4; i++)
        s[i / 4][i % 4] += i / 4 * 8 + i % 2 == at ? less : 0.0f;
}

/* For a row that sees no listed key: whether there is another block for it. Counts what is listed,
 * so that an index which a broken list repeats counts twice. */
DEVICE bool sees_means(const wan_attn_cuda_args &args, const block_place &place, int row,
                       int used_q) {
    const wan_attn_cuda_lists &lists = listed_of(args).lists;
    int used_k = length_at(args.seqused_k, place.sample, args.seqlen_k);
    key_range blocks = whole_blocks(visible_keys(args, row + used_k - used_q, used_k), used_k);
    block_list list = find_list(lists, place, row / WAN_ATTN_CUDA_LIST_BLOCK);
    int others = blocks.end - blocks.begin;
    for (int i = 0; i < list.count; i++) {
        int n = load_global_i32(list.at + i * lists.index_stride);
        others -= n >= blocks.begin && n < blocks.end ? 1 : 0;
    }
    return others > 0;
}

/* Weights that add up to nothing: those of no key, or of keys whose scores all are -inf. Or to NaN,
 * which a hidden key is as well where the row's factor is NaN (8-bit scores). The list tells which;
 * few rows ask. */
DEVICE bool sees_walk(const wan_attn_cuda_args &args, const block_place &place, int row, int used_q,
                      float row_sum) {
    const wan_attn_cuda_lists &lists = listed_of(args).lists;
    if (row_sum > 0.0f || row >= used_q || !lists.counts)
        return true;
    int used_k = length_at(args.seqused_k, place.sample, args.seqlen_k);
    key_range keys = visible_keys(args, row + used_k - used_q, used_k);
    block_list list = find_list(lists, place, row / WAN_ATTN_CUDA_LIST_BLOCK);
    int begin = larger_int(keys.begin, 0) / BLOCK_N, end = (keys.end + BLOCK_N - 1) / BLOCK_N;
    bool sees = false;
    for (int i = 0; i < list.count && !sees; i++) {
        int n = load_global_i32(list.at + i * lists.index_stride);
        sees = n >= begin && n < end;
    }
    return sees || (POOLS && listed_of(args).pooled_k && sees_means(args, place, row, used_q));
}

#endif /* WAN_ATTN_CUDA_TILE_MEANS_H */
