/* SPDX-License-Identifier: Apache-2.0
 * backward_check.c - the contract of a backward call, tested once for every binding and row.
 * Messages use the names that Python users write. Knows no kernel.
 */
#include <string.h>

#include "core/backward.h"
#include "core/operand.h"
#include "core/util.h"

#define INVALID(err, ...) wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, __VA_ARGS__)

static wan_attn_status check_forward(const wan_attn_backward_params *a, wan_attn_problem *call,
                                     wan_attn_error *err) {
    if (!a->forward)
        return INVALID(err, "forward must be a pointer, got NULL");
    wan_attn_status status = wan_attn_check(a->forward, call, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_outputs(call, err);
    if (status != WAN_ATTN_OK)
        return status;
    if (a->forward->precision != WAN_ATTN_EXACT)
        return INVALID(err, "precision must be %d (exact) for gradients, got %d", WAN_ATTN_EXACT,
                       (int)a->forward->precision);
    if (call->has_lists)
        return INVALID(
            err, "block_counts must be None for gradients, got %s",
            wan_attn_shape_of(a->forward->block_counts.shape, a->forward->block_counts.ndim).text);
    if (call->skip_threshold > 0.0f)
        return INVALID(err, "skip_threshold must be 0 for gradients, got %g",
                       a->forward->skip_threshold);
    if (a->forward->guard)
        return INVALID(err, "guard must be NULL for gradients, got %p", a->forward->guard);
    return WAN_ATTN_OK;
}

/* A gradient of `like`, an operand called `name`; absent, where it is a result and a question. */
static wan_attn_status check_gradient(const char *gradient, const wan_attn_tensor *t,
                                      const char *name, const wan_attn_tensor *like,
                                      wan_attn_error *err) {
    char rule[40] = "shaped like ";
    if (wan_attn_is_absent(t))
        return WAN_ATTN_OK;
    strncat(rule, name, sizeof(rule) - strlen(rule) - 1);
    wan_attn_status status = wan_attn_check_rank_and_dtype(gradient, t, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_device(gradient, t, like, name, err);
    return status == WAN_ATTN_OK ? wan_attn_check_shape(gradient, t, like->shape, rule, err)
                                 : status;
}

static wan_attn_status check_result(const char *gradient, const wan_attn_tensor *t,
                                    const char *name, const wan_attn_tensor *like,
                                    wan_attn_error *err) {
    wan_attn_status status = check_gradient(gradient, t, name, like, err);
    if (status != WAN_ATTN_OK || wan_attn_is_absent(t))
        return status;
    if (t->dtype != like->dtype)
        return INVALID(err, "%s must have %s's dtype %s, got %s", gradient, name,
                       wan_attn_dtype_name(like->dtype), wan_attn_dtype_name(t->dtype));
    return wan_attn_check_overlap(gradient, t, err);
}

wan_attn_status wan_attn_backward_check(const wan_attn_backward_params *params,
                                        wan_attn_backward_problem *p, wan_attn_error *err) {
    memset(p, 0, sizeof(*p));
    if (!params)
        return INVALID(err, "params must be a pointer, got NULL");
    if (params->struct_size != sizeof(*params))
        return INVALID(
            err, "params.struct_size must be %zu (this library's wan_attn_backward_params), got %u",
            sizeof(*params), (unsigned)params->struct_size);
    wan_attn_status status = check_forward(params, &p->call, err);
    if (status != WAN_ATTN_OK)
        return status;
    const wan_attn_tensor *q = &params->forward->q, *k = &params->forward->k,
                          *v = &params->forward->v, *dlse = &params->dlse;
    status = check_gradient("grad_out", &params->dout, "query", q, err);
    if (status == WAN_ATTN_OK && !wan_attn_is_absent(dlse))
        status = wan_attn_check_lse("grad_lse", dlse, q, err);
    if (status == WAN_ATTN_OK)
        status = check_result("grad_query", &params->dq, "query", q, err);
    if (status == WAN_ATTN_OK)
        status = check_result("grad_key", &params->dk, "key", k, err);
    if (status == WAN_ATTN_OK)
        status = check_result("grad_value", &params->dv, "value", v, err);
    if (status != WAN_ATTN_OK)
        return status;
    p->params = params;
    p->dout = wan_attn_view_of(&params->dout);
    p->dq = wan_attn_view_of(&params->dq);
    p->dk = wan_attn_view_of(&params->dk);
    p->dv = wan_attn_view_of(&params->dv);
    p->dlse = (const float *)dlse->data;
    p->dlse_batch_stride = wan_attn_stride_of(dlse, 0);
    p->dlse_head_stride = wan_attn_stride_of(dlse, 1);
    p->dlse_row_stride = wan_attn_stride_of(dlse, 2);
    return WAN_ATTN_OK;
}

/* All tensors of a call; from FIRST_WRITTEN on it writes them. */
enum { GRAD_OUT = 5, GRAD_LSE = 6, FIRST_WRITTEN = 9, WORKSPACE = 12, ALL = 13 };

static const char *const NAMES[ALL] = {"query",    "key",        "value",    "out",    "lse",
                                       "grad_out", "grad_lse",   "q_lens",   "k_lens", "grad_query",
                                       "grad_key", "grad_value", "workspace"};

wan_attn_status wan_attn_backward_check_memory(wan_attn_backward_problem *p, wan_attn_error *err) {
    const wan_attn_backward_params *a = p->params;
    const wan_attn_params *f = a->forward;
    const wan_attn_tensor workspace = wan_attn_workspace_of(&p->call);
    const wan_attn_tensor *const tensors[ALL] = {
        &f->q,         &f->k,         &f->v,  &f->out, &f->lse, &a->dout,  &a->dlse,
        &f->seqused_q, &f->seqused_k, &a->dq, &a->dk,  &a->dv,  &workspace};
    for (int n = 0; n < WORKSPACE; n++) {
        int may_be_absent = n == GRAD_LSE || (n > GRAD_LSE && n < FIRST_WRITTEN);
        if (wan_attn_is_absent(tensors[n])) {
            if (may_be_absent)
                continue;
            return INVALID(err, "%s must be a tensor, got none", NAMES[n]);
        }
        wan_attn_status status = wan_attn_check_memory(NAMES[n], tensors[n], err);
        if (status != WAN_ATTN_OK)
            return status;
    }
    wan_attn_status status = wan_attn_check_lengths(&p->call, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_workspace(&p->call, err);
    return status == WAN_ATTN_OK ? wan_attn_check_written(NAMES, tensors, FIRST_WRITTEN, ALL, err)
                                 : status;
}
