/* SPDX-License-Identifier: Apache-2.0
 * plan.h - which passes a call needs on a GPU, and where each has its place in the workspace.
 */
#ifndef WAN_ATTN_CUDA_HOST_PLAN_H
#define WAN_ATTN_CUDA_HOST_PLAN_H

#include "core/util.h"
#include "cuda/args.h"
#include "cuda/host/programs.h"

/* Bytes from the start of the workspace; -1: not needed. */
typedef int64_t wan_attn_cuda_place;

typedef struct wan_attn_cuda_plan {
    const wan_attn_cuda_tile *tile;
    /* Lengths that come from the CPU and are not all the padded one: i32 [batch]. */
    wan_attn_cuda_place seqused_q, seqused_k;
    /* Dense 16-bit copies of operands that the kernel cannot read as they are. */
    wan_attn_cuda_place q, k, v;
    /* Where K or V has a limit: the largest of each part of a head, the head's scale. */
    wan_attn_cuda_place k_largest, k_scale, v_largest, v_scale;
    /* 8-bit scores: sums of keys, their mean; the keys, the queries and what goes with them. */
    wan_attn_cuda_place qk8_sums, qk8_mean, qk8_keys, qk8_queries, qk8_rows;
    int qk8_tiles;
    /* Lists of blocks: the means of K's and V's blocks. skip_threshold: which of V's blocks have an
     * infinity or NaN, i32 [batch, num_heads_k, blocks]. */
    wan_attn_cuda_place pooled_k, pooled_v, nonfinite;
    int measured_parts;
    int k_limit, v_limit; /* they have to be f16, scaled by the head so that the largest value is
                             below 2^limit; 0: as they are */
    /* Split over keys: parts of the result in f32. One part: none, straight to out and lse. */
    wan_attn_cuda_place part_out, part_lse;
    int num_splits, split_tiles;
    int m_blocks;
    int64_t workspace_bytes;
} wan_attn_cuda_plan;

/* Whether all strides and the start are multiples of `bytes`; a dimension that is not walked along
 * may have any stride. */
int wan_attn_cuda_is_aligned(const wan_attn_view *view, int64_t batch, int64_t rows, int64_t heads,
                             int64_t bytes);

/* Whether TMA takes these strides, where a dimension is walked along: each is
 * above 0 and below 2^40 bytes. */
int wan_attn_cuda_is_spread(const wan_attn_view *view, int64_t batch, int64_t rows, int64_t heads);

/* Whether a call has so few rows and so many keys that they are shared out, where a row can. */
int wan_attn_cuda_is_split(const wan_attn_problem *problem);

/* `bytes` more of a workspace, aligned for every use. */
static inline wan_attn_cuda_place wan_attn_cuda_reserve(int64_t *workspace_bytes, int64_t bytes) {
    wan_attn_cuda_place place = *workspace_bytes;
    *workspace_bytes += wan_attn_divide_up(bytes, 256) * 256;
    return place;
}

/* In how many parts wan_attn_measure looks at a head of so many rows. */
int wan_attn_cuda_measured_parts(int64_t rows);

/* The plan of a call that the row takes with this tile: refuse.c has looked at its sizes. */
wan_attn_cuda_plan wan_attn_cuda_make_plan(const wan_attn_problem *problem,
                                           const wan_attn_cuda_tile *tile);

/* refuse.c: why no row can count a call of these sizes, or NULL. */
const char *wan_attn_cuda_refuse_sizes(const wan_attn_problem *problem);

/* refuse.c: why no row can write its results to the call's out, or NULL. */
const char *wan_attn_cuda_refuse_out(const wan_attn_problem *problem);

#endif /* WAN_ATTN_CUDA_HOST_PLAN_H */
