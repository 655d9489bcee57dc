/* SPDX-License-Identifier: Apache-2.0
 * refuse.c - which calls a CUDA row takes on the call's device, and with which tile. Asks the
 * driver what the device is, and nothing else of it.
 */
#include <string.h>

#include "cuda/args_guard.h"
#include "cuda/args_qk8.h"
#include "cuda/host/plan.h"
#include "cuda/host/proof.h"

static const wan_attn_cuda_tile *tile_for(const wan_attn_problem *p, int32_t arch) {
    int is_masked =
        p->window_size_left < WAN_ATTN_UNBOUNDED || p->window_size_right < WAN_ATTN_UNBOUNDED;
    return wan_attn_cuda_tile_of(p->kernel_name, arch, is_masked, p->seqlen_q);
}

/* What is asked of the sizes before there is a plan: it multiplies them. */
const char *wan_attn_cuda_refuse_sizes(const wan_attn_problem *p) {
    const int64_t most = WAN_ATTN_CUDA_UNBOUNDED, blocks = INT32_MAX;
    int64_t heads = p->batch * p->num_heads_q;
    if (p->seqlen_q >= most || p->seqlen_k >= most)
        return "takes lengths below 2^29";
    if (heads > blocks || p->seqlen_q > blocks / (heads ? heads : 1) ||
        p->seqlen_k > blocks / (heads ? heads : 1))
        return "takes batch * num_heads_q * seqlen below 2^31";
    return NULL;
}

/* Passes count warps and threads in 31 bits, also where they have more of them than the call has
 * rows: those of qk8.cuh whole tiles of keys and a thread a channel, a guard 64 rows a warp. */
static const char *refuse_counts(const wan_attn_problem *p, int is_int8) {
    const int64_t most = INT32_MAX;
    int64_t heads_q = p->batch * p->num_heads_q, heads_k = p->batch * p->num_heads_k;
    int64_t keys = wan_attn_divide_up(p->seqlen_k, WAN_ATTN_CUDA_QK8_KEYS) * WAN_ATTN_CUDA_QK8_KEYS;
    if (is_int8 && (heads_k * keys > most || heads_k * p->head_dim > most))
        return "takes batch * num_heads_k, times seqlen_k in whole tiles of 64 or times head_dim, "
               "below 2^31";
    if (p->params->guard &&
        heads_q * wan_attn_divide_up(p->seqlen_q, WAN_ATTN_CUDA_GUARD_ROWS) +
                heads_k * wan_attn_divide_up(p->seqlen_k, WAN_ATTN_CUDA_GUARD_ROWS) >
            most)
        return "takes, with a guard, fewer than 2^31 blocks of 64 rows of q and v";
    return NULL;
}

/* What the tile asks of a call. */
static const char *refuse_tile(const wan_attn_problem *p, const wan_attn_cuda_tile *tile) {
    if (!tile)
        return "has no tile for this GPU";
    if (tile->body != WAN_ATTN_CUDA_SM90)
        return NULL;
    if (p->seqlen_k == 0 || wan_attn_cuda_is_split(p))
        return "does not take calls without keys, nor calls of at most 256 queries over more than "
               "4,096 keys; those run on a kernel that splits the keys";
    return NULL;
}

const char *wan_attn_cuda_refuse_out(const wan_attn_problem *p) {
    int64_t four = 4 * wan_attn_dtype_size(p->out.dtype);
    return wan_attn_cuda_is_aligned(&p->out, p->batch, p->seqlen_q, p->num_heads_q, four)
               ? NULL
               : "needs out and its strides to be multiples of four elements";
}

_Static_assert(sizeof(wan_attn_cuda_plan) <= sizeof(wan_attn_row_plan),
               "a problem carries the plan");

const char *wan_attn_cuda_plan_call(wan_attn_problem *p) {
    const wan_attn_cuda_device *device = wan_attn_cuda_find_device(p->params->q.device_index, NULL);
    if (device && wan_attn_cuda_is_for_half_rate(p->kernel_name) && !device->is_half_rate)
        return "is faster only on cards whose tensor cores accumulate f32 at half rate (GeForce "
               "RTX 30 to 50)";
    const wan_attn_cuda_tile *tile = device ? tile_for(p, device->arch) : NULL;
    const char *why = refuse_tile(p, tile);
    if (!why && tile->qk_int8 && !tile->is_listed && wan_attn_cuda_is_hopper(device->arch))
        why = "is slower than sdpa_sm90 on Hopper, whose full rate mma.sync does not reach";
    if (!why)
        why = wan_attn_cuda_refuse_sizes(p);
    if (!why)
        why = refuse_counts(p, tile->qk_int8);
    if (!why && p->out.data)
        why = wan_attn_cuda_refuse_out(p);
    if (!why)
        why = wan_attn_cuda_refuse_unproven(p->params->q.device_index, p->kernel, p->kernel_name,
                                            p->dtype);
    if (why)
        return why;
    wan_attn_cuda_plan plan = wan_attn_cuda_make_plan(p, tile);
    int64_t heads = p->batch * p->num_heads_q;
    if ((int64_t)plan.m_blocks * plan.num_splits > INT32_MAX / (heads ? heads : 1))
        return "takes batch * num_heads_q * seqlen below 2^31";
    memcpy(&p->plan, &plan, sizeof(plan));
    p->workspace_size = (size_t)plan.workspace_bytes;
    return NULL;
}
