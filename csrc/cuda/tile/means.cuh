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

enum { GROUP_MEANS = GROUP_TILES / BLOCK_N }; /* tiles of means for which a warp has bits */

/* The blocks of which a row with these keys sees every real one. */
DEVICE key_range whole_blocks(const key_range &keys, int num_keys) {
    key_range blocks;
    blocks.begin = blocks_of(larger_int(keys.begin, 0));
    blocks.end = keys.end == num_keys ? blocks_of(num_keys) : keys.end / BLOCK_N;
    return blocks;
}

/* Turns the sources of K and V to tile m of the means. */
DEVICE void find_means(tile_source &k, tile_source &v, const wan_attn_cuda_args &args,
                       const block_place &place, int m) {
    const wan_attn_cuda_listed_args &listed = listed_of(args);
    i64 head = (i64)place.sample * (args.num_heads_q / args.heads_per_key_head) +
               place.head / args.heads_per_key_head;
    i64 at = head * blocks_of(args.seqlen_k) * ROW_BYTES;
    k = source_of((const char *)listed.pooled_k + at, HEAD_DIM, m * BLOCK_N);
    v = source_of((const char *)listed.pooled_v + at, HEAD_DIM, m * BLOCK_N);
}

/* Which of the 64 blocks of tile m are listed, for this lane: bit 8 j + e of the words is that of
 * its column e in S tile j. */
DEVICE void find_listed(u32 listed[2], const tile_walk &walk, int m) {
    int lane = thread_index() % 32;
#pragma unroll
    for (int i = 0; i < 2; i++)
        listed[i] = shfl_xor_bits(walk.own, lane ^ (2 * m + i & 31)) >> (2 * lane & 6);
}

/* Scores of row r become those of as many keys in base 2; what does not count is -inf. */
DEVICE void score_means(float s[S_TILES][4], int r, float scale, const key_range &keys,
                        const tile_walk &walk, int num_keys, int m) {
    u32 listed[2];
    find_listed(listed, walk, m);
    int last = blocks_of(num_keys) - 1, first = m * BLOCK_N + thread_index() % 4 * 2;
    key_range blocks = whole_blocks(keys, num_keys);
    const float all = 6.0f; /* log2 of BLOCK_N */
    float of_last = natural_log((float)(num_keys - last * BLOCK_N)) * 1.44269504f;
#pragma unroll
    for (int j = 0; j < S_TILES; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int n = first + 8 * j + e;
            float score =
                fused_multiply_add(s[j][2 * r + e], scale, n == last ? of_last : all);
            bool counts = n >= blocks.begin && n < blocks.end &&
                          (listed[j / 4] >> (8 * (j % 4) + e) & 1) == 0;
            s[j][2 * r + e] = counts ? score : minus_infinity();
        }
}

/* For a row that sees no listed key: whether there is another block for it. Counts,
 * because indices rise. */
DEVICE bool sees_means(const wan_attn_cuda_args &args, const block_place &place, int row,
                       int used_q) {
    const wan_attn_cuda_lists &lists = listed_of(args).lists;
    int used_k = length_at(args.seqused_k, place.sample, args.seqlen_k);
    key_range blocks =
        whole_blocks(visible_keys(args, row + used_k - used_q, used_k), used_k);
    block_list list = find_list(lists, place, row / WAN_ATTN_CUDA_LIST_BLOCK);
    int others = blocks.end - blocks.begin;
    for (int i = 0; i < list.count; i++) {
        int n = load_global_i32(list.at + i * lists.index_stride);
        others -= n >= blocks.begin && n < blocks.end ? 1 : 0;
    }
    return others > 0;
}

/* Weights that add up to nothing: those of no key, or of keys whose scores all are -inf. The list
 * tells which; few rows ask. */
DEVICE bool sees_walk(const wan_attn_cuda_args &args, const block_place &place, int row, int used_q,
                      float row_sum) {
    const wan_attn_cuda_lists &lists = listed_of(args).lists;
    if (row_sum != 0.0f || !lists.counts || row >= used_q)
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
    return sees || (listed_of(args).pooled_k && sees_means(args, place, row, used_q));
}

#endif /* WAN_ATTN_CUDA_TILE_MEANS_H */
