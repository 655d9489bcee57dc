/* SPDX-License-Identifier: Apache-2.0
 * walk_listed.cuh - the order in which a block's tiles are computed, for calls with lists of blocks
 * (args_lists.h): what a list of one of its blocks of queries names, from the last to the first.
 * The same names as walk_all.cuh. Includer sets BLOCK_M, BLOCK_N, NUM_WARPS, STAGES.
 *
 * A list becomes a set of bits, of which each lane holds 32 (with two lists 16, and groups are half
 * as large):
 *
 *     tiles of a group    0 .. 31     32 .. 63    ...    992 .. 1023
 *     of lane             0           1                  31
 *
 * so that the next tile is found without memory or other warps: bfind in each lane, redux over
 * all. Groups of 1,024 tiles follow each other (65,536 keys); for each the list is read anew. Every
 * warp does this for itself, with the same result. Indices may come in any order; one that is no
 * tile of this block's work is passed over. So no list, however broken, reads beyond K or hangs.
 *
 * A block of 128 rows has two blocks of queries. It walks along what either lists, and warps whose
 * own block does not list a tile only help to copy it.
 */
#ifndef WAN_ATTN_CUDA_TILE_WALK_LISTED_H
#define WAN_ATTN_CUDA_TILE_WALK_LISTED_H

#include "cuda/args_lists.h"
#include "cuda/tile/swizzle.cuh"
#include "cuda/tile/work.cuh"

enum {
    LISTS = BLOCK_M / WAN_ATTN_CUDA_LIST_BLOCK,
    LANE_TILES = 32 / LISTS, /* of a group; with two lists a lane has two bits for each */
    GROUP_TILES = 32 * LANE_TILES
};
static_assert(LISTS == 1 || LISTS == 2, "a lane's bits are one word");
static_assert(BLOCK_N == WAN_ATTN_CUDA_LIST_BLOCK, "a tile is a block of keys");
static_assert(LISTS * WAN_ATTN_CUDA_LIST_BLOCK == BLOCK_M, "a block has whole blocks of queries");
static_assert(NUM_WARPS % LISTS == 0, "no warp has rows of two blocks of queries");

typedef struct tile_walk {
    /* Of this lane's tiles of the group: from bit 0 on those that are still to come; with two
     * lists, from bit 16 on those that the warp's own block of queries lists. */
    u32 bits;
    int next; /* the tile after this one; below 0: the group is over */
    int turn; /* tiles so far */
} tile_walk;

DEVICE int blocks_of(int keys) { return (keys + BLOCK_N - 1) / BLOCK_N; }

/* The launch's parameter begins with `call`. */
DEVICE const wan_attn_cuda_listed_args &listed_of(const wan_attn_cuda_args &call) {
    return reinterpret_cast<const wan_attn_cuda_listed_args &>(call);
}

/* One list: where its first index is. */
typedef struct block_list {
    const int *at;
    int count;
} block_list;

/* block: of queries, which must be there. */
DEVICE block_list find_list(const wan_attn_cuda_lists &lists, const block_place &place, int block) {
    block_list list;
    i64 at = place.sample * lists.count_batch_stride + place.head * lists.count_head_stride +
             block * lists.count_block_stride;
    list.count = smaller_int(load_global_i32(lists.counts + at), lists.capacity);
    list.at = lists.indices + place.sample * lists.batch_stride + place.head * lists.head_stride +
              block * lists.block_stride;
    return list;
}

/* A word's bits from begin to end - 1; both may lie outside of it. */
DEVICE u32 bits_between(int begin, int end) {
    begin = larger_int(begin, 0);
    end = smaller_int(end, 32);
    return begin < end ? 0xffffffffu >> (32 - (end - begin)) << begin : 0;
}

/* This lane's bits of the tiles that a list names, of those in `range`; lane l has PER_LANE of them
 * from l * PER_LANE on, counted from the tile `base`. */
template <int PER_LANE>
DEVICE u32 bits_of_list(const wan_attn_cuda_lists &lists, const block_list &list, int base,
                        const key_range &range) {
    int lane = thread_index_again() % 32;
    u32 bits = 0;
    for (int first = 0; first < list.count; first += 32) {
        int n = -1; /* counted from base */
        if (first + lane < list.count)
            n = load_global_i32(list.at + (first + lane) * lists.index_stride);
        n = n >= range.begin && n < range.end ? n - base : -1;
        if (!any_lane(n >= 0))
            continue;
#pragma unroll 4
        for (int lane_mask = 0; lane_mask < 32; lane_mask++) {
            int other = (int)shfl_xor_bits((u32)n, lane_mask);
            bits |= other >= 0 && other / PER_LANE == lane ? 1u << (other % PER_LANE & 31) : 0;
        }
    }
    return bits;
}

