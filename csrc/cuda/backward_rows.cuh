/* SPDX-License-Identifier: Apache-2.0
 * backward_rows.cuh - the pass before a gradient: what it wants to know of each query row.
 *
 * One warp looks at one row of one head: it reads dout and out, of any dtype and alignment, and
 * writes lse in base 2, <dout, out> - dlse, and the sum of |dout| where products are in f16
 * (backward_scale.cuh). Rows without keys, padding among them, are not read: they may hold NaN.
 * Numerics: <dout, out> in 48 bits (float_pair.cuh), because its rounding would shift all dP of a
 * row alike, where theirs is as often up as down; the rest in f32. dout counts as rounded to the
 * row's dtype, as tensor cores get it: dP - delta is often small, and must be the difference of the
 * same numbers. A row with one key has dP = <dout, out> in exact arithmetic; the difference of two
 * sums in different orders is noise, so that neither is put to use (args_backward.h).
 */
#include "cuda/args_backward.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/float_pair.cuh"
#include "cuda/tile/row_keys.cuh"

DEVICE float_pair warp_pair_sum(float_pair x) {
#pragma unroll
    for (int lane_mask = 1; lane_mask < 32; lane_mask *= 2) {
        float_pair other = {shfl_xor(x.high, lane_mask), shfl_xor(x.rest, lane_mask)};
        x = pair_sum(x, other);
    }
    return x;
}

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lane_mask = 1; lane_mask < 32; lane_mask *= 2)
        x += shfl_xor(x, lane_mask);
    return x;
}

/* To nearest, ties to even, with `bits` bits less of the fraction. */
DEVICE float rounded(float x, int bits) {
    u32 word = bits_from_float(x), last = word >> bits & 1u;
    u32 near = word + ((1u << (bits - 1)) - 1u + last);
    bool is_finite = (word & 0x7f800000u) != 0x7f800000u;
    return is_finite ? float_from_bits(near >> bits << bits) : x;
}

/* Warps run over [batch][num_heads_q][seqlen_q]. */
WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, 1, wan_attn_cuda_backward_rows_args, args) {
    int row = warp_number() % args.seqlen_q, lane = thread_index() % 32;
    int head = warp_number() / args.seqlen_q % args.num_heads_q;
    int sample = warp_number() / args.seqlen_q / args.num_heads_q;
    if (sample >= args.batch)
        return;
    int used_q = length_at(args.seqused_q, sample, args.seqlen_q);
    int used_k = length_at(args.seqused_k, sample, args.seqlen_k);
    int keys = row < used_q
                   ? count_keys(row, used_q, used_k, args.window_size_left, args.window_size_right)
                   : 0;
    float lse = float_from_bits(0x7f800000u), delta = 0.0f, size = 0.0f;
    float_pair sum = {0.0f, 0.0f};
    if (keys > 0) {
        i64 of_dout = sample * args.dout.batch_stride + row * args.dout.row_stride +
                      head * args.dout.head_stride;
        i64 of_out = sample * args.out.batch_stride + row * args.out.row_stride +
                     head * args.out.head_stride;
        for (int d = lane; d < args.head_dim; d += 32) {
            float dout = rounded(load_element(args.dout.data, args.dout_dtype, of_dout + d),
                                 args.sizes ? 13 : 16);
            float out = load_element(args.out.data, args.out_dtype, of_out + d);
            sum = pair_sum(sum, exact_product(dout, out));
            float magnitude = float_from_bits(bits_from_float(dout) & 0x7fffffffu);
            if (magnitude < float_from_bits(0x7f800000u)) /* neither infinite nor NaN */
                size += magnitude;
        }
        sum = warp_pair_sum(sum);
        size = warp_sum(size);
        size = size < 3.4e38f ? size : 3.4e38f; /* infinite would be left out */
        i64 of_lse = sample * args.lse_batch_stride + head * args.lse_head_stride;
        lse = load_global_f32(args.lse + of_lse + row * args.lse_row_stride) * 1.44269504f;
        float whole = sum.rest == sum.rest ? sum.high + sum.rest : sum.high;
        delta = keys == 1 ? 0.0f : whole;
        if (args.dlse)
            delta -= load_global_f32(args.dlse + sample * args.dlse_batch_stride +
                                     head * args.dlse_head_stride + row * args.dlse_row_stride);
    }
    i64 at = ((i64)sample * args.num_heads_q + head) * args.seqlen_q + row;
    if (lane == 0) {
        store_global_f32x2(args.rows + 4 * at, lse, delta);
        if (row > 0)
            store_global_f32x2(args.rows + 4 * at - 2, lse, delta);
        if (row == args.seqlen_q - 1)
            store_global_f32x2(args.rows + 4 * at + 2, float_from_bits(0x7f800000u), 0.0f);
        if (args.sizes)
            store_global_f32(args.sizes + at, size);
    }
}
