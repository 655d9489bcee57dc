/* SPDX-License-Identifier: Apache-2.0
 * cluster_work.cuh - what one block of a cluster has to do. Blocks with neighbouring rows of one
 * head load every tile of keys together that any of them sees. Includer sets CLUSTER.
 *
 *            tiles, in order of loading ->
 *     block 0  | skipped_before |  its own work: num_tiles  | skipped_after |
 *     block 1  |         its own work ...                                   |
 *              |                      num_loaded                            |
 */
#ifndef WAN_ATTN_CUDA_TILE_CLUSTER_WORK_H
#define WAN_ATTN_CUDA_TILE_CLUSTER_WORK_H

#include "cuda/tile/work.cuh"

/* What all threads of a block agree on. */
typedef struct assignment {
    block_place place;
    block_work work;    /* of this block's own rows */
    int first_row;      /* of the tile that the cluster loads first */
    int skipped_before; /* tiles that only the other block sees: first loaded, */
    int skipped_after;  /* last loaded */
    int num_loaded;
} assignment;

DEVICE assignment find_assignment(const wan_attn_cuda_args &args, int block_m, int block_n) {
    assignment a;
    a.place = find_place(args, block_m);
    a.work = find_work(args, a.place, block_m, block_n);
    a.work.num_tiles = larger_int(a.work.num_tiles, 0);
    block_work all = a.work;
    if (CLUSTER > 1) {
        block_place both = a.place;
        both.row_begin = a.place.row_begin / (block_m * CLUSTER) * (block_m * CLUSTER);
        all = find_work(args, both, block_m * CLUSTER, block_n);
        all.num_tiles = larger_int(all.num_tiles, 0);
    }
    int end = all.first_key + all.num_tiles * block_n;
    a.num_loaded = all.num_tiles;
    a.first_row = end - block_n;
    a.skipped_before = a.num_loaded;
    a.skipped_after = 0;
    if (a.work.num_tiles > 0) {
        a.skipped_before = (end - a.work.first_key) / block_n - a.work.num_tiles;
        a.skipped_after = (a.work.first_key - all.first_key) / block_n;
    }
    return a;
}

#endif /* WAN_ATTN_CUDA_TILE_CLUSTER_WORK_H */
