/* SPDX-License-Identifier: Apache-2.0
 * backward.c - gradients on a GPU: which calls a row takes, what each pass needs of the workspace,
 * and their launches (args_backward.h has the order). As launch.c: waits for nothing, allocates
 * nothing, reads nothing from the device.
 */
#include "core/backward.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "cuda/args_backward.h"
#include "cuda/host/call.h"
#include "cuda/host/proof.h"

typedef struct backward_plan {
    const wan_attn_cuda_backward_tile *of_keys, *of_queries;
    /* Lengths that come from the CPU. */
    wan_attn_cuda_place seqused_q, seqused_k;
    /* Dense 16-bit copies of operands that the kernels cannot read as they are. */
    wan_attn_cuda_place q, k, v, dout;
    wan_attn_cuda_place rows;
    /* Products in f16: as wan_attn_cuda_backward_scale_args has them. */
    wan_attn_cuda_place sizes, largest, scales, dout_scale;
    int measured_parts;
    int64_t workspace_bytes;
} backward_plan;

_Static_assert(sizeof(backward_plan) <= sizeof(wan_attn_row_plan), "a problem carries the plan");

/* One call on its way: what its passes share. */
typedef struct backward_call {
    wan_attn_cuda_call c; /* its plan is not used */
    const wan_attn_backward_problem *p;
    backward_plan plan;
    wan_attn_cuda_lengths seqused_q, seqused_k;
} backward_call;

/* An operand, and its sizes. */
typedef struct operand {
    const wan_attn_view *view;
    int64_t seqlen, heads;
} operand;

static operand of_queries(const wan_attn_problem *call, const wan_attn_view *view) {
    operand found = {view, call->seqlen_q, call->num_heads_q};
    return found;
}

static operand of_keys(const wan_attn_problem *call, const wan_attn_view *view) {
    operand found = {view, call->seqlen_k, call->num_heads_k};
    return found;
}

static int is_aligned(const wan_attn_problem *call, operand x, int64_t bytes) {
    return wan_attn_cuda_is_aligned(x.view, call->batch, x.seqlen, x.heads, bytes);
}

/* Lengths on the CPU, by their description: a question comes without what they hold. */
static int is_put(const wan_attn_tensor *lengths) {
    return lengths->ndim && lengths->device_type == WAN_ATTN_CPU;
}

/* Room for a copy of an operand that is not the row's dtype, or where copies cannot begin. */
static wan_attn_cuda_place reserve_copy(const wan_attn_problem *call, operand x, int64_t *bytes) {
    if (x.view->dtype == call->dtype && is_aligned(call, x, 16))
        return -1;
    return wan_attn_cuda_reserve(bytes, call->batch * x.seqlen * x.heads * call->head_dim * 2);
}

static void plan_scales(const wan_attn_problem *call, int is_dout_f16, backward_plan *plan) {
    int64_t *bytes = &plan->workspace_bytes;
    int64_t heads_q = call->batch * call->num_heads_q, heads_k = call->batch * call->num_heads_k;
    plan->measured_parts = wan_attn_cuda_measured_parts(call->seqlen_k);
    plan->sizes = wan_attn_cuda_reserve(bytes, heads_q * call->seqlen_q * 4);
    plan->largest = wan_attn_cuda_reserve(bytes, heads_k * plan->measured_parts * 4);
    plan->scales = wan_attn_cuda_reserve(bytes, heads_k * WAN_ATTN_CUDA_BACKWARD_SCALES * 4);
    if (!is_dout_f16)
        plan->dout_scale = wan_attn_cuda_reserve(bytes, heads_q * 4);
}

static backward_plan make_plan(const wan_attn_backward_problem *p) {
    const wan_attn_problem *call = &p->call;
    const wan_attn_params *forward = call->params;
    backward_plan plan = {.seqused_q = -1, .seqused_k = -1};
    int64_t *bytes = &plan.workspace_bytes;
    /* A question may come without dout: it is like q then, and aligned. */
    const wan_attn_view like_q = {NULL, call->q.dtype, 0, 0, 0};
    const wan_attn_view *dout = p->params->dout.ndim ? &p->dout : &like_q;
    plan.sizes = plan.largest = plan.scales = plan.dout_scale = -1;
    if (is_put(&forward->seqused_q))
        plan.seqused_q = wan_attn_cuda_reserve(bytes, call->batch * 4);
    if (is_put(&forward->seqused_k))
        plan.seqused_k = wan_attn_cuda_reserve(bytes, call->batch * 4);
    plan.rows = wan_attn_cuda_reserve(bytes, call->batch * call->num_heads_q * call->seqlen_q * 16);
    if (call->dtype == WAN_ATTN_F16)
        plan_scales(call, dout->dtype == WAN_ATTN_F16, &plan);
    plan.q = reserve_copy(call, of_queries(call, &call->q), bytes);
    plan.k = reserve_copy(call, of_keys(call, &call->k), bytes);
    plan.v = reserve_copy(call, of_keys(call, &call->v), bytes);
    plan.dout = reserve_copy(call, of_queries(call, dout), bytes);
    return plan;
}

