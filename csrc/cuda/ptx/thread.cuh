/* SPDX-License-Identifier: Apache-2.0
 * thread.cuh - who a thread is, and how threads wait for and talk to each other.
 */
#ifndef WAN_ATTN_CUDA_PTX_THREAD_H
#define WAN_ATTN_CUDA_PTX_THREAD_H

#define DEVICE [[maybe_unused]] static __device__ __forceinline__

/* WAN_ATTN_KERNEL(name, threads, min_ctas, type, args) { body }: unmangled, so that loader and
 * tools find it. __grid_constant__: args stays in constant memory also where its address is taken.
 */
#define WAN_ATTN_KERNEL(name, threads, min_ctas, type, args)                                       \
    extern "C" __global__ void __launch_bounds__(threads, min_ctas)                                \
        name(const __grid_constant__ type args)

DEVICE int thread_index() {
    int x;
    asm("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/* The same, but what follows from it is computed where it is asked for: in code that few tiles need,
 * not in registers of the main loop. */
DEVICE int thread_index_again() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/* volatile: code that asks again wants to compute again what follows from it. */
DEVICE int block_index() {
    int x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}

/* A number that is the same in all lanes anyway. As the result of a reduction the compiler knows
 * that too and may keep it in a uniform register, of which there are plenty. */
DEVICE int uniform(int x) {
#if __CUDA_ARCH__ >= 800
    asm("redux.sync.or.b32 %0, %0, 0xffffffff;" : "+r"(x));
#endif
    return x;
}

/* All threads of the block, in convergence; orders their shared memory accesses. */
DEVICE void block_barrier() { asm volatile("barrier.sync.aligned 0;" ::: "memory"); }

/* The 32-bit value of the lane whose number differs in the bits of lane_mask. */
DEVICE u32 shfl_xor_bits(u32 x, int lane_mask) {
    u32 y;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;"
                 : "=r"(y)
                 : "r"(x), "r"(lane_mask));
    return y;
}

DEVICE float shfl_xor(float x, int lane_mask) {
    float y;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;"
                 : "=f"(y)
                 : "f"(x), "r"(lane_mask));
    return y;
}

/* Whether the condition holds in any lane of the warp. */
DEVICE bool any_lane(bool condition) {
    int any;
    asm volatile("{ .reg .pred p, q; setp.ne.s32 p, %1, 0; vote.sync.any.pred q, p, 0xffffffff; "
                 "selp.s32 %0, 1, 0, q; }"
                 : "=r"(any)
                 : "r"((int)condition));
    return any != 0;
}

/* The largest of the lanes' numbers, to each. */
DEVICE int largest_of_warp(int x) {
#if __CUDA_ARCH__ >= 800
    asm volatile("redux.sync.max.s32 %0, %0, 0xffffffff;" : "+r"(x));
#else
#pragma unroll
    for (int lane_mask = 1; lane_mask < 32; lane_mask *= 2) {
        int other = (int)shfl_xor_bits((u32)x, lane_mask);
        x = other > x ? other : x;
    }
#endif
    return x;
}

#endif /* WAN_ATTN_CUDA_PTX_THREAD_H */
