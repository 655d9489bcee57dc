/* SPDX-License-Identifier: Apache-2.0
 * cluster.cuh - blocks that run together, warpgroups with roles of their own, and the fence between
 * the two ways into shared memory.
 */
#ifndef WAN_ATTN_CUDA_PTX_CLUSTER_H
#define WAN_ATTN_CUDA_PTX_CLUSTER_H

/* WAN_ATTN_KERNEL for blocks that run `cluster` at a time on neighbouring SMs: consecutive block
 * numbers; the grid is a multiple of it. The launch needs no attribute. */
#define WAN_ATTN_CLUSTER_KERNEL(name, threads, cluster, type, args)                                \
    extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads, 1)       \
        name(const __grid_constant__ type args)

/* This block's number in its cluster. */
DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* All threads of the cluster that have not left. Of what they did before arriving, only the
 * initialisation of mbarriers before mbarrier_init_fence() is visible to all after waiting:
 * .release would make all of memory so, with a MEMBAR.ALL.GPU. */
DEVICE void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

/* All lanes of the warp; orders their shared memory accesses. */
DEVICE void warp_barrier() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

/* One of 16 barriers of the block, for `threads` threads: whole warps that wait here or only
 * arrive. Orders their shared memory accesses. 0 is block_barrier's. */
DEVICE void named_barrier_sync(int id, int threads) {
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Registers a thread of this warpgroup has from here on. Taking more waits until others have given
 * theirs back. Templates: the instructions want literals. */
template <int registers> DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers> DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

/* This thread's stores to shared memory, and those it has seen, before wgmma and TMA look at it. */
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Four 8x8 matrices of 16-bit elements to shared memory: lane 8i + r brings the address of row r of
 * matrix i; of each matrix lane l has the elements (row l / 4, columns 2 (l % 4) and the next). */
DEVICE void stmatrix_x4(u32 row_address, const u32 x[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
        "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
        : "memory");
}

#endif /* WAN_ATTN_CUDA_PTX_CLUSTER_H */
