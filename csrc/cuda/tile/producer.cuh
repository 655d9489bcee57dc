/* SPDX-License-Identifier: Apache-2.0
 * producer.cuh - shared memory of a block of sdpa_sm90.cuh, its mbarriers, and the thread that
 * fills it: Q once, K and V into rings. Includer sets HEAD_DIM, BLOCK_N, CONSUMERS, STAGES and
 * CLUSTER.
 *
 * full_k/v[stage]: one arrival and the bytes of a tile. empty_k/v[stage]: one arrival of each
 * consumer warp of the cluster.
 */
#ifndef WAN_ATTN_CUDA_TILE_PRODUCER_H
#define WAN_ATTN_CUDA_TILE_PRODUCER_H

#include "cuda/args_sm90.h"
#include "cuda/tile/cluster_work.cuh"
#include "cuda/tile/ring.cuh"

typedef wan_attn_cuda_sm90_args sm90_args;

/* A tile of R rows lies as HEAD_DIM / 64 panels of [R][64 columns], a row being 128 bytes. */
enum {
    BLOCK_M = 64 * CONSUMERS,
    PANELS = HEAD_DIM / 64,
    Q_PANEL = BLOCK_M * 128,
    KV_PANEL = BLOCK_N * 128,
    Q_BYTES = PANELS * Q_PANEL,
    KV_BYTES = PANELS * KV_PANEL,
    LOADED_ROWS = BLOCK_N / CLUSTER, /* of each tile, by each block */
    Q_SMEM = 0,                      /* offsets in shared memory; Q's place is O's on its way out */
    K_SMEM = Q_BYTES,
    V_SMEM = K_SMEM + STAGES * KV_BYTES,
    FULL_Q = V_SMEM + STAGES * KV_BYTES,
    FULL_K = FULL_Q + 16,
    EMPTY_K = FULL_K + 16 * STAGES,
    FULL_V = EMPTY_K + 16 * STAGES,
    EMPTY_V = FULL_V + 16 * STAGES,
    USED_SMEM = EMPTY_V + 16 * STAGES
};
static_assert(HEAD_DIM % 64 == 0, "a panel is 64 columns");
static_assert(BLOCK_N % 16 == 0 && LOADED_ROWS % 8 == 0, "a swizzle pattern is 8 rows");
static_assert(CLUSTER == 1 || CLUSTER == 2, "a tile is loaded whole or in halves");
static_assert(USED_SMEM == WAN_ATTN_CUDA_SMEM_SM90(HEAD_DIM, BLOCK_N, CONSUMERS, STAGES),
              "args.h must say what is used");

DEVICE u32 barrier_at(u32 first, u32 stage) { return shared_base() + first + 16 * stage; }

DEVICE void init_barriers(const sm90_args &args) {
    if (thread_index() == 0) {
        tma_prefetch_map(&args.q);
        tma_prefetch_map(&args.k);
        tma_prefetch_map(&args.v);
        mbarrier_init(barrier_at(FULL_Q, 0), 1);
        for (u32 stage = 0; stage < STAGES; stage++) {
            mbarrier_init(barrier_at(FULL_K, stage), 1);
            mbarrier_init(barrier_at(FULL_V, stage), 1);
            mbarrier_init(barrier_at(EMPTY_K, stage), 4 * CONSUMERS * CLUSTER);
            mbarrier_init(barrier_at(EMPTY_V, stage), 4 * CONSUMERS * CLUSTER);
        }
        mbarrier_init_fence();
    }
}

/* This block's share of the tile that begins with `row`, to all blocks of the cluster. */
DEVICE void load_tile(const wan_attn_cuda_tensor_map &map, u32 to, u32 full, int row, int head,
                      int sample) {
    mbarrier_arrive_and_expect(full, KV_BYTES);
    u32 first = CLUSTER > 1 ? cluster_rank() * LOADED_ROWS : 0;
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++) {
        u32 place = to + (u32)panel * KV_PANEL + first * 128;
        if (CLUSTER > 1)
            tma_load_multicast(place, &map, full, (1u << CLUSTER) - 1, panel * 64, row + (int)first,
                               head, sample);
        else
            tma_load(place, &map, full, panel * 64, row, head, sample);
    }
}

DEVICE void load_k(const sm90_args &args, const assignment &a, ring &r, int row) {
    mbarrier_wait(barrier_at(EMPTY_K, r.stage), r.parity ^ 1);
    load_tile(args.k, shared_base() + K_SMEM + r.stage * KV_BYTES, barrier_at(FULL_K, r.stage), row,
              a.place.head / args.call.heads_per_key_head, a.place.sample);
    advance(r);
}

DEVICE void load_v(const sm90_args &args, const assignment &a, ring &r, int row) {
    mbarrier_wait(barrier_at(EMPTY_V, r.stage), r.parity ^ 1);
    load_tile(args.v, shared_base() + V_SMEM + r.stage * KV_BYTES, barrier_at(FULL_V, r.stage), row,
              a.place.head / args.call.heads_per_key_head, a.place.sample);
    advance(r);
}

/* One thread. In the order in which consumers need them: K is a tile ahead of V. */
DEVICE void produce(const sm90_args &args, const assignment &a) {
    ring k = {0, 0}, v = {0, 0};
    if (a.work.num_tiles > 0) {
        u32 full = barrier_at(FULL_Q, 0);
        mbarrier_arrive_and_expect(full, Q_BYTES);
        for (int panel = 0; panel < PANELS; panel++)
            tma_load(shared_base() + Q_SMEM + (u32)panel * Q_PANEL, &args.q, full, panel * 64,
                     a.place.row_begin, a.place.head, a.place.sample);
    }
    int row = a.first_row;
    for (int i = 0; i < a.num_loaded; i++, row -= BLOCK_N) {
        load_k(args, a, k, row);
        if (i > 0)
            load_v(args, a, v, row + BLOCK_N);
    }
    if (a.num_loaded > 0)
        load_v(args, a, v, row + BLOCK_N);
    /* A block may not leave while another one still writes to its memory, or arrives at its
     * barriers. When every place is free again, all of the cluster has done with this block. */
    for (int stage = 0; stage < STAGES && CLUSTER > 1; stage++) {
        mbarrier_wait(barrier_at(EMPTY_K, k.stage), k.parity ^ 1);
        mbarrier_wait(barrier_at(EMPTY_V, v.stage), v.parity ^ 1);
        advance(k);
        advance(v);
    }
}

#endif /* WAN_ATTN_CUDA_TILE_PRODUCER_H */
