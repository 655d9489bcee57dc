/* SPDX-License-Identifier: Apache-2.0
 * scores_int8.cuh - S = Q K(n)^T by products of INT8, for the rows of a warp: the same names as
 * scores_16bit.cuh. Integers, steps and factors come from qk8.cuh, as args_qk8.h has them. Includer
 * sets HEAD_DIM, BLOCK_M, BLOCK_N, NUM_WARPS, STAGES, Q_IN_REGS.
 *
 * An integer score becomes a float without a conversion, which on sm_80 has a quarter of the rate:
 * its sum begins at the bits of 1.5 * 2^23, and as long as it stays below 2^22 it moves that float
 * by just its value: 127 * 127 * head_dim does. Then it is multiplied by the key's step, rounded
 * once, as the definition has it; the row's factor is part of softmax.
 * A tile of keys is one dense run of bytes, in memory as in shared memory: a thread copies every
 * NUM_THREADS-th 16 bytes of it, and the tile's end needs no care.
 */
#ifndef WAN_ATTN_CUDA_TILE_SCORES_INT8_H
#define WAN_ATTN_CUDA_TILE_SCORES_INT8_H

#include "cuda/args_qk8.h"
#include "cuda/tile/multiply_pv.cuh"

enum {
    K_STEPS = HEAD_DIM / 32,
    K_ROW_BYTES = HEAD_DIM,
    K_TILE_BYTES = WAN_ATTN_CUDA_QK8_TILE_BYTES(HEAD_DIM),
    K_CHUNKS = K_TILE_BYTES / 16,
    Q_SMEM = TILE_BYTES + STAGES * K_TILE_BYTES, /* behind V and K */
    Q_BYTES = Q_IN_REGS ? 0 : BLOCK_M * HEAD_DIM,
    SMEM_BYTES_ASKED = WAN_ATTN_CUDA_SMEM_QK8(HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, Q_IN_REGS),
    NO_SCORE = 0x4b400000 /* the bits of NO_SCORE_FLOAT */
};
#define NO_SCORE_FLOAT 12582912.0f
static_assert(BLOCK_N == WAN_ATTN_CUDA_QK8_KEYS, "a tile is what qk8.cuh makes of so many keys");
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "a tile's pattern repeats every 8 rows");
static_assert(K_CHUNKS % 32 == 0, "whole warps copy");
static_assert(127 * 127 * HEAD_DIM < 1 << 22, "scores must not leave the float they are added to");

#include "cuda/tile/q_fragments.cuh"

/* A row behind the real length is another copy of the block's first row, which is real; store_rows
 * drops what comes of it. */
DEVICE void load_q(const wan_attn_cuda_args &args, const block_place &place, int used_q,
                   q_fragments &q) {
    i64 head = (i64)(place.sample * args.num_heads_q + place.head) * args.seqlen_q;
    q.smem = find_q_smem();
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
        u32 a[K_STEPS][4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = place.row_begin + row_in_block(m) + 8 * r;
            i64 at = head + (row < used_q ? row : place.row_begin);
            const char *integers = (const char *)args.q.data + at * HEAD_DIM;
#pragma unroll
            for (int i = 0; i < K_STEPS * 2; i++)
                a[i / 2][i % 2 * 2 + r] =
                    load_global_b32(integers + i * 16 + thread_index() % 4 * 4);
            q.scale[m][r] = load_global_f32(args.q_rows + 2 * at);
        }
#pragma unroll
        for (int step = 0; step < K_STEPS; step++)
            put_fragment(q, m, step, a[step]);
    }
}

/* Of scores in base 2, for the lane's rows. */
DEVICE void score_scales(float scale[M_TILES][2], const wan_attn_cuda_args &,
                         const q_fragments &q) {
#pragma unroll
    for (int i = 0; i < M_TILES * 2; i++)
        scale[i / 2][i % 2] = q.scale[i / 2][i % 2];
}