/* Absent results are aligned: a question comes without them. */
static const char *refuse_results(const wan_attn_backward_problem *p) {
    const wan_attn_problem *call = &p->call;
    return is_aligned(call, of_queries(call, &p->dq), 8) &&
                   is_aligned(call, of_keys(call, &p->dk), 8) &&
                   is_aligned(call, of_keys(call, &p->dv), 8)
               ? NULL
               : "needs grad_query, grad_key, grad_value and their strides to be multiples of 8 "
                 "bytes";
}

const char *wan_attn_cuda_plan_backward(wan_attn_backward_problem *p) {
    wan_attn_problem *call = &p->call;
    const wan_attn_cuda_backward_tile *keys =
        wan_attn_cuda_backward_tile_of(call->kernel_name, call->arch, 1);
    const wan_attn_cuda_backward_tile *queries =
        wan_attn_cuda_backward_tile_of(call->kernel_name, call->arch, 0);
    const char *why = keys && queries ? NULL : "has no tile for this GPU";
    if (!why)
        why = wan_attn_cuda_refuse_sizes(call);
    if (!why)
        why = refuse_results(p);
    if (!why)
        why = wan_attn_cuda_refuse_unproven(call->params->q.device_index,
                                            WAN_ATTN_CUDA_FIRST_BACKWARD_ROW + call->kernel,
                                            call->kernel_name, call->dtype);
    if (why)
        return why;
    backward_plan plan = make_plan(p);
    plan.of_keys = keys;
    plan.of_queries = queries;
    memcpy(&call->plan, &plan, sizeof(plan));
    call->workspace_size = (size_t)plan.workspace_bytes;
    return NULL;
}

static void *at(const backward_call *b, wan_attn_cuda_place place) {
    return wan_attn_cuda_at(&b->c, place);
}

/* Lengths on the CPU have their place, unless they turned out to say nothing. */
static wan_attn_status put(backward_call *b, const wan_attn_lengths *lengths, int64_t padded,
                           wan_attn_cuda_place place, wan_attn_cuda_lengths *found) {
    wan_attn_cuda_place to = lengths->data ? place : -1;
    *found = wan_attn_cuda_lengths_of(&b->c, lengths, to);
    return wan_attn_cuda_put_lengths(&b->c, lengths, padded, to);
}

static wan_attn_status find_rows(const backward_call *b) {
    const wan_attn_backward_problem *p = b->p;
    const wan_attn_problem *call = &p->call;
    wan_attn_cuda_backward_rows_args args;
    memset(&args, 0, sizeof(args));
    args.out = wan_attn_cuda_view_of(&call->out);
    args.dout = wan_attn_cuda_view_of(&p->dout);
    args.lse = call->lse;
    args.dlse = p->dlse;
    args.lse_batch_stride = call->lse_batch_stride;
    args.lse_head_stride = call->lse_head_stride;
    args.lse_row_stride = call->lse_row_stride;
    args.dlse_batch_stride = p->dlse_batch_stride;
    args.dlse_head_stride = p->dlse_head_stride;
    args.dlse_row_stride = p->dlse_row_stride;
    args.seqused_q = b->seqused_q;
    args.seqused_k = b->seqused_k;
    args.rows = at(b, b->plan.rows);
    args.sizes = at(b, b->plan.sizes);
    args.batch = (int)call->batch;
    args.num_heads_q = (int)call->num_heads_q;
    args.seqlen_q = (int)call->seqlen_q;
    args.seqlen_k = (int)call->seqlen_k;
    args.head_dim = (int)call->head_dim;
    args.window_size_left = wan_attn_cuda_bound_of(call->window_size_left);
    args.window_size_right = wan_attn_cuda_bound_of(call->window_size_right);
    args.out_dtype = (int)call->out.dtype;
    args.dout_dtype = (int)p->dout.dtype;
    return wan_attn_cuda_launch_warps(&b->c, HELPER_wan_attn_backward_rows,
                                      call->batch * call->num_heads_q * call->seqlen_q, &args);
}