/* What any list of the block names, and the warp's own. */
typedef struct listed_bits {
    u32 any, own;
} listed_bits;

/* The bits of 32 * PER_LANE tiles from `base` on. */
template <int PER_LANE> DEVICE listed_bits find_bits(const wan_attn_cuda_args &args, int base) {
    const wan_attn_cuda_lists &lists = listed_of(args).lists;
    block_place place = find_place(args, BLOCK_M);
    block_work work = find_work(args, place, BLOCK_M, BLOCK_N);
    int first = work.first_key / BLOCK_N;
    key_range range = {larger_int(first, base),
                       smaller_int(first + work.num_tiles, base + 32 * PER_LANE)};
    listed_bits bits = {0, 0};
#pragma unroll 1
    for (int i = 0; i < LISTS; i++) {
        int row = place.row_begin + i * WAN_ATTN_CUDA_LIST_BLOCK;
        if (row >= work.used_q)
            break;
        u32 named;
        if (lists.counts) {
            block_list list = find_list(lists, place, row / WAN_ATTN_CUDA_LIST_BLOCK);
            named = bits_of_list<PER_LANE>(lists, list, base, range);
        } else {
            int from = base + thread_index_again() % 32 * PER_LANE;
            named = bits_between(range.begin - from, smaller_int(range.end - from, PER_LANE));
        }
        bits.any |= named;
        if (i == thread_index_again() / 32 / (NUM_WARPS / LISTS))
            bits.own = named;
    }
    return bits;
}

/* The last tile of the group that is left, which then no longer is; below 0: none. */
DEVICE int take_tile(tile_walk &walk) {
    u32 left = LISTS == 1 ? walk.bits : walk.bits & 0xffffu;
    int mine = (thread_index() * LANE_TILES & (GROUP_TILES - 1)) | highest_bit(left); /* none: -1 */
    int n = largest_of_warp(mine);
    if (mine == n)
        walk.bits &= ~(1u << (n & (LANE_TILES - 1)));
    return n;
}

/* The last tile of the groups before this one; below 0: none. */
DEVICE int enter_group(tile_walk &walk, const wan_attn_cuda_args &args, int group) {
    int n = -1;
    while (n < 0 && group > 0) {
        listed_bits bits = find_bits<LANE_TILES>(args, --group * GROUP_TILES);
        walk.bits = LISTS == 1 ? bits.any : bits.any | bits.own << 16;
        n = take_tile(walk);
    }
    return n < 0 ? n : group * GROUP_TILES + n;
}

/* Tiles then have the numbers of their blocks of keys, as in the lists. */
DEVICE int begin_walk(tile_walk &walk, const wan_attn_cuda_args &args, block_work &work) {
    int first = work.first_key / BLOCK_N, last = first + work.num_tiles - 1;
    work.clean_begin += first;
    work.clean_end += first;
    work.num_keys += work.first_key;
    work.diagonal += work.first_key;
    work.first_key = 0;
    walk.turn = 0;
    return enter_group(walk, args, last / GROUP_TILES + 1);
}

/* At the end of a group `next` is the complement of its last tile. The next group is looked at only
 * when all tiles of this one are over: a copy of K that comes late once in 512 tiles or more,
 * against a main loop without all that. */
DEVICE void look_ahead(tile_walk &walk, int n) {
    int next = take_tile(walk);
    walk.turn++;
    walk.next = next < 0 ? ~n : (n & -GROUP_TILES) | next;
}

DEVICE void step_back(tile_walk &walk, int n) {
    walk.turn++;
    walk.next = n - 1;
}

DEVICE int next_tile(const tile_walk &walk, int) { return walk.next; }

/* n: what next_tile() has said. */
DEVICE int last_tile(int n) { return ~n; }
DEVICE int resume_walk(tile_walk &walk, const wan_attn_cuda_args &args, int n) {
    return enter_group(walk, args, last_tile(n) / GROUP_TILES);
}

/* The lane is said in two ways: on sm_90 either spills where the other does not. */
DEVICE bool is_of_warp(const tile_walk &walk, int n) {
    bool is_of_lane = STAGES == 2
                          ? ((n ^ thread_index() * LANE_TILES) & (GROUP_TILES - LANE_TILES)) == 0
                          : ((n / LANE_TILES ^ thread_index()) & 31) == 0;
    return LISTS == 1 || any_lane(is_of_lane && (walk.bits >> (16 + (n & 15)) & 1) != 0);
}

DEVICE int turn_of(const tile_walk &walk, int) { return walk.turn; }

/* A source stays at the tile that has been copied. */
DEVICE void go_back(tile_source &source, int tiles) {
    source.from = stepped_back(source.from, (u32)tiles * (source.pass_bytes * PASSES));
}

#endif /* WAN_ATTN_CUDA_TILE_WALK_LISTED_H */
