/* SPDX-License-Identifier: Apache-2.0
 * args_qk8.h - what the host passes to the passes that make q and k INT8 (qk8.cuh), and how the
 * keys then lie in memory. Plain C, as args.h.
 *
 *     a tile of keys      as it will lie in shared memory: 64 keys in INT8, [64][head_dim], the 16
 *                         bytes of a row in the order of WAN_ATTN_CUDA_QK8_CHUNK; then their 64
 *                         steps in float32, in the order of WAN_ATTN_CUDA_QK8_PLACE; then 256
 *                         bytes that nobody uses, so that warps copy all of it 512 bytes at a time
 *     the keys            [batch, num_heads_k][tiles], dense; behind a sample's last key zeros, up
 *                         to the end of that tile
 *     the queries         [batch, num_heads_q][seqlen_q][head_dim] in INT8, dense
 *     what goes with them [batch, num_heads_q][seqlen_q][2]: what the row's scores are multiplied
 *                         by, in base 2, and what K's mean adds to the row's lse
 */
#ifndef WAN_ATTN_CUDA_ARGS_QK8_H
#define WAN_ATTN_CUDA_ARGS_QK8_H

#include "cuda/args.h"

#define WAN_ATTN_CUDA_QK8_KEYS 64 /* of a tile, and of one of the sums that make K's mean */
/* Where 16 bytes of a key lie in its row, so that rows of one ldmatrix lie on different banks: the
 * XOR of tile/swizzle.cuh. */
#define WAN_ATTN_CUDA_QK8_CHUNK(head_dim, n, chunk)                                                \
    ((chunk) ^ (n) / (128 / (head_dim)) % ((head_dim) / 16))
#define WAN_ATTN_CUDA_QK8_TILE_BYTES(head_dim) (WAN_ATTN_CUDA_QK8_KEYS * ((head_dim) + 8))
/* Where key n of a tile has its step. Lane t of four wants the keys 8 j + 2 t and 8 j + 2 t + 1; of
 * two j together they are 16 bytes, and those of the four lanes are neighbours. */
#define WAN_ATTN_CUDA_QK8_PLACE(n) ((n) / 16 * 16 + (n) % 8 / 2 * 4 + (n) / 8 % 2 * 2 + (n) % 2)

/* Grids, in warps: sum_keys batch * heads * tiles; mean_of_keys batch * heads * head_dim / 32, one
 * thread a channel; quantise_k batch * heads * tiles * WAN_ATTN_CUDA_QK8_KEYS; quantise_q batch *
 * heads * seqlen; in blocks of HELPER's threads, rounded up. */
typedef struct wan_attn_cuda_qk8_args {
    wan_attn_cuda_view from; /* k; quantise_q: q. No alignment is asked for */
    wan_attn_cuda_lengths seqused;
    float *sums;                        /* [batch, num_heads_k][tiles][head_dim] */
    float *mean;                        /* [batch, num_heads_k][head_dim] */
    void *to;                           /* quantise_k: the keys; quantise_q: the queries */
    float *rows;                        /* quantise_q: what goes with them */
    int batch, seqlen, heads, head_dim; /* of `from`; head_dim: 64 or 128 */
    int from_dtype;                     /* wan_attn_dtype: f32, f16 or bf16 */
    int tiles;                          /* of WAN_ATTN_CUDA_QK8_KEYS keys, that seqlen_k fills */
    int heads_per_key_head;             /* quantise_q */
    int is_negated;                     /* quantise_q: softmax_scale is negative */
    /* quantise_q: |softmax_scale| * log2(e) / head_dim, because the rotation has made q and k
     * sqrt(head_dim) times as large; at least WAN_ATTN_CUDA_SMALLEST_SCALE. */
    float factor;
    float scale; /* quantise_q: softmax_scale; 0: nobody wants lse */
} wan_attn_cuda_qk8_args;

#endif /* WAN_ATTN_CUDA_ARGS_QK8_H */