static wan_attn_cuda_pack_args packing(const backward_call *b, operand x,
                                       wan_attn_cuda_lengths seqused) {
    const wan_attn_problem *call = &b->p->call;
    wan_attn_cuda_pack_args args;
    memset(&args, 0, sizeof(args));
    args.from = wan_attn_cuda_view_of(x.view);
    args.seqused = seqused;
    args.batch = (int)call->batch;
    args.seqlen = (int)x.seqlen;
    args.heads = (int)x.heads;
    args.head_dim = (int)call->head_dim;
    args.from_dtype = (int)x.view->dtype;
    args.to_bf16 = call->dtype == WAN_ATTN_BF16;
    return args;
}

static wan_attn_status find_scales(const backward_call *b) {
    const wan_attn_problem *call = &b->p->call;
    const backward_plan *plan = &b->plan;
    int64_t heads = call->batch * call->num_heads_k;
    if (plan->scales < 0)
        return WAN_ATTN_OK;
    wan_attn_cuda_pack_args measured = packing(b, of_keys(call, &call->v), b->seqused_k);
    measured.largest = at(b, plan->largest);
    measured.num_parts = plan->measured_parts;
    wan_attn_status status = wan_attn_cuda_launch_warps(&b->c, HELPER_wan_attn_measure,
                                                        heads * plan->measured_parts, &measured);
    if (status != WAN_ATTN_OK)
        return status;
    wan_attn_cuda_backward_scale_args args;
    memset(&args, 0, sizeof(args));
    args.rows = at(b, plan->rows);
    args.sizes = at(b, plan->sizes);
    args.largest = at(b, plan->largest);
    args.seqused_q = b->seqused_q;
    args.scales = at(b, plan->scales);
    args.dout_scale = at(b, plan->dout_scale);
    args.batch = (int)call->batch;
    args.num_heads_q = (int)call->num_heads_q;
    args.heads_per_key_head = (int)(call->num_heads_q / call->num_heads_k);
    args.seqlen_q = (int)call->seqlen_q;
    args.num_parts = plan->measured_parts;
    return wan_attn_cuda_launch_warps(&b->c, HELPER_wan_attn_backward_scale, heads, &args);
}

/* Makes the copy, if the operand has a place for one. scale: divides it; NULL: 1. */
static wan_attn_status copy(const backward_call *b, operand x, wan_attn_cuda_lengths seqused,
                            wan_attn_cuda_place to, float *scale) {
    if (to < 0)
        return WAN_ATTN_OK;
    wan_attn_cuda_pack_args args = packing(b, x, seqused);
    args.to = at(b, to);
    args.scale = scale;
    return wan_attn_cuda_launch_warps(&b->c, HELPER_wan_attn_convert,
                                      b->p->call.batch * x.seqlen * x.heads, &args);
}

static wan_attn_status copy_all(const backward_call *b) {
    const wan_attn_problem *call = &b->p->call;
    const backward_plan *plan = &b->plan;
    float *dout_scale = at(b, plan->dout_scale);
    wan_attn_status status = copy(b, of_queries(call, &call->q), b->seqused_q, plan->q, NULL);
    if (status == WAN_ATTN_OK)
        status = copy(b, of_keys(call, &call->k), b->seqused_k, plan->k, NULL);
    if (status == WAN_ATTN_OK)
        status = copy(b, of_keys(call, &call->v), b->seqused_k, plan->v, NULL);
    return status == WAN_ATTN_OK
               ? copy(b, of_queries(call, &b->p->dout), b->seqused_q, plan->dout, dout_scale)
               : status;
}

/* Where a kernel reads an operand. */
static wan_attn_cuda_view read_at(const backward_call *b, operand x, wan_attn_cuda_place copied) {
    return copied < 0 ? wan_attn_cuda_view_of(x.view)
                      : wan_attn_cuda_dense(at(b, copied), x.seqlen, x.heads, b->p->call.head_dim);
}

static float float_of(double x) { return (float)fmax(-FLT_MAX, fmin(x, FLT_MAX)); }

