/* SPDX-License-Identifier: Apache-2.0
 * scores_16bit.cuh - S = Q K(n)^T by products of 16-bit numbers, for the rows of a warp: Q and K as
 * they come, and how they get to where mma wants them. Includer sets HEAD_DIM, BLOCK_N, NUM_WARPS,
 * STAGES, Q_IN_REGS, IS_BF16; PACK, rounding to q's dtype; MMA, the product of the operands' dtype;
 * BF16_AS_F16.
 *
 * scores_int8.cuh offers the same names for 8-bit scores.
 */
#ifndef WAN_ATTN_CUDA_TILE_SCORES_16BIT_H
#define WAN_ATTN_CUDA_TILE_SCORES_16BIT_H

#include "cuda/tile/multiply_pv.cuh"

enum {
    K_STEPS = HEAD_DIM / 16,
    K_TILE_BYTES = TILE_BYTES,
    Q_SMEM = TILE_BYTES + STAGES * K_TILE_BYTES, /* behind V and K */
    Q_BYTES = Q_IN_REGS ? 0 : BLOCK_M * ROW_BYTES,
    SMEM_BYTES_ASKED = WAN_ATTN_CUDA_SMEM_SM80(HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, Q_IN_REGS),
    /* Four times these loads of Q are under way together. */
    Q_TILES_AT_ONCE = Q_IN_REGS ? M_TILES : 1,
    Q_STEPS_AT_ONCE = Q_IN_REGS || K_STEPS % 4 != 0 ? K_STEPS : 4
};
static_assert(!BF16_AS_F16 || Q_IN_REGS, "a row of Q is scaled where all of it is at hand");

#include "cuda/tile/q_fragments.cuh"

/* Two neighbouring elements of Q as a packed pair of the row's dtype. */
DEVICE u32 load_q_pair(const wan_attn_cuda_args &args, i64 at, bool is_f32) {
    if (!is_f32)
        return load_global_b32((const char *)args.q.data + at * 2);
    float x[2];
    load_global_f32x2(x, (const float *)args.q.data + at);
    return PACK(x[0], x[1]);
}

#if BF16_AS_F16
/* Row r of an m tile from bf16 to f16, times the power of two that brings its largest finite
 * number to between 2^14 and 2^15. Returns what undoes it. */
DEVICE float scale_q_row(u32 q[K_STEPS][4], int r) {
    int exponent = 15; /* biased; less would scale by more than a float holds */
#pragma unroll
    for (int i = 0; i < K_STEPS * 4; i++) {
        u32 pair = q[i / 4][i / 2 % 2 * 2 + r];
        int one = (int)((i % 2 ? pair >> 16 : pair) >> 7 & 255);
        exponent = one == 255 ? exponent : larger_int(exponent, one); /* 255: NaN, infinity */
    }
#pragma unroll
    for (int lane_mask = 1; lane_mask < 4; lane_mask *= 2)
        exponent = larger_int(exponent, (int)shfl_xor_bits((u32)exponent, lane_mask));
    float factor = float_from_bits((u32)(127 + 127 + 14 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < K_STEPS * 2; i++) {
        u32 *pair = &q[i / 2][i % 2 * 2 + r];
        *pair = pack_f16(float_from_bits(*pair << 16) * factor,
                         float_from_bits(*pair & 0xffff0000u) * factor);
    }
    return float_from_bits((u32)(exponent - 14) << 23);
}

/* From bf16 to f16; q.scale then holds what makes scores of the scaled products. */
DEVICE void scale_q(const wan_attn_cuda_args &args, const block_place &place, q_fragments &q) {
    int num_heads_k = args.num_heads_q / args.heads_per_key_head;
    int head = place.head / args.heads_per_key_head;
    float k_scale = load_global_f32(args.k_scale + (i64)place.sample * num_heads_k + head);
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float scale = scale_q_row(q.in_regs[m], r) * k_scale * args.scale_log2e;
            q.scale[m][r] = larger(scale, WAN_ATTN_CUDA_SMALLEST_SCALE);
        }
}
#endif

