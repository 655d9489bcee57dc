/* SPDX-License-Identifier: Apache-2.0
 * work.cuh - what one block has to do: its query rows, their lengths, and the key tiles that any of
 * them sees. All of the mask is here; it knows no kernel's registers.
 *
 *              keys   first_tile    clean_begin    clean_end   end_tile
 *   row_begin  ........|##########|########################|######.....|....   # seen by the row
 *              .........|#########|########################|########...|....   . not seen
 *   row_end    ..........|########|########################|##########.|....
 *                      masked        no mask needed          masked: diagonal or end of the keys
 */
#ifndef WAN_ATTN_CUDA_TILE_WORK_H
#define WAN_ATTN_CUDA_TILE_WORK_H

#include "cuda/args.h"
#include "cuda/ptx/ptx.cuh"

typedef struct key_range {
    int begin, end; /* begin >= end: none */
} key_range;

/* Which part of the output a block makes. */
typedef struct block_place {
    int sample, head, split;
    int row_begin; /* the block's first row; there may be fewer than BLOCK_M behind it */
} block_place;

/* What it needs for that. */
typedef struct block_work {
    int row_begin;
    int used_q, used_k;         /* the sample's real lengths */
    int first_tile, end_tile;   /* key tiles with work, empty if first_tile >= end_tile */
    int clean_begin, clean_end; /* among them, those that every real row sees whole */
} block_work;

DEVICE int smaller_int(int x, int y) { return x < y ? x : y; }
DEVICE int larger_int(int x, int y) { return x > y ? x : y; }

DEVICE int length_at(const wan_attn_cuda_lengths &lengths, int sample, int padded) {
    if (!lengths.data)
        return padded;
    i64 n;
    if (lengths.is_i64)
        n = load_global_i64((const i64 *)lengths.data + sample * lengths.stride);
    else
        n = load_global_i32((const int *)lengths.data + sample * lengths.stride);
    return n < 0 ? 0 : n < padded ? (int)n : padded;
}

/* The keys that one row sees; the last real row's diagonal ends in the last real key. */
DEVICE key_range visible_keys(const wan_attn_cuda_args &args, const block_work &work, int row) {
    key_range keys = {0, 0};
    if (row >= work.used_q)
        return keys;
    int diagonal = row + work.used_k - work.used_q;
    keys.begin = larger_int(diagonal - args.window_left, 0);
    keys.end = smaller_int(diagonal + args.window_right + 1, work.used_k);
    return keys;
}

/* Block numbers run over [batch][head][split][m_block]: blocks that run at the same time share a
 * head's keys in L2. Under a mask that ends at the diagonal the last rows have most work and go
 * first. Cheap to find again: not worth registers all through the main loop. */
DEVICE block_place find_place(const wan_attn_cuda_args &args, int block_m) {
    block_place place;
    u32 number = (u32)block_index();
    int m_block = (int)(number % (u32)args.m_blocks);
    number /= (u32)args.m_blocks;
    place.split = (int)(number % (u32)args.num_splits);
    number /= (u32)args.num_splits;
    place.head = (int)(number % (u32)args.num_heads_q);
    place.sample = (int)(number / (u32)args.num_heads_q);
    if (args.window_right < args.seqlen_k)
        m_block = args.m_blocks - 1 - m_block;
    place.row_begin = m_block * block_m;
    return place;
}

DEVICE block_work find_work(const wan_attn_cuda_args &args, const block_place &place, int block_m,
                            int block_n) {
    block_work work;
    work.row_begin = uniform(place.row_begin);
    work.used_q = uniform(length_at(args.seqused_q, place.sample, args.seqlen_q));
    work.used_k = uniform(length_at(args.seqused_k, place.sample, args.seqlen_k));

    /* Both ends of a row's range grow with the row: first and last row bound them all. */
    int row_last = smaller_int(work.row_begin + block_m, work.used_q) - 1;
    key_range top = visible_keys(args, work, work.row_begin);
    key_range bottom = visible_keys(args, work, row_last);
    int first = place.split * args.split_tiles, end = first + args.split_tiles;
    first = larger_int(top.begin / block_n, first);
    end = smaller_int((bottom.end + block_n - 1) / block_n, end);
    if (work.row_begin >= work.used_q || bottom.end <= top.begin)
        end = first;
    work.first_tile = uniform(first);
    work.end_tile = uniform(end);
    work.clean_begin = uniform((bottom.begin + block_n - 1) / block_n);
    work.clean_end = uniform(larger_int(top.end, 0) / block_n);
    return work;
}

#endif /* WAN_ATTN_CUDA_TILE_WORK_H */
