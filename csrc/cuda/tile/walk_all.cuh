/* SPDX-License-Identifier: Apache-2.0
 * walk_all.cuh - the order in which a block's tiles are computed: all of them, from the last to the
 * first. Includer sets what swizzle.cuh wants.
 *
 * walk_listed.cuh offers the same names for tiles that lists of blocks name.
 */
#ifndef WAN_ATTN_CUDA_TILE_WALK_ALL_H
#define WAN_ATTN_CUDA_TILE_WALK_ALL_H

#include "cuda/tile/swizzle.cuh"
#include "cuda/tile/work.cuh"

/* The tile's number says everything. */
typedef struct tile_walk {
} tile_walk;

DEVICE int blocks_of(int keys) { return (keys + BLOCK_N - 1) / BLOCK_N; }

/* The first tile to be computed; below 0: none. Changes `work` to what the walk counts in. */
DEVICE int begin_walk(tile_walk &, const wan_attn_cuda_args &, block_work &work) {
    return work.num_tiles - 1;
}

/* Finds the tile after n: once, before it is asked for. */
DEVICE void look_ahead(tile_walk &, int) {}

/* The tile before n is the next one, whatever the walk. */
DEVICE void step_back(tile_walk &, int) {}

/* The tile after n; below 0: none, or one that resume_walk() finds, which follows last_tile(). */
DEVICE int next_tile(tile_walk &, int n) { return n - 1; }
DEVICE int last_tile(int n) { return n; }
DEVICE int resume_walk(tile_walk &, const wan_attn_cuda_args &, int n) { return n; }

/* Whether the warp's rows see tile n at all. */
DEVICE bool is_of_warp(const tile_walk &, int) { return true; }

/* A number that is odd for every second tile: which buffer of two it has. */
DEVICE int turn_of(const tile_walk &, int n) { return n; }

/* Turns a source from the tile that has been copied to the one `tiles` before it: copying has done
 * that. */
template <typename Source> DEVICE void go_back(Source &, int) {}

#endif /* WAN_ATTN_CUDA_TILE_WALK_ALL_H */
