/* SPDX-License-Identifier: Apache-2.0
 * merge.cuh - one result from those of the parts of a split over keys (args.h: num_splits).
 *
 *     lse = log sum_s exp(lse_s)          out = sum_s exp(lse_s - lse) out_s
 *
 * One warp makes one row of one head; the sums are made in order of the parts, in f32. A part that
 * saw no key has lse_s = -inf and out 0; one that saw keys whose scores all are -inf has NaN for
 * out. Both weigh nothing beside others. If there are only such, their sum is the row's out, and
 * its lse is NaN like it, or -inf.
 */
#include "cuda/args.h"
#include "cuda/ptx/ptx.cuh"

/* exp(x) for x <= 0. */
DEVICE float weight_of(float x) { return exp2_approx(x * 1.44269504f); }

WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, 1, wan_attn_cuda_merge_args, args) {
    int lane = thread_index() % 32;
    int number = block_index() * (NUM_THREADS / 32) + thread_index() / 32;
    int head = number % args.num_heads, row = number / args.num_heads % args.seqlen;
    int sample = number / args.num_heads / args.seqlen;
    if (sample >= args.batch)
        return;
    const float minus_infinity = float_from_bits(0xff800000u);
    i64 rows = (i64)args.batch * args.num_heads * args.seqlen;
    i64 lse_at = ((i64)sample * args.num_heads + head) * args.seqlen + row;
    i64 out_at = (((i64)sample * args.seqlen + row) * args.num_heads + head) * args.head_dim;

    float largest = minus_infinity, sum = 0.0f;
    bool is_empty = true; /* not for a NaN, which larger() leaves out */
    for (int s = 0; s < args.num_splits; s++) {
        float lse = load_global_f32(args.part_lse + s * rows + lse_at);
        is_empty = is_empty && lse == minus_infinity;
        largest = larger(largest, lse);
    }
    for (int s = 0; s < args.num_splits && !is_empty; s++)
        sum += weight_of(load_global_f32(args.part_lse + s * rows + lse_at) - largest);

    i64 to =
        sample * args.out.batch_stride + row * args.out.row_stride + head * args.out.head_stride;
    bool has_nan = false; /* in the lane's last column */
    for (int d = 2 * lane; d < args.head_dim; d += 64) {
        float low = 0.0f, high = 0.0f;
        for (int s = 0; s < args.num_splits; s++) {
            float lse = load_global_f32(args.part_lse + s * rows + lse_at);
            float weight = is_empty ? 1.0f : weight_of(lse - largest);
            float x[2];
            load_global_f32x2(x, args.part_out + s * rows * args.head_dim + out_at + d);
            bool counts = is_empty || lse != minus_infinity;
            low += counts ? weight * x[0] : 0.0f;
            high += counts ? weight * x[1] : 0.0f;
        }
        has_nan = low != low;
        float factor = is_empty ? 1.0f : reciprocal(sum);
        low *= factor;
        high *= factor;
        if (args.out_dtype == 0)
            store_global_f32x2((float *)args.out.data + to + d, low, high);
        else
            store_global_b32((char *)args.out.data + (to + d) * 2,
                             args.out_dtype == 1 ? pack_f16(low, high) : pack_bf16(low, high));
    }
    if (args.lse && lane == 0)
        store_global_f32(args.lse + sample * args.lse_batch_stride + head * args.lse_head_stride +
                             row * args.lse_row_stride,
                         !is_empty ? largest + natural_log(sum)
                         : has_nan ? float_from_bits(0x7fffffffu)
                                   : minus_infinity);
}
