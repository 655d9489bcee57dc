/* SPDX-License-Identifier: Apache-2.0
 * backward_work.cuh - what one block of a gradient has to do: its own keys (of dq: query rows) and
 * the tiles of query rows (keys) that any of them meets. All of the mask is here; it knows no
 * kernel's registers. Includer sets OF_KEYS, BLOCK_M, BLOCK_N.
 *
 * Row i sees key j where i + d - left <= j <= i + d + right, d being what keys are more than rows.
 * Read the other way round, key j is seen by row i where j - d - right <= i <= j - d + left. So one
 * text serves both gradients: its own are either, the others are the other, and left and right
 * change places.
 *
 * Tiles are counted from the first other that is met, wherever that is, and end with the last one.
 * What nobody of the block meets is not read, not even to be multiplied by 0: it may hold NaN.
 */
#ifndef WAN_ATTN_CUDA_TILE_BACKWARD_WORK_H
#define WAN_ATTN_CUDA_TILE_BACKWARD_WORK_H

#include "cuda/args_backward.h"
#include "cuda/tile/row_keys.cuh"
#include "cuda/tile/work.cuh"

/* Which part of the gradient a block makes. */
typedef struct own_place {
    int sample, head; /* a key head (of dq: a query head) */
    int begin;        /* the first of its own; there may be fewer than BLOCK_M */
} own_place;

/* Others count from `first` on. */
typedef struct own_work {
    int used_q, used_k;         /* the sample's real lengths */
    int first, num_others;      /* that any of its own meets */
    int num_tiles;              /* <= 0: nothing to do */
    int clean_begin, clean_end; /* tiles that each real one of its own meets whole */
    int diagonal;               /* the other that the block's first is aligned with */
} own_work;

DEVICE int reach_back(const wan_attn_cuda_backward_args &args) {
    return OF_KEYS ? args.window_size_right : args.window_size_left;
}

DEVICE int reach_ahead(const wan_attn_cuda_backward_args &args) {
    return OF_KEYS ? args.window_size_left : args.window_size_right;
}

/* Blocks run over [batch][head][block]. Those with most work go first: under a mask that ends at
 * the diagonal the first keys are met by most rows, and the last rows meet most keys. */
DEVICE own_place find_own(const wan_attn_cuda_backward_args &args) {
    own_place place;
    int heads = OF_KEYS ? args.num_heads_q / args.heads_per_key_head : args.num_heads_q;
    u32 number = (u32)block_index();
    int block = (int)(number % (u32)args.blocks);
    number /= (u32)args.blocks;
    place.head = (int)(number % (u32)heads);
    place.sample = (int)(number / (u32)heads);
    if (!OF_KEYS && args.window_size_right < args.seqlen_k)
        block = args.blocks - 1 - block;
    place.begin = block * BLOCK_M;
    return place;
}

DEVICE own_work find_own_work(const wan_attn_cuda_backward_args &args, const own_place &place) {
    own_work work;
    work.used_q = length_at(args.seqused_q, place.sample, args.seqlen_q);
    work.used_k = length_at(args.seqused_k, place.sample, args.seqlen_k);
    int used = OF_KEYS ? work.used_k : work.used_q, others = OF_KEYS ? work.used_q : work.used_k;
    int back = reach_back(args), ahead = reach_ahead(args);

    /* Both ends of what one meets move on with it: the block's first and last bound them all. */
    int top = place.begin + others - used;
    int bottom = smaller_int(place.begin + BLOCK_M, used) - 1 + others - used;
    int first = larger_int(top - back, 0), end = smaller_int(bottom + ahead + 1, others);
    if (place.begin >= used)
        end = first;
    int clean_begin = larger_int(bottom - back, 0) - first;
    int clean_end = smaller_int(top + ahead + 1, others) - first;
    work.first = first;
    work.num_others = end - first;
    work.num_tiles = (end - first + BLOCK_N - 1) / BLOCK_N;
    if (OF_KEYS && bottom == top) /* a row with this key alone is a case for masked tiles */
        clean_end = 0;
    work.clean_begin = (clean_begin + BLOCK_N - 1) / BLOCK_N;
    work.clean_end = larger_int(clean_end, 0) / BLOCK_N;
    work.diagonal = top - first;
    return work;
}

/* It waits in shared memory. In registers it would be eight for the whole of the main loop, which
 * has none to spare, and only masked tiles and the first of a head look at it. */
DEVICE void store_work(u32 at, const own_work &work) {
    const u32 words[8] = {(u32)work.used_q,     (u32)work.used_k,    (u32)work.first,
                          (u32)work.num_others, (u32)work.num_tiles, (u32)work.clean_begin,
                          (u32)work.clean_end,  (u32)work.diagonal};
    if (thread_index() == 0) {
        store_shared_b32x4(at, words);
        store_shared_b32x4(at + 16, words + 4);
    }
}

DEVICE own_work load_work(u32 at) {
    u32 words[8];
    load_shared_b32x4(words, at);
    load_shared_b32x4(words + 4, at + 16);
    return {(int)words[0], (int)words[1], (int)words[2], (int)words[3],
            (int)words[4], (int)words[5], (int)words[6], (int)words[7]};
}

/* The others that one of its own meets, `row` of the block, counted from the first of tile n. */
DEVICE key_range met_by(const wan_attn_cuda_backward_args &args, const own_work &work, int row,
                        int n) {
    int at = work.diagonal + row;
    key_range met;
    met.begin = at - reach_back(args) - n * BLOCK_N;
    met.end = smaller_int(at + reach_ahead(args) + 1, work.num_others) - n * BLOCK_N;
    return met;
}

/* Whether one of its own, counted from the head's first, is real and meets any other. */
DEVICE bool meets_others(const wan_attn_cuda_backward_args &args, int row, int used_q, int used_k) {
    int used = OF_KEYS ? used_k : used_q, others = OF_KEYS ? used_q : used_k;
    return row < used && count_keys(row, used, others, reach_back(args), reach_ahead(args)) > 0;
}

#endif /* WAN_ATTN_CUDA_TILE_BACKWARD_WORK_H */
