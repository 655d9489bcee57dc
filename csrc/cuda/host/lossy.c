/* SPDX-License-Identifier: Apache-2.0
 * lossy.c - the passes that a call of 8-bit scores has beside the others: before it, q and k become
 * INT8; after it, a guard gets what v and out tell. Any row can be guarded.
 */
#include <math.h>
#include <string.h>

#include "cuda/args_guard.h"
#include "cuda/args_qk8.h"
#include "cuda/host/call.h"

static wan_attn_status quantise_k(const wan_attn_cuda_call *c, wan_attn_cuda_lengths seqused_k,
                                  wan_attn_cuda_qk8_args *args) {
    const wan_attn_problem *p = c->p;
    int64_t heads = p->batch * p->num_heads_k, tiles = c->plan.qk8_tiles;
    args->from = wan_attn_cuda_view_of(&p->k);
    args->seqused = seqused_k;
    args->to = wan_attn_cuda_at(c, c->plan.qk8_keys);
    args->seqlen = (int)p->seqlen_k;
    args->heads = (int)p->num_heads_k;
    args->from_dtype = (int)p->k.dtype;
    wan_attn_status status =
        wan_attn_cuda_launch_warps(c, HELPER_wan_attn_sum_keys, heads * tiles, args);
    if (status == WAN_ATTN_OK) /* a thread a channel: head_dim is a multiple of 32 */
        status = wan_attn_cuda_launch_warps(c, HELPER_wan_attn_mean_of_keys,
                                            heads * p->head_dim / 32, args);
    return status == WAN_ATTN_OK
               ? wan_attn_cuda_launch_warps(c, HELPER_wan_attn_quantise_k,
                                            heads * tiles * WAN_ATTN_CUDA_QK8_KEYS, args)
               : status;
}

static wan_attn_status quantise_q(const wan_attn_cuda_call *c, wan_attn_cuda_lengths seqused_q,
                                  wan_attn_cuda_qk8_args *args) {
    const wan_attn_problem *p = c->p;
    args->from = wan_attn_cuda_view_of(&p->q);
    args->seqused = seqused_q;
    args->to = wan_attn_cuda_at(c, c->plan.qk8_queries);
    args->rows = wan_attn_cuda_at(c, c->plan.qk8_rows);
    args->seqlen = (int)p->seqlen_q;
    args->heads = (int)p->num_heads_q;
    args->from_dtype = (int)p->q.dtype;
    args->heads_per_key_head = (int)(p->num_heads_q / p->num_heads_k);
    args->is_negated = p->softmax_scale < 0;
    double factor = fabs(p->softmax_scale) * WAN_ATTN_LOG2_E / (double)p->head_dim;
    args->factor =
        factor > WAN_ATTN_CUDA_SMALLEST_SCALE ? (float)factor : WAN_ATTN_CUDA_SMALLEST_SCALE;
    /* Parts are put together by their lse. */
    args->scale = p->lse || c->plan.num_splits > 1 ? (float)p->softmax_scale : 0.0f;
    return wan_attn_cuda_launch_warps(c, HELPER_wan_attn_quantise_q,
                                      p->batch * p->num_heads_q * p->seqlen_q, args);
}

wan_attn_status wan_attn_cuda_quantise(const wan_attn_cuda_call *c, wan_attn_cuda_lengths seqused_q,
                                       wan_attn_cuda_lengths seqused_k) {
    if (c->plan.qk8_keys < 0)
        return WAN_ATTN_OK;
    wan_attn_cuda_qk8_args args;
    memset(&args, 0, sizeof(args));
    args.sums = wan_attn_cuda_at(c, c->plan.qk8_sums);
    args.mean = wan_attn_cuda_at(c, c->plan.qk8_mean);
    args.batch = (int)c->p->batch;
    args.head_dim = (int)c->p->head_dim;
    args.tiles = c->plan.qk8_tiles;
    wan_attn_status status = quantise_k(c, seqused_k, &args);
    return status == WAN_ATTN_OK ? quantise_q(c, seqused_q, &args) : status;
}

wan_attn_status wan_attn_cuda_watch(const wan_attn_cuda_call *c, wan_attn_cuda_lengths seqused_k) {
    const wan_attn_problem *p = c->p;
    if (!p->params->guard)
        return WAN_ATTN_OK;
    wan_attn_cuda_guard_args args;
    memset(&args, 0, sizeof(args));
    args.v = wan_attn_cuda_view_of(&p->v);
    args.out = wan_attn_cuda_view_of(&p->out);
    args.seqused_k = seqused_k;
    args.guard = p->params->guard;
    args.batch = (int)p->batch;
    args.seqlen_q = (int)p->seqlen_q;
    args.seqlen_k = (int)p->seqlen_k;
    args.num_heads_q = (int)p->num_heads_q;
    args.num_heads_k = (int)p->num_heads_k;
    args.head_dim = (int)p->head_dim;
    args.v_dtype = (int)p->v.dtype;
    args.out_dtype = (int)p->out.dtype;
    int64_t q_blocks = wan_attn_divide_up(p->seqlen_q, WAN_ATTN_CUDA_GUARD_ROWS);
    int64_t k_blocks = wan_attn_divide_up(p->seqlen_k, WAN_ATTN_CUDA_GUARD_ROWS);
    return wan_attn_cuda_launch_warps(
        c, HELPER_wan_attn_watch,
        p->batch * (p->num_heads_q * q_blocks + p->num_heads_k * k_blocks), &args);
}
