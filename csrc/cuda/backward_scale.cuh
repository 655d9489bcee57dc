/* SPDX-License-Identifier: Apache-2.0
 * backward_scale.cuh - the pass that finds powers of two for a gradient whose products are in f16.
 *
 * dS = P (dP - delta) is rounded to f16 to be multiplied. Weights are a share of all keys and
 * gradients are often small: unscaled, much of dS would be subnormal or 0, as it is in
 * FlashAttention-2, and large gradients would be infinite. So each key head has a power of two that
 * brings the largest dS that there can be close to f16's largest number:
 *
 *     |dP| <= max sum |dout| * max |v|        |dP - delta| <= 2 max(|dP|, |delta|)
 *
 * sum |dout| is a row's. Its largest times head_dim would be a bound, too, but up to 2^7 above
 * this where one number is far larger than all others: their dS would have so many bits less. Below
 * f16's largest are 2^29, and 2^10 more of subnormal numbers. dout that is no f16 yet has a second
 * power of two, from the same sums, which wan_attn_convert divides by.
 * Powers of two are exact, and what is done with them is undone in f32. What is not finite is left
 * out here, and stays what it is.
 *
 * One warp makes the numbers of one key head, from all of its query heads.
 */
#include "cuda/args_backward.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/work.cuh"

/* dS is also 2^13 times as large as its P (sdpa_backward.cuh). 2^15 and what P is above 1 by
 * rounding are below 65504. */
enum { ROOM = 15 - 13, LOWEST = -126, HIGHEST = 126 };

/* |x| < 2^n, n at least LOWEST; LOWEST for what is not finite. */
DEVICE int exponent_above(float x) {
    int biased = (int)(bits_from_float(x) >> 23 & 255u);
    return biased == 255 ? LOWEST : biased - 126;
}

DEVICE int warp_max_int(int x) {
#pragma unroll
    for (int lane_mask = 1; lane_mask < 32; lane_mask *= 2)
        x = larger_int(x, (int)shfl_xor_bits((u32)x, lane_mask));
    return x;
}

DEVICE int clamped(int x, int least, int most) { return smaller_int(larger_int(x, least), most); }

DEVICE float power_of_two(int n) { return float_from_bits((u32)(n + 127) << 23); }

/* Warps run over [batch][num_heads_k]. */
WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, 1, wan_attn_cuda_backward_scale_args, args) {
    int lane = thread_index() % 32, share = args.heads_per_key_head;
    int heads_k = args.num_heads_q / share;
    int head = warp_number() % heads_k, sample = warp_number() / heads_k;
    if (sample >= args.batch)
        return;
    int used_q = length_at(args.seqused_q, sample, args.seqlen_q);
    int of_dout = LOWEST, of_v = LOWEST, of_delta = LOWEST;
    for (int h = head * share; h < (head + 1) * share; h++) {
        i64 first = ((i64)sample * args.num_heads_q + h) * args.seqlen_q;
#pragma unroll 4
        for (int row = lane; row < used_q; row += 32) {
            of_dout =
                larger_int(of_dout, exponent_above(load_global_f32(args.sizes + first + row)));
            of_delta = larger_int(
                of_delta, exponent_above(load_global_f32(args.rows + 4 * (first + row) + 1)));
        }
    }
    i64 parts = ((i64)sample * heads_k + head) * args.num_parts;
    for (int part = lane; part < args.num_parts; part += 32)
        of_v = larger_int(of_v, exponent_above(load_global_f32(args.largest + parts + part)));
    of_dout = warp_max_int(of_dout);
    of_delta = warp_max_int(of_delta);
    of_v = warp_max_int(of_v);

    int divides_dout = args.dout_scale ? clamped(of_dout - 15, LOWEST, HIGHEST) : 0;
    int of_ds = larger_int(of_dout + of_v, of_delta) + 1;
    int divides_ds = clamped(of_ds - ROOM, larger_int(LOWEST, divides_dout - HIGHEST),
                             smaller_int(HIGHEST, divides_dout - LOWEST));
    if (lane == 0) {
        float *to = args.scales + ((i64)sample * heads_k + head) * WAN_ATTN_CUDA_BACKWARD_SCALES;
        store_global_f32x2(to, power_of_two(divides_dout - divides_ds), power_of_two(-divides_ds));
        store_global_f32x2(to + 2, power_of_two(divides_ds), power_of_two(divides_dout));
    }
    for (int h = lane; h < share && args.dout_scale; h += 32)
        store_global_f32(args.dout_scale + (i64)sample * args.num_heads_q + head * share + h,
                         power_of_two(divides_dout));
}
