/* SPDX-License-Identifier: Apache-2.0
 * multiply_pv.cuh - O += P V(n) by mma.sync, for the rows of a warp: P from its registers, V from
 * shared memory. Includer sets HEAD_DIM, BLOCK_M, BLOCK_N, NUM_WARPS, PV_SUM_F16, QK_INT8; PACK_P
 * and MMA, rounding and product of the operands' dtype.
 */
#ifndef WAN_ATTN_CUDA_TILE_MULTIPLY_PV_H
#define WAN_ATTN_CUDA_TILE_MULTIPLY_PV_H

#include "cuda/tile/softmax.cuh"
#include "cuda/tile/swizzle.cuh"

/* What a tensor core sums is cut off at every product, not rounded (ptx/mma.cuh): O would shrink
 * with the number of keys. So parts are summed from zero and added to O with rounding: 32 keys
 * where they are summed in f16 (64 would be cheaper, but a V far from zero mean then has larger
 * errors than bf16 with f32 sums; those of 8-bit scores are far larger still), else a tile. Where O
 * and S leave no registers for that, O is the tensor cores' own sum. */
#ifndef PV_IN_PARTS
#define PV_IN_PARTS (BLOCK_M == 16 * NUM_WARPS && HEAD_DIM + BLOCK_N < 288)
#endif
static_assert(PV_IN_PARTS || !PV_SUM_F16, "O itself is f32");

enum {
    M_TILES = BLOCK_M / (16 * NUM_WARPS),
    V_STEPS = BLOCK_N / 16,
    PART_STEPS = PV_SUM_F16 && !QK_INT8 ? 2 : V_STEPS
};
static_assert(V_STEPS % PART_STEPS == 0, "the last part must be added as well");

/* Keys 16 * step and on of P, rounded: the A operand of a product with V. */
DEVICE void pack_p(u32 a[4], const float p[S_TILES][4], int step) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *pair = &p[2 * step + i / 2][2 * (i % 2)];
        a[i] = PACK_P(pair[0], pair[1]);
    }
}

#if PV_SUM_F16
typedef u32 pv_part[2];
#define MULTIPLY_PART mma_m16n8k16_f16_sum_f16
DEVICE void add_part(float o[4], const pv_part sum) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float low, high;
        unpack_f16(&low, &high, sum[r]);
        o[2 * r] += low;
        o[2 * r + 1] += high;
    }
}
#else
typedef float pv_part[4];
#define MULTIPLY_PART MMA
DEVICE void add_part(float o[4], const pv_part sum) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        o[i] += sum[i];
}
#endif

#if PV_IN_PARTS
/* O += P V(n), in parts of PART_STEPS products that tensor cores sum from zero. Columns are the
 * outer loop, so that a few accumulators suffice. */
DEVICE void multiply_pv(float o[M_TILES][O_TILES][4], const float p[M_TILES][S_TILES][4],
                        u32 v_read, u32 tile = 0) {
    u32 a[M_TILES][V_STEPS][4];
#pragma unroll
    for (int i = 0; i < M_TILES * V_STEPS; i++)
        pack_p(a[i / V_STEPS][i % V_STEPS], p[i / V_STEPS], i % V_STEPS);
#pragma unroll
    for (int j = 0; j < O_TILES; j += 2) {
        pv_part sum[M_TILES][2];
#pragma unroll
        for (int step = 0; step < V_STEPS; step++) {
            u32 b[4];
            ldmatrix_x4_trans(b, advanced(v_read, j / 2) + tile + (u32)(step * 16 * ROW_BYTES));
#pragma unroll
            for (int i = 0; i < M_TILES * 2; i++) {
                int m = i / 2, column = i % 2;
                pv_part &to = sum[m][column];
#pragma unroll
                for (int e = 0; e < (int)(sizeof(pv_part) / 4) && step % PART_STEPS == 0; e++)
                    to[e] = 0;
                MULTIPLY_PART(to, a[m][step], b[2 * column], b[2 * column + 1]);
                if (step % PART_STEPS == PART_STEPS - 1)
                    add_part(o[m][j + column], to);
            }
        }
    }
}
#else
/* O += P V(n), O being the tensor cores' own sum. */
DEVICE void multiply_pv(float o[M_TILES][O_TILES][4], const float p[M_TILES][S_TILES][4],
                        u32 v_read, u32 tile = 0) {
#pragma unroll
    for (int step = 0; step < V_STEPS; step++) {
        u32 a[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
            pack_p(a[m], p[m], step);
#pragma unroll
        for (int j = 0; j < O_TILES; j += 2) {
            u32 b[4];
            ldmatrix_x4_trans(b, advanced(v_read, j / 2) + tile + (u32)(step * 16 * ROW_BYTES));
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                MMA(o[m][j], a[m], b[0], b[1]);
                MMA(o[m][j + 1], a[m], b[2], b[3]);
            }
        }
    }
}
#endif

#endif /* WAN_ATTN_CUDA_TILE_MULTIPLY_PV_H */