/* K of a head on its way: this thread's first 16 bytes of the tile to be copied next. */
typedef const char *k_source;

DEVICE k_source find_k(const wan_attn_cuda_args &args, const block_place &place, int head_k,
                       int first_key) {
    i64 head = place.sample * (args.num_heads_q / args.heads_per_key_head) + head_k;
    int tiles = (args.seqlen_k + BLOCK_N - 1) / BLOCK_N;
    return (const char *)args.k.data + (head * tiles + first_key / BLOCK_N) * K_TILE_BYTES +
           thread_index() * 16;
}

/* Starts the copy of the source's tile and turns the source to the tile before it, unless a list
 * says which one that is. */
DEVICE void copy_k(u32 stage, u32, k_source &source, bool, int) {
    u32 to = shared_base() + stage + (u32)thread_index() * 16;
#pragma unroll
    for (int chunk = 0; chunk < K_CHUNKS; chunk += NUM_THREADS)
        if (chunk + NUM_THREADS <= K_CHUNKS || thread_index() < K_CHUNKS - chunk) /* warps */
            cp_async_16(to + (u32)chunk * 16, source + chunk * 16);
    if (!LISTED)
        source = stepped_back(source, K_TILE_BYTES);
}

#if LISTED /* as walk_listed.cuh has it for V */
DEVICE void go_back(k_source &source, int tiles) {
    source = stepped_back(source, (i64)tiles * K_TILE_BYTES);
}
#endif

/* Where row r of matrix i begins for ldmatrix: matrices 0 and 1 are 32 bytes of 8 keys, b0 and b1
 * of one product; 2 and 3 the same for the next 8 keys. */
DEVICE u32 k_read_at(u32 i, u32 r) {
    u32 key = i / 2 * 8 + r;
    return key * K_ROW_BYTES + WAN_ATTN_CUDA_QK8_CHUNK(HEAD_DIM, key, i % 2) * 16;
}

/* Integer scores as floats, times their keys' steps, which lie at `steps`. */
DEVICE void scale_by_steps(float s[M_TILES][S_TILES][4], const int sum[M_TILES][S_TILES][4],
                           u32 steps) {
#pragma unroll
    for (int j = 0; j < S_TILES; j += 2) {
        u32 bits[4]; /* of this lane's keys in tiles j and j + 1 */
        load_shared_b32x4(bits, steps + (u32)(j / 2 * 64 + thread_index() % 4 * 16));
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float score = float_from_bits((u32)sum[m][j + i / 4][i % 4]) - NO_SCORE_FLOAT;
                s[m][j + i / 4][i % 4] = score * float_from_bits(bits[i / 4 * 2 + i % 2]);
            }
    }
}

/* S = Q K(n)^T, without the rows' factors. stage: the tile's place in shared memory; k_read: this
 * lane's row of a tile at its start. */
DEVICE void multiply_qk(float s[M_TILES][S_TILES][4], const q_fragments &q, u32 stage, u32 k_read) {
    int sum[M_TILES][S_TILES][4];
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int j = 0; j < S_TILES * 4; j++)
            sum[m][j / 4][j % 4] = NO_SCORE;
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        u32 a[M_TILES][4];
        take_fragments(a, q, step);
#pragma unroll
        for (int j = 0; j < S_TILES; j += 2) {
            u32 b[4];
            ldmatrix_x4(b, ((k_read + stage) ^ (u32)(step * 32)) + (u32)(j * 8 * K_ROW_BYTES));
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                mma_m16n8k32_s8(sum[m][j], a[m], b[0], b[1]);
                mma_m16n8k32_s8(sum[m][j + 1], a[m], b[2], b[3]);
            }
        }
    }
    scale_by_steps(s, sum, shared_base() + stage + BLOCK_N * K_ROW_BYTES);
}

#endif /* WAN_ATTN_CUDA_TILE_SCORES_INT8_H */
