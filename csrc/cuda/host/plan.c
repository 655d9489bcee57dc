/* SPDX-License-Identifier: Apache-2.0
 * plan.c - what a call needs besides the attention kernel itself. Most calls: nothing.
 */
#include "cuda/host/plan.h"

#include "core/lists.h"
#include "cuda/args_qk8.h"

enum {
    /* A call of few rows leaves most of a GPU idle unless its keys are shared out. Both numbers are
     * fixed, so that neither batch nor device changes a bit of the result (arXiv 2307.08691 has the
     * idea; that it must not depend on them: flash-attention issues 1897 and 1922). */
    SPLIT_MAX_ROWS = 256,
    SPLIT_KEYS = 4096,
    ROWS_MEASURED_BY_A_WARP = 512,
    MAX_PARTS = 64
};

static wan_attn_cuda_place reserve(wan_attn_cuda_plan *plan, int64_t bytes) {
    return wan_attn_cuda_reserve(&plan->workspace_bytes, bytes);
}

int wan_attn_cuda_measured_parts(int64_t rows) {
    int64_t parts = wan_attn_divide_up(rows, ROWS_MEASURED_BY_A_WARP);
    return (int)(parts < 1 ? 1 : parts < MAX_PARTS ? parts : MAX_PARTS);
}

int wan_attn_cuda_is_aligned(const wan_attn_view *v, int64_t batch, int64_t rows, int64_t heads,
                             int64_t bytes) {
    int64_t size = wan_attn_dtype_size(v->dtype);
    int64_t strides = (batch > 1 ? v->batch_stride : 0) | (rows > 1 ? v->row_stride : 0) |
                      (heads > 1 ? v->head_stride : 0);
    return ((int64_t)(intptr_t)v->data | strides * size) % bytes == 0;
}

/* Lengths that a kernel cannot read. */
static int must_be_put(const wan_attn_lengths *lengths) {
    return lengths->data && lengths->device_type == WAN_ATTN_CPU;
}

static void plan_scale(const wan_attn_problem *p, wan_attn_cuda_plan *plan,
                       wan_attn_cuda_place *largest, wan_attn_cuda_place *scale) {
    int64_t heads = p->batch * p->num_heads_k;
    *largest = reserve(plan, heads * plan->measured_parts * 4);
    *scale = reserve(plan, heads * 4);
}

static int is_step(int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride < ((int64_t)1 << 39)); /* of two bytes each */
}

int wan_attn_cuda_is_spread(const wan_attn_view *v, int64_t batch, int64_t rows, int64_t heads) {
    return is_step(batch, v->batch_stride) && is_step(rows, v->row_stride) &&
           is_step(heads, v->head_stride);
}

/* Whether the kernel must not read this operand where it is. bytes: the alignment it wants. */
static int must_be_copied(const wan_attn_cuda_tile *tile, const wan_attn_view *v, int64_t batch,
                          int64_t rows, int64_t heads, int64_t bytes) {
    if (tile->body == WAN_ATTN_CUDA_SM90 &&
        (v->dtype == WAN_ATTN_F32 || !wan_attn_cuda_is_spread(v, batch, rows, heads)))
        return 1;
    return !wan_attn_cuda_is_aligned(v, batch, rows, heads,
                                     tile->body == WAN_ATTN_CUDA_SM90 ? 16 : bytes);
}

static void plan_copies(const wan_attn_problem *p, wan_attn_cuda_plan *plan) {
    int64_t q_bytes = p->batch * p->seqlen_q * p->num_heads_q * p->head_dim * 2;
    int64_t k_bytes = p->batch * p->seqlen_k * p->num_heads_k * p->head_dim * 2;
    int64_t q_pair = 2 * wan_attn_dtype_size(p->q.dtype);
    plan->measured_parts = wan_attn_cuda_measured_parts(p->seqlen_k);
    if (plan->k_limit)
        plan_scale(p, plan, &plan->k_largest, &plan->k_scale);
    if (plan->v_limit)
        plan_scale(p, plan, &plan->v_largest, &plan->v_scale);
    int is_int8 = plan->tile->qk_int8;
    if (!is_int8 &&
        must_be_copied(plan->tile, &p->q, p->batch, p->seqlen_q, p->num_heads_q, q_pair))
        plan->q = reserve(plan, q_bytes);
    if (!is_int8 && (plan->k_limit || p->k.dtype == WAN_ATTN_F32 ||
                     must_be_copied(plan->tile, &p->k, p->batch, p->seqlen_k, p->num_heads_k, 16)))
        plan->k = reserve(plan, k_bytes);
    if (plan->v_limit ||
        must_be_copied(plan->tile, &p->v, p->batch, p->seqlen_k, p->num_heads_k, 16))
        plan->v = reserve(plan, k_bytes);
}