/* Fragments of one dtype. Nothing between the loads is conditional: a branch would make each wait
 * for the one before it, a trip to memory every time. So a row behind the real length is another
 * copy of the block's first row, which is real; store_rows drops what comes of it. */
DEVICE void load_q_as(const wan_attn_cuda_args &args, const block_place &place, int used_q,
                      q_fragments &q, bool is_f32) {
    i64 head = place.sample * args.q.batch_stride + place.head * args.q.head_stride;
    int t = thread_index() % 4;
#pragma unroll(Q_TILES_AT_ONCE)
    for (int m = 0; m < M_TILES; m++)
#pragma unroll(Q_STEPS_AT_ONCE)
        for (int step = 0; step < K_STEPS; step++) {
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = place.row_begin + row_in_block(m) + i % 2 * 8;
                i64 at = head + (row < used_q ? row : place.row_begin) * args.q.row_stride;
                at += 16 * step + 8 * (i / 2) + 2 * t;
                a[i] = load_q_pair(args, at, is_f32) ^ args.q_sign;
            }
            put_fragment(q, m, step, a);
        }
}

/* Straight from global memory into fragments, so that f32 needs no pass of its own. */
DEVICE void load_q(const wan_attn_cuda_args &args, const block_place &place, int used_q,
                   q_fragments &q) {
    q.smem = find_q_smem();
    if (args.q_is_f32)
        load_q_as(args, place, used_q, q, true);
    else
        load_q_as(args, place, used_q, q, false);
#if BF16_AS_F16
    scale_q(args, place, q);
#endif
}

/* Of scores in base 2, for the lane's rows. */
DEVICE void score_scales(float scale[M_TILES][2], const wan_attn_cuda_args &args,
                         const q_fragments &q) {
#pragma unroll
    for (int i = 0; i < M_TILES * 2; i++)
        scale[i / 2][i % 2] = BF16_AS_F16 ? q.scale[i / 2][i % 2] : args.scale_log2e;
}

/* K of a head on its way to shared memory, as V. */
typedef tile_source k_source;

DEVICE k_source find_k(const wan_attn_cuda_args &args, const block_place &place, int head_k,
                       int first_key) {
    i64 at = place.sample * args.k.batch_stride + head_k * args.k.head_stride;
    return source_of((const char *)args.k.data + at * 2, args.k.row_stride, first_key);
}

/* As copy_tile. stage: the tile's place in shared memory; v_copied_to: where this thread's first
 * chunk is in a tile of V at its start. */
DEVICE void copy_k(u32 stage, u32 v_copied_to, k_source &source, bool has_tail, int rows) {
    copy_tile(v_copied_to + stage, source, has_tail, rows);
}

/* Where row r of matrix i begins for ldmatrix: matrices 0 and 1 are 16 elements of head_dim for 8
 * keys, b0 and b1 of one product; 2 and 3 the same for the next 8 keys. */
DEVICE u32 k_read_at(u32 i, u32 r) { return swizzled(i / 2 * 8 + r, i % 2); }

/* S = Q K(n)^T. stage: the tile's place in shared memory; k_read: this lane's row of a tile at its
 * start. */
DEVICE void multiply_qk(float s[M_TILES][S_TILES][4], const q_fragments &q, u32 stage, u32 k_read) {
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int j = 0; j < S_TILES * 4; j++)
            s[m][j / 4][j % 4] = 0.0f;
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        u32 a[M_TILES][4];
        take_fragments(a, q, step);
#pragma unroll
        for (int j = 0; j < S_TILES; j += 2) {
            u32 b[4];
            ldmatrix_x4(b, advanced(k_read + stage, step) + (u32)(j * 8 * ROW_BYTES));
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                MMA(s[m][j], a[m], b[0], b[1]);
                MMA(s[m][j + 1], a[m], b[2], b[3]);
            }
        }
    }
}

#endif /* WAN_ATTN_CUDA_TILE_SCORES_16BIT_H */
