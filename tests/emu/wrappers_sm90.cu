// SPDX-License-Identifier: Apache-2.0
// wrappers_sm90.cu - each wrapper of Hopper's own instructions in a kernel of its own, for
// golden_sm90a.ptx.
#include "cuda/ptx/ptx_sm90.cuh"

#define KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)

typedef struct cluster_args {
    int *out;
} cluster_args;
WAN_ATTN_CLUSTER_KERNEL(k_cluster_rank, 384, 2, cluster_args, args) { *args.out = cluster_rank(); }

KERNEL(k_cluster_arrive) { cluster_arrive(); }
KERNEL(k_cluster_wait) { cluster_wait(); }
KERNEL(k_warp_barrier) { warp_barrier(); }
KERNEL(k_named_barrier_sync, int id) { named_barrier_sync(id, 256); }
KERNEL(k_named_barrier_arrive, int id) { named_barrier_arrive(id, 256); }
KERNEL(k_take_registers) { take_registers<240>(); }
KERNEL(k_give_registers) { give_registers<24>(); }
KERNEL(k_fence_async_proxy) { fence_async_proxy(); }
KERNEL(k_stmatrix_x4, u32 at, u32 x, u32 y) {
    const u32 words[4] = {x, y, 3, 4};
    stmatrix_x4(at, words);
}

KERNEL(k_mbarrier_init, u32 at, int count) { mbarrier_init(at, count); }
KERNEL(k_mbarrier_init_fence) { mbarrier_init_fence(); }
KERNEL(k_mbarrier_arrive_and_expect, u32 at, u32 bytes) { mbarrier_arrive_and_expect(at, bytes); }
KERNEL(k_mbarrier_arrive, u32 at) { mbarrier_arrive(at); }
KERNEL(k_mbarrier_arrive_at, u32 at, u32 rank) { mbarrier_arrive_at(at, rank); }
KERNEL(k_mbarrier_wait, u32 at, u32 parity) { mbarrier_wait(at, parity); }

KERNEL(k_tma_prefetch_map, const void *map) { tma_prefetch_map(map); }
KERNEL(k_tma_load, u32 to, const void *map, u32 barrier, int c, int r, int h, int s) {
    tma_load(to, map, barrier, c, r, h, s);
}
KERNEL(k_tma_load_multicast, u32 to, const void *map, u32 barrier, u32 blocks, int c, int r, int h,
       int s) {
    tma_load_multicast(to, map, barrier, blocks, c, r, h, s);
}
KERNEL(k_tma_store, const void *map, u32 from, int c, int r, int h, int s) {
    tma_store(map, from, c, r, h, s);
}
KERNEL(k_tma_store_commit) { tma_store_commit(); }
KERNEL(k_tma_store_wait_read) { tma_store_wait_read(); }

KERNEL(k_wgmma_fence) { wgmma_fence(); }
KERNEL(k_wgmma_commit) { wgmma_commit(); }
KERNEL(k_wgmma_wait) { wgmma_wait<1>(); }
KERNEL(k_hold, float *x) { hold(*x); }
KERNEL(k_computed, float x, float y, u32 at) { computed(x, y, at); }

#define SS(n, type)                                                                                \
    KERNEL(k_ss_n##n##_##type, float (*d)[4], u64 a, u64 b, int x) {                               \
        wgmma_ss_n##n##_##type(d, a, b, x > 7);                                                    \
    }
#define RS(n, type)                                                                                \
    KERNEL(k_rs_n##n##_##type, float (*d)[4], const u32 *a, u64 b) {                               \
        wgmma_rs_n##n##_##type(d, a, b);                                                           \
    }
SS(80, bf16)
SS(80, f16)
SS(128, bf16)
SS(128, f16)
SS(176, bf16)
SS(176, f16)
RS(64, bf16)
RS(64, f16)
RS(128, bf16)
RS(128, f16)
RS(256, bf16)
RS(256, f16)
