/* SPDX-License-Identifier: Apache-2.0
 * args_lists.h - what the host passes to a kernel that takes lists of blocks (rows listed), and to
 * the passes before it. Plain C, as args.h.
 */
#ifndef WAN_ATTN_CUDA_ARGS_LISTS_H
#define WAN_ATTN_CUDA_ARGS_LISTS_H

#include "cuda/args.h"

#define WAN_ATTN_CUDA_LIST_BLOCK 64 /* queries and keys of a block: WAN_ATTN_BLOCK */

/* block_counts and block_indices of wan_attn.h, where they lie on the device. Nobody has looked at
 * what they hold: a count is clamped to [0, capacity], and an index that is no block of keys is
 * passed over, so that a broken list reads no memory but its own. Their order does not matter. */
typedef struct wan_attn_cuda_lists {
    const int *counts, *indices; /* counts NULL: there are no lists, all blocks are listed */
    /* In elements. */
    wan_attn_i64 count_batch_stride, count_head_stride, count_block_stride;
    wan_attn_i64 batch_stride, head_stride, block_stride, index_stride; /* of indices */
    int capacity;                                                       /* indices' last size */
    int unused;
} wan_attn_cuda_lists;

/* By value, as the launch's one parameter. */
typedef struct wan_attn_cuda_listed_args {
    /* As for every kernel, but there is one part: num_splits = 1. */
    wan_attn_cuda_args call;
    wan_attn_cuda_lists lists;
    /* pools_others: what wan_attn_pool made of K and of V, [batch, num_heads_k][blocks of
     * seqlen_k][head_dim], in the dtype of call.k and call.v and divided by the same scales. NULL:
     * blocks that are not listed count for nothing. */
    const void *pooled_k, *pooled_v;
    /* skip_threshold: what wan_attn_find_nonfinite made of V, [batch, num_heads_k][blocks of
     * seqlen_k], not 0 where an infinity or NaN is among a block's real values. NULL: no threshold.
     */
    const int *nonfinite;
    float log2_threshold; /* of skip_threshold; at most 0 */
    int unused;
    /* lost_mass of the guard: a float that is not negative, raised as an integer, which is ordered
     * as it is. NULL: nobody wants to know. */
    unsigned *lost_mass;
} wan_attn_cuda_listed_args;

/* pool.cuh. Grid, in warps: batch * heads * blocks of seqlen; in blocks of HELPER's threads,
 * rounded up. */
typedef struct wan_attn_cuda_pool_args {
    wan_attn_cuda_view from; /* k or v as the caller has it; no alignment is asked for */
    wan_attn_cuda_lengths seqused;
    void *to;           /* wan_attn_pool: the means, 16-bit; wan_attn_find_nonfinite: 0 or 1, int */
    const float *scale; /* wan_attn_pool: [batch, heads], divides; NULL: 1 */
    int batch, seqlen, heads, head_dim; /* head_dim: even */
    int from_dtype;                     /* wan_attn_dtype: f32, f16 or bf16 */
    int to_bf16;                        /* else f16 */
} wan_attn_cuda_pool_args;

#endif /* WAN_ATTN_CUDA_ARGS_LISTS_H */
