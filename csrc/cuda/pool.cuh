/* SPDX-License-Identifier: Apache-2.0
 * pool.cuh - what a block of keys or values is as a whole, for calls that leave blocks out. One
 * warp works on one block of one head; nothing is shared between warps.
 *
 * Two kernels, by PACK_STEP: 1 makes the mean of a block, which stands for it where it is not
 * listed; 2 says whether a value of a block is infinite or NaN, so that a skip_threshold keeps it.
 * Numerics: a mean is the float32 sum in the order of the keys, divided by their number and by the
 * head's scale (a power of two), and then rounded once to what the products take: 2^-9 of it in
 * bf16, 2^-12 in f16, as the kernel's other operands are.
 */
#include "cuda/args_lists.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/work.cuh"

/* A block of one head. */
typedef struct key_block {
    int number; /* over [batch][heads][blocks] */
    int head;   /* over [batch][heads] */
    int begin, end;
    i64 at; /* the head's first element */
} key_block;

/* Without rows where there is no such block, or none of it is real. */
DEVICE key_block find_block(const wan_attn_cuda_pool_args &args) {
    const int keys = WAN_ATTN_CUDA_LIST_BLOCK;
    int blocks = (args.seqlen + keys - 1) / keys;
    key_block block;
    block.number = warp_number();
    block.head = block.number / blocks;
    int sample = block.head / args.heads;
    block.begin = block.number % blocks * keys;
    block.end = 0;
    if (sample < args.batch)
        block.end = length_at(args.seqused, sample, args.seqlen);
    block.end = smaller_int(block.begin + keys, block.end);
    block.at = sample * args.from.batch_stride + block.head % args.heads * args.from.head_stride;
    return block;
}

DEVICE void pool(const wan_attn_cuda_pool_args &args, const key_block &block) {
    float count = (float)(block.end - block.begin);
    float scale = args.scale ? load_global_f32(args.scale + block.head) : 1.0f;
    i64 to = (i64)block.number * args.head_dim;
    for (int d = 2 * (thread_index() % 32); d < args.head_dim; d += 64) {
        float sum[2] = {0.0f, 0.0f};
        for (int row = block.begin; row < block.end; row++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                sum[i] += load_element(args.from.data, args.from_dtype,
                                       block.at + row * args.from.row_stride + d + i);
#pragma unroll
        for (int i = 0; i < 2; i++)
            sum[i] = rounded_quotient(rounded_quotient(sum[i], count), scale);
        u32 pair = args.to_bf16 ? pack_bf16(sum[0], sum[1]) : pack_f16(sum[0], sum[1]);
        store_global_b32((char *)args.to + (to + d) * 2, pair);
    }
}

/* Says 0 of a block without real keys. */
DEVICE void find_nonfinite(const wan_attn_cuda_pool_args &args, const key_block &block) {
    u32 largest = 0; /* bits of a magnitude: NaN is above infinity, and both above all others */
    for (int row = block.begin; row < block.end; row++)
        for (int d = thread_index() % 32; d < args.head_dim; d += 32) {
            i64 at = block.at + row * args.from.row_stride + d;
            u32 bits = bits_from_float(load_element(args.from.data, args.from_dtype, at));
            bits &= 0x7fffffffu;
            largest = bits > largest ? bits : largest;
        }
    bool is_found = any_lane(largest >= 0x7f800000u);
    if (thread_index() % 32 == 0)
        store_global_b32((int *)args.to + block.number, is_found ? 1 : 0);
}

WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, 1, wan_attn_cuda_pool_args, args) {
    key_block block = find_block(args);
#if PACK_STEP == 1
    if (block.begin < block.end)
        pool(args, block);
#else
    if (block.head < args.batch * args.heads)
        find_nonfinite(args, block);
#endif
}
