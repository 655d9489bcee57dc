/* SPDX-License-Identifier: Apache-2.0
 * guard.cuh - what a caller wants to know of a call that has run: the largest value, and what is
 * infinite or NaN. One more look at V and out, whatever the row, and nothing in the attention
 * kernels: the time that memory needs to bring both once. cpu/guard.c does the same on the CPU.
 *
 * One warp looks at WAN_ATTN_CUDA_GUARD_ROWS rows of one head and adds what it has found with
 * integer atomics, so that neither the order of warps nor a second call on another stream changes
 * what stands there in the end. Nobody waits for it.
 */
#include "cuda/args_guard.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/work.cuh"

/* Words of wan_attn_guard. clipped_values stays as it is: V is scaled by powers of two that bring
 * its largest number into range, so that nothing is ever clipped. */
enum { LARGEST_VALUE = 0, NONFINITE_VALUES = 2, NONFINITE_RESULTS = 3 };

/* What a warp looks at. */
typedef struct look {
    wan_attn_cuda_view view;
    int dtype, sample, head;
    int begin, end; /* rows */
    bool is_out;
} look;

/* Warps run over [batch][query heads, then key heads][blocks of rows]. */
DEVICE look find_look(const wan_attn_cuda_guard_args &args) {
    const int rows = WAN_ATTN_CUDA_GUARD_ROWS;
    int q_blocks = (args.seqlen_q + rows - 1) / rows, k_blocks = (args.seqlen_k + rows - 1) / rows;
    int of_out = args.num_heads_q * q_blocks, of_v = args.num_heads_k * k_blocks;
    int part = warp_number() % (of_out + of_v);
    look l;
    l.sample = warp_number() / (of_out + of_v);
    l.is_out = part < of_out;
    int blocks = l.is_out ? q_blocks : k_blocks, at = l.is_out ? part : part - of_out;
    l.view = l.is_out ? args.out : args.v;
    l.dtype = l.is_out ? args.out_dtype : args.v_dtype;
    l.head = at / blocks;
    l.begin = at % blocks * rows;
    l.end = 0;
    if (l.sample < args.batch)
        l.end = l.is_out ? args.seqlen_q : length_at(args.seqused_k, l.sample, args.seqlen_k);
    l.end = smaller_int(l.begin + rows, l.end);
    return l;
}

/* As large as a word can be, if it does not fit. */
DEVICE void add_count(void *at, u32 more) {
    u32 before = add_global_u32(at, more);
    if (before + more < before)
        raise_global_u32(at, 0xffffffffu);
}

WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, 1, wan_attn_cuda_guard_args, args) {
    look l = find_look(args);
    int lane = thread_index() % 32;
    u32 largest = 0, nonfinite = 0; /* bits of a magnitude: ordered as it is, NaN above all */
    i64 at = l.sample * l.view.batch_stride + l.head * l.view.head_stride;
    for (int row = l.begin; row < l.end; row++)
        for (int d = lane; d < args.head_dim; d += 32) {
            float x = load_element(l.view.data, l.dtype, at + row * l.view.row_stride + d);
            u32 size = bits_from_float(x) & 0x7fffffffu;
            nonfinite += size >= 0x7f800000u ? 1 : 0;
            largest = size > largest ? size : largest;
        }
#pragma unroll
    for (int lane_mask = 1; lane_mask < 32; lane_mask *= 2) {
        u32 other = shfl_xor_bits(largest, lane_mask);
        largest = other > largest ? other : largest;
        nonfinite += shfl_xor_bits(nonfinite, lane_mask);
    }
    u32 *guard = (u32 *)args.guard;
    if (lane != 0)
        return;
    if (!l.is_out && largest)
        raise_global_u32(guard + LARGEST_VALUE, largest);
    if (nonfinite)
        add_count(guard + (l.is_out ? NONFINITE_RESULTS : NONFINITE_VALUES), nonfinite);
}