/* Room for what the passes of qk8.cuh make. */
static void plan_integers(const wan_attn_problem *p, wan_attn_cuda_plan *plan) {
    int64_t tiles = wan_attn_divide_up(p->seqlen_k, WAN_ATTN_CUDA_QK8_KEYS);
    int64_t heads_k = p->batch * p->num_heads_k, rows = p->batch * p->num_heads_q * p->seqlen_q;
    plan->qk8_tiles = (int)tiles;
    plan->qk8_sums = reserve(plan, heads_k * tiles * p->head_dim * 4);
    plan->qk8_mean = reserve(plan, heads_k * p->head_dim * 4);
    plan->qk8_keys = reserve(plan, heads_k * tiles * WAN_ATTN_CUDA_QK8_TILE_BYTES(p->head_dim));
    plan->qk8_queries = reserve(plan, rows * p->head_dim);
    plan->qk8_rows = reserve(plan, rows * 8);
}

/* Room for what the passes of pool.cuh make. */
static void plan_blocks(const wan_attn_problem *p, wan_attn_cuda_plan *plan) {
    int64_t blocks = p->batch * p->num_heads_k * wan_attn_key_blocks(p->seqlen_k);
    if (p->pools_others) {
        plan->pooled_k = reserve(plan, blocks * p->head_dim * 2);
        plan->pooled_v = reserve(plan, blocks * p->head_dim * 2);
    }
    if (p->skip_threshold > 0.0f)
        plan->nonfinite = reserve(plan, blocks * 4);
}

int wan_attn_cuda_is_split(const wan_attn_problem *p) {
    return p->seqlen_q <= SPLIT_MAX_ROWS && p->seqlen_k > SPLIT_KEYS;
}

static void plan_split(const wan_attn_problem *p, wan_attn_cuda_plan *plan) {
    int64_t k_tiles = wan_attn_divide_up(p->seqlen_k, plan->tile->block_n);
    plan->num_splits = 1;
    plan->split_tiles = (int)(k_tiles > 1 ? k_tiles : 1);
    int is_sm90 = plan->tile->body == WAN_ATTN_CUDA_SM90;
    if (is_sm90)
        plan->split_tiles = WAN_ATTN_CUDA_UNBOUNDED / plan->tile->block_n; /* as args_sm90.h asks */
    if (is_sm90 || plan->tile->is_listed || !wan_attn_cuda_is_split(p))
        return;
    plan->split_tiles = SPLIT_KEYS / plan->tile->block_n;
    plan->num_splits = (int)wan_attn_divide_up(k_tiles, plan->split_tiles);
    int64_t rows = plan->num_splits * p->batch * p->seqlen_q * p->num_heads_q;
    plan->part_out = reserve(plan, rows * p->head_dim * 4);
    plan->part_lse = reserve(plan, rows * 4);
}

wan_attn_cuda_plan wan_attn_cuda_make_plan(const wan_attn_problem *p,
                                           const wan_attn_cuda_tile *tile) {
    wan_attn_cuda_plan plan = {.tile = tile};
    plan.seqused_q = plan.seqused_k = plan.q = plan.k = plan.v = -1;
    plan.k_largest = plan.k_scale = plan.v_largest = plan.v_scale = -1;
    plan.part_out = plan.part_lse = -1;
    plan.pooled_k = plan.pooled_v = plan.nonfinite = -1;
    plan.qk8_sums = plan.qk8_mean = plan.qk8_keys = plan.qk8_queries = plan.qk8_rows = -1;
    plan.m_blocks = (int)wan_attn_divide_up(p->seqlen_q, tile->block_m * tile->cluster);
    plan.m_blocks *= tile->cluster;
    if (tile->has_f16_alone && p->dtype == WAN_ATTN_BF16)
        plan.k_limit = plan.v_limit = WAN_ATTN_CUDA_LIMIT_F16;
    if (tile->qk_int8)
        plan.k_limit = 0;
    if (tile->pv_sum_f16)
        plan.v_limit = WAN_ATTN_CUDA_LIMIT_SUM_F16;
    if (must_be_put(&p->seqused_q))
        plan.seqused_q = reserve(&plan, p->batch * 4);
    if (must_be_put(&p->seqused_k))
        plan.seqused_k = reserve(&plan, p->batch * 4);
    plan_copies(p, &plan);
    if (tile->qk_int8)
        plan_integers(p, &plan);
    if (tile->is_listed)
        plan_blocks(p, &plan);
    plan_split(p, &plan);
    return plan;
}
