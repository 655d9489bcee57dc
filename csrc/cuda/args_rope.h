/* SPDX-License-Identifier: Apache-2.0
 * args_rope.h - what the host passes to a kernel of rms_norm_rope. Plain C, CUDA C and C++, as
 * args.h.
 *
 * Launch: one block for each token, grid (seqlen * batch, 1, 1), block (num_threads, 1, 1), dynamic
 * shared memory WAN_ATTN_CUDA_SMEM_ROPE. The op itself: wan_attn.h.
 */
#ifndef WAN_ATTN_CUDA_ARGS_ROPE_H
#define WAN_ATTN_CUDA_ARGS_ROPE_H

#include "cuda/args.h"

/* Samples of one launch, where the host knows their grids. */
enum { WAN_ATTN_CUDA_MOST_GRIDS = 64 };

typedef struct wan_attn_cuda_rope_args {
    wan_attn_cuda_view x, out; /* out may be x */
    const void *weight;        /* [num_heads * head_dim] or [head_dim]; NULL: 1 */
    /* cos and sin of each pair in turn; data == NULL: no rotation. With has_grid a row for each
     * position, row_stride apart; else each token's own. */
    wan_attn_cuda_view table;
    const void *grid_sizes; /* [batch, 3] in device memory, clamped to positions; NULL: in grids */
    wan_attn_i64 grid_batch_stride, grid_axis_stride;
    int grids[WAN_ATTN_CUDA_MOST_GRIDS][3];
    float inverse_size[2]; /* 1 / how many elements a norm goes over, and what the float lacks */
    float eps[2];          /* the same of eps */
    int seqlen, num_heads, head_dim;
    int seqlen_offset;                    /* seqlen_offset + seqlen is below 2^31 */
    int positions;                        /* that the table has, if has_grid */
    int weight_head_stride;               /* head_dim, or 0: the same for each head */
    int x_dtype, out_dtype, weight_dtype; /* wan_attn_dtype */
    int table_is_f64, has_grid, grid_is_i64;
    int has_norm, is_per_head;
    int rounds_n, rounds_y; /* to x's dtype; y is never rounded to another one */
    int num_threads;        /* of a block: a multiple of 32 */

    /* rope.cuh: threads side by side along head_dim; heads side by side, of which each thread takes
     * one in num_groups; ceil(65536 / slots), to divide by. */
    int slots, num_groups, slot_factor;
} wan_attn_cuda_rope_args;

/* Bytes of shared memory of a block: 16 for each pair of the longest head_dim, 16 more for every
 * eight of them (tile/rope_token.cuh), 16 for the sum of each of up to 16 warps. */
#define WAN_ATTN_CUDA_SMEM_ROPE (16 * (128 + 16 + 16))

#endif /* WAN_ATTN_CUDA_ARGS_ROPE_H */
