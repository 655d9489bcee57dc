/* SPDX-License-Identifier: Apache-2.0
 * work.cuh - what one block has to do: its query rows, their lengths, and the key tiles that any of
 * them sees. All of the mask is here; it knows no kernel's registers.
 *
 *                 tile 0          clean_begin          clean_end       num_tiles
 *   first row  ...|###############|####################|######.........|....   # seen by the row
 *              ...|....###########|####################|##########.....|....   . not seen
 *   last row   ...|........#######|####################|#############..|....
 *           first_key    masked       no mask needed     masked: diagonal or end of the keys
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

/* What it needs for that. Keys count from the first one of tile 0, to which first_key is added. */
typedef struct block_work {
    int used_q;                 /* the sample's real rows */
    int first_key, num_tiles;   /* num_tiles <= 0: nothing to do */
    int clean_begin, clean_end; /* tiles that every real row sees whole */
    int num_keys;               /* real keys from first_key on */
    int diagonal;               /* the key that the block's first row is aligned with */
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

/* What a row sees that is aligned with the key `diagonal`, if there are num_keys. */
DEVICE key_range visible_keys(const wan_attn_cuda_args &args, int diagonal, int num_keys) {
    key_range keys;
    keys.begin = diagonal - args.window_size_left;
    keys.end = smaller_int(diagonal + args.window_size_right + 1, num_keys);
    return keys;
}

/* Whether there is such a row and it sees any key of this part. */
DEVICE bool sees_keys(const wan_attn_cuda_args &args, const block_place &place, int row, int used_q,
                      int block_n) {
    int used_k = length_at(args.seqused_k, place.sample, args.seqlen_k);
    int first = place.split * args.split_tiles * block_n;
    key_range keys = visible_keys(args, row + used_k - used_q, used_k);
    return row < used_q && larger_int(larger_int(keys.begin, 0), first) <
                               smaller_int(keys.end, first + args.split_tiles * block_n);
}

DEVICE int used_rows(const wan_attn_cuda_args &args, const block_place &place) {
    return length_at(args.seqused_q, place.sample, args.seqlen_q);
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
    if (args.window_size_right < args.seqlen_k)
        m_block = args.m_blocks - 1 - m_block;
    place.row_begin = m_block * block_m;
    return place;
}

DEVICE block_work find_work(const wan_attn_cuda_args &args, const block_place &place, int block_m,
                            int block_n) {
    block_work work;
    work.used_q = used_rows(args, place);
    int used_k = length_at(args.seqused_k, place.sample, args.seqlen_k);

    /* The last real row is aligned with the last real key. Both ends of a row's keys move on with
     * the row, so that the block's first and last row bound them all. */
    int shift = used_k - work.used_q;
    int last_row = smaller_int(place.row_begin + block_m, work.used_q) - 1;
    key_range top = visible_keys(args, place.row_begin + shift, used_k);
    key_range bottom = visible_keys(args, last_row + shift, used_k);

    int first = place.split * args.split_tiles, end = first + args.split_tiles;
    first = larger_int(larger_int(top.begin, 0) / block_n, first);
    end = smaller_int((bottom.end + block_n - 1) / block_n, end);
    if (place.row_begin >= work.used_q || bottom.end <= larger_int(top.begin, 0))
        end = first;
    int clean_begin = (larger_int(bottom.begin, 0) + block_n - 1) / block_n;
    int clean_end = larger_int(top.end, 0) / block_n;
    work.first_key = uniform(first * block_n);
    work.num_tiles = uniform(end - first);
    work.clean_begin = uniform(larger_int(clean_begin - first, 0));
    work.clean_end = uniform(clean_end - first);
    work.num_keys = uniform(used_k - work.first_key);
    work.diagonal = uniform(place.row_begin + shift - work.first_key);
    return work;
}

#endif /* WAN_ATTN_CUDA_TILE_WORK_H */