static void fill(const backward_call *b, wan_attn_cuda_backward_args *args) {
    const wan_attn_backward_problem *p = b->p;
    const wan_attn_problem *call = &p->call;
    const backward_plan *plan = &b->plan;
    args->q = read_at(b, of_queries(call, &call->q), plan->q);
    args->k = read_at(b, of_keys(call, &call->k), plan->k);
    args->v = read_at(b, of_keys(call, &call->v), plan->v);
    args->dout = read_at(b, of_queries(call, &p->dout), plan->dout);
    args->dq = wan_attn_cuda_view_of(&p->dq);
    args->dk = wan_attn_cuda_view_of(&p->dk);
    args->dv = wan_attn_cuda_view_of(&p->dv);
    args->rows = at(b, plan->rows);
    args->scales = at(b, plan->scales);
    args->seqused_q = b->seqused_q;
    args->seqused_k = b->seqused_k;
    args->batch = (int)call->batch;
    args->num_heads_q = (int)call->num_heads_q;
    args->heads_per_key_head = (int)(call->num_heads_q / call->num_heads_k);
    args->seqlen_q = (int)call->seqlen_q;
    args->seqlen_k = (int)call->seqlen_k;
    args->window_size_left = wan_attn_cuda_bound_of(call->window_size_left);
    args->window_size_right = wan_attn_cuda_bound_of(call->window_size_right);
    args->dq_is_f32 = p->dq.dtype == WAN_ATTN_F32;
    args->dk_is_f32 = p->dk.dtype == WAN_ATTN_F32;
    args->dv_is_f32 = p->dv.dtype == WAN_ATTN_F32;
    args->softmax_scale = float_of(call->softmax_scale);
    args->scale_log2e = float_of(call->softmax_scale * WAN_ATTN_LOG2_E);
}

static wan_attn_status find_gradients(const backward_call *b) {
    const wan_attn_problem *call = &b->p->call;
    wan_attn_cuda_backward_args args;
    memset(&args, 0, sizeof(args));
    fill(b, &args);
    const wan_attn_cuda_backward_tile *const tiles[2] = {b->plan.of_keys, b->plan.of_queries};
    const int64_t lengths[2] = {call->seqlen_k, call->seqlen_q};
    const int64_t heads[2] = {call->num_heads_k, call->num_heads_q};
    wan_attn_status status = WAN_ATTN_OK;
    for (int n = 0; n < 2 && status == WAN_ATTN_OK; n++) {
        const wan_attn_cuda_program program = wan_attn_cuda_backward_program(tiles[n], call->dtype);
        args.blocks = (int)wan_attn_divide_up(lengths[n], tiles[n]->block_m);
        status = wan_attn_cuda_launch(&b->c, &program, args.blocks * heads[n] * call->batch, &args);
    }
    return status;
}

static wan_attn_status run_passes(backward_call *b) {
    const wan_attn_problem *call = &b->p->call;
    wan_attn_status status =
        put(b, &call->seqused_q, call->seqlen_q, b->plan.seqused_q, &b->seqused_q);
    if (status == WAN_ATTN_OK)
        status = put(b, &call->seqused_k, call->seqlen_k, b->plan.seqused_k, &b->seqused_k);
    if (status == WAN_ATTN_OK)
        status = find_rows(b);
    if (status == WAN_ATTN_OK)
        status = find_scales(b);
    if (status == WAN_ATTN_OK)
        status = copy_all(b);
    return status == WAN_ATTN_OK ? find_gradients(b) : status;
}

wan_attn_status wan_attn_cuda_run_backward(const wan_attn_backward_problem *p,
                                           wan_attn_error *err) {
    char reason[300];
    int is_pushed = 0;
    const wan_attn_problem *call = &p->call;
    int32_t index = call->params->q.device_index;
    backward_call b = {
        .c = {call, wan_attn_cuda_open_driver(reason, sizeof(reason)), {0}, index, err}, .p = p};
    if (!b.c.driver)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s", reason);
    memcpy(&b.plan, &call->plan, sizeof(b.plan));
    wan_attn_status status = wan_attn_cuda_enter(b.c.driver, index, &is_pushed, err);
    if (status != WAN_ATTN_OK)
        return status;
    status = run_passes(&b);
    wan_attn_cuda_leave(b.c.driver, is_pushed);
    return status == WAN_ATTN_OK ? wan_attn_ok(err) : status;
}
