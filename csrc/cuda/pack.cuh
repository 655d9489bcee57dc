/* SPDX-License-Identifier: Apache-2.0
 * pack.cuh - the passes that bring K and V into the form the attention kernels read: 16-bit, dense
 * rows, and scaled into f16's range where the row wants f16 of bf16 tensors. Needed for f32 keys,
 * for views that are not 16-byte aligned, for V of a pv16 row, and for K and V of a bf16 row on
 * Turing; a small part of the attention's own time.
 *
 * Three kernels, by PACK_STEP: 1 measures the largest finite value of each part of a head, 2 makes
 * of a head's parts its scale, 3 converts. 1 and 2 only where there is a scale. One warp works on
 * one part, one head, or one row; nothing is shared between warps, so that neither barriers nor
 * atomics are needed and two runs give the same bits.
 * Numerics: scales are powers of two, hence exact; f32 is rounded to nearest; NaN and infinities
 * stay what they are and do not count as the largest.
 */
#include "cuda/args.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/work.cuh"

/* The power of two that, as divisor, brings this largest value below 2^limit. */
DEVICE float scale_for(float largest, int limit) {
    int exponent = (int)(bits_from_float(largest) >> 23) - 126; /* largest < 2^exponent */
    exponent = larger_int(exponent - limit, -126);
    return largest == 0.0f ? 1.0f : float_from_bits((u32)(exponent + 127) << 23);
}

/* 1 / scale, exact. */
DEVICE float inverse_of(float scale) {
    return float_from_bits((254u << 23) - bits_from_float(scale));
}

/* The largest |x| in the warp; every lane gets it. */
DEVICE float warp_max(float x) {
#pragma unroll
    for (int lane_mask = 1; lane_mask < 32; lane_mask *= 2)
        x = larger(x, shfl_xor(x, lane_mask));
    return x;
}

/* Warps run over [batch][heads][parts], rows of a part over its share of the real ones. */
DEVICE void measure(const wan_attn_cuda_pack_args &args) {
    int part = warp_number() % args.num_parts, head = warp_number() / args.num_parts;
    int sample = head / args.heads, lane = thread_index() % 32;
    if (sample >= args.batch)
        return;
    int used = length_at(args.seqused, sample, args.seqlen);
    i64 at = sample * args.from.batch_stride + head % args.heads * args.from.head_stride;
    float largest = 0.0f;
    for (int row = part; row < used; row += args.num_parts)
        for (int d = lane; d < args.head_dim; d += 32) {
            float x =
                load_element(args.from.data, args.from_dtype, at + row * args.from.row_stride + d);
            float size = float_from_bits(bits_from_float(x) & 0x7fffffffu);
            if (size < float_from_bits(0x7f800000u)) /* neither infinite nor NaN */
                largest = larger(largest, size);
        }
    largest = warp_max(largest);
    if (lane == 0)
        store_global_f32(args.largest + (i64)head * args.num_parts + part, largest);
}

/* Warps run over [batch][heads]. */
DEVICE void find_scale(const wan_attn_cuda_pack_args &args) {
    int head = warp_number(), lane = thread_index() % 32;
    if (head >= args.batch * args.heads)
        return;
    float largest = 0.0f;
    for (int part = lane; part < args.num_parts; part += 32)
        largest =
            larger(largest, load_global_f32(args.largest + (i64)head * args.num_parts + part));
    largest = warp_max(largest);
    if (lane == 0)
        store_global_f32(args.scale + head, scale_for(largest, args.limit));
}

/* Warps run over [batch][seqlen][heads]; rows behind the real length are left as they are. */
DEVICE void convert(const wan_attn_cuda_pack_args &args) {
    int head = warp_number() % args.heads, row = warp_number() / args.heads % args.seqlen;
    int sample = warp_number() / args.heads / args.seqlen, lane = thread_index() % 32;
    if (sample >= args.batch || row >= length_at(args.seqused, sample, args.seqlen))
        return;
    i64 from =
        sample * args.from.batch_stride + row * args.from.row_stride + head * args.from.head_stride;
    i64 to = (((i64)sample * args.seqlen + row) * args.heads + head) * args.head_dim;
    float factor = 1.0f;
    if (args.scale)
        factor = inverse_of(load_global_f32(args.scale + sample * args.heads + head));
    for (int d = 2 * lane; d < args.head_dim; d += 64) {
        float low = load_element(args.from.data, args.from_dtype, from + d) * factor;
        float high = load_element(args.from.data, args.from_dtype, from + d + 1) * factor;
        u32 pair = args.to_bf16 ? pack_bf16(low, high) : pack_f16(low, high);
        store_global_b32((char *)args.to + (to + d) * 2, pair);
    }
}

WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, 1, wan_attn_cuda_pack_args, args) {
#if PACK_STEP == 1
    measure(args);
#elif PACK_STEP == 2
    find_scale(args);
#else
    convert(args);
#endif
}
