/* SPDX-License-Identifier: Apache-2.0
 * output.cuh - from the accumulators of one 16-row tile to out and lse. Includer sets HEAD_DIM and
 * PACK, the rounding of two floats to the row's 16-bit dtype; QK_INT8, if scores are of 8 bits, and
 * LISTED, if tiles are those of lists (walk_listed.cuh).
 *
 * A lane holds two neighbouring columns of every 8. Lanes 2i and 2i + 1 swap, and then hold four
 * neighbouring columns of every second 8: the four lanes of a row write 32 bytes together, one
 * whole sector, with no detour through shared memory.
 */
#ifndef WAN_ATTN_CUDA_TILE_OUTPUT_H
#define WAN_ATTN_CUDA_TILE_OUTPUT_H

#include "cuda/tile/softmax.cuh"

/* values: one row's columns 8j + 2t and 8j + 2t + 1 for each j. All lanes must call, also where
 * there is no row to write. */
DEVICE void store_row_16bit(char *row, const float values[O_TILES][2], bool has_row) {
    int t = thread_index() % 4;
    bool is_odd = t % 2 != 0;
#pragma unroll
    for (int j = 0; j < O_TILES; j += 2) {
        u32 left = PACK(values[j][0], values[j][1]);
        u32 right = PACK(values[j + 1][0], values[j + 1][1]);
        u32 swapped = shfl_xor_bits(is_odd ? left : right, 1);
        u32 low = is_odd ? swapped : left, high = is_odd ? right : swapped;
        if (has_row)
            store_global_b32x2(row + (8 * (j + t % 2) + 4 * (t / 2)) * 2, low, high);
    }
}

DEVICE void store_row_f32(char *row, const float values[O_TILES][2], bool has_row) {
    int t = thread_index() % 4;
#pragma unroll
    for (int j = 0; j < O_TILES; j++)
        if (has_row)
            store_global_f32x2(row + (8 * j + 2 * t) * 4, values[j][0], values[j][1]);
}

/* What becomes of one row's sums. */
typedef struct row_end {
    bool sees_none; /* no key, or no such row: 0 instead of what was summed up */
    float factor;   /* else: times this. NaN or infinite where sums are not finite or 0 */
} row_end;

/* How a row ends, and its lse, if there is one to write: -inf if it sees no key; NaN if the scores
 * of all the keys that it sees are -inf, but -inf from a part, whose other parts may have more. All
 * lanes must call. */
DEVICE row_end finish_row(const wan_attn_cuda_args &args, const block_place &place, int row,
                          bool has_row, int used_q, float row_max, float row_sum) {
    i64 lse_at = place.sample * args.lse_batch_stride + place.head * args.lse_head_stride +
                 place.split * args.lse_split_stride;
    float sum = quad_sum(row_sum);
    row_end end = {!sees_keys(args, place, row, used_q, BLOCK_N), reciprocal(sum)};
#if LISTED /* what it sees need not be listed */
    end.sees_none = end.sees_none || !sees_walk(args, place, row, used_q, sum);
#endif
    if (args.lse && has_row && thread_index() % 4 == 0) {
        /* The largest weight is 2^P_SHIFT, whatever P_SHIFT - row_max was rounded to. */
        float unshifted = sum * (1.0f / (1 << P_SHIFT));
        float lse = fused_multiply_add(row_max, 0.69314718f, natural_log(unshifted));
#if QK_INT8 /* scores are without K's mean */
        i64 at = (i64)(place.sample * args.num_heads_q + place.head) * args.seqlen_q + row;
        lse += load_global_f32(args.q_rows + 2 * at + 1);
#endif
        if (sum == 0.0f && args.num_splits == 1)
            lse = float_from_bits(0x7fffffffu); /* NaN */
        store_global_f32(args.lse + lse_at + row * args.lse_row_stride,
                         end.sees_none ? minus_infinity() : lse);
    }
    return end;
}

/* Rows `row` and `row + 8` of the head, times scale; those that see no key become 0, not what
 * was summed up. */
DEVICE void store_rows(const wan_attn_cuda_args &args, const block_place &place, int row,
                       int used_q, float scale, const float o[O_TILES][4], const float row_max[2],
                       const float row_sum[2]) {
    i64 at = place.sample * args.out.batch_stride + place.head * args.out.head_stride +
             place.split * args.out_split_stride;
#pragma unroll
    for (int r = 0; r < 2; r++, row += 8) {
        bool has_row = row < args.seqlen_q;
        row_end end = finish_row(args, place, row, has_row, used_q, row_max[r], row_sum[r]);
        float values[O_TILES][2];
#pragma unroll
        for (int j = 0; j < O_TILES; j++) {
            values[j][0] = end.sees_none ? 0.0f : o[j][2 * r] * end.factor * scale;
            values[j][1] = end.sees_none ? 0.0f : o[j][2 * r + 1] * end.factor * scale;
        }
        if (args.out_is_f32)
            store_row_f32((char *)args.out.data + (at + row * args.out.row_stride) * 4, values,
                          has_row);
        else
            store_row_16bit((char *)args.out.data + (at + row * args.out.row_stride) * 2, values,
                            has_row);
    }
}

#endif /* WAN_ATTN_CUDA_TILE_OUTPUT_H */
