/* SPDX-License-Identifier: Apache-2.0
 * lists.c - what a call with lists of blocks or a skip_threshold has beside the others. Lists stay
 * where they are: nobody here can read them, so that the kernel bears any.
 */
#include <math.h>
#include <string.h>

#include "core/lists.h"
#include "cuda/host/call.h"

/* A pass over the blocks of k or v, if it has a place for what it finds. Means are in the dtype and
 * by the scale of what is multiplied. */
static wan_attn_status survey(const wan_attn_cuda_call *c, wan_attn_cuda_helper helper,
                              const wan_attn_view *from, wan_attn_cuda_lengths seqused_k,
                              wan_attn_cuda_place to, wan_attn_cuda_place scale, int limit) {
    const wan_attn_problem *p = c->p;
    wan_attn_cuda_pool_args args;
    if (to < 0)
        return WAN_ATTN_OK;
    memset(&args, 0, sizeof(args));
    args.from = wan_attn_cuda_view_of(from);
    args.seqused = seqused_k;
    args.to = wan_attn_cuda_at(c, to);
    args.scale = wan_attn_cuda_at(c, scale);
    args.batch = (int)p->batch;
    args.seqlen = (int)p->seqlen_k;
    args.heads = (int)p->num_heads_k;
    args.head_dim = (int)p->head_dim;
    args.from_dtype = (int)from->dtype;
    args.to_bf16 = p->dtype == WAN_ATTN_BF16 && !limit;
    int64_t blocks = p->batch * p->num_heads_k * wan_attn_key_blocks(p->seqlen_k);
    return wan_attn_cuda_launch_warps(c, helper, blocks, &args);
}

wan_attn_status wan_attn_cuda_survey_blocks(const wan_attn_cuda_call *c,
                                            wan_attn_cuda_lengths seqused_k) {
    const wan_attn_view *k = &c->p->k, *v = &c->p->v;
    const wan_attn_cuda_plan *plan = &c->plan;
    wan_attn_status status =
        survey(c, HELPER_wan_attn_pool, k, seqused_k, plan->pooled_k, plan->k_scale, plan->k_limit);
    if (status == WAN_ATTN_OK)
        status = survey(c, HELPER_wan_attn_pool, v, seqused_k, plan->pooled_v, plan->v_scale,
                        plan->v_limit);
    return status == WAN_ATTN_OK
               ? survey(c, HELPER_wan_attn_find_nonfinite, v, seqused_k, plan->nonfinite, -1, 0)
               : status;
}

void wan_attn_cuda_fill_lists(const wan_attn_cuda_call *c, wan_attn_cuda_listed_args *args) {
    const wan_attn_problem *p = c->p;
    const wan_attn_tensor *counts = &p->params->block_counts, *indices = &p->params->block_indices;
    wan_attn_cuda_lists *lists = &args->lists;
    if (p->has_lists) {
        lists->counts = (const int *)counts->data;
        lists->indices = (const int *)indices->data;
        lists->count_batch_stride = wan_attn_stride_of(counts, 0);
        lists->count_head_stride = wan_attn_stride_of(counts, 1);
        lists->count_block_stride = wan_attn_stride_of(counts, 2);
        lists->batch_stride = wan_attn_stride_of(indices, 0);
        lists->head_stride = wan_attn_stride_of(indices, 1);
        lists->block_stride = wan_attn_stride_of(indices, 2);
        lists->index_stride = wan_attn_stride_of(indices, 3);
        /* No list that keeps the contract is longer than there are blocks. */
        int64_t room = indices->shape[3], blocks = wan_attn_key_blocks(p->seqlen_k);
        lists->capacity = (int)(room < blocks ? room : blocks);
    }
    args->pooled_k = wan_attn_cuda_at(c, c->plan.pooled_k);
    args->pooled_v = wan_attn_cuda_at(c, c->plan.pooled_v);
    if (p->skip_threshold > 0.0f) {
        args->nonfinite = (const int *)wan_attn_cuda_at(c, c->plan.nonfinite);
        args->log2_threshold = log2f(p->skip_threshold);
        args->lost_mass = (unsigned *)wan_attn_lost_mass_of(p->params);
    }
}
