/* SPDX-License-Identifier: Apache-2.0
 * check.c - the contract of a call, tested once for every binding and every row. Messages use the
 * names that Python users write (query, q_lens), because that is who reads them. Knows no kernel.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "core/operand.h"
#include "core/util.h"

#define INVALID(err, ...) wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, __VA_ARGS__)

static wan_attn_status check_inputs(const wan_attn_params *a, wan_attn_error *err) {
    const wan_attn_tensor *q = &a->q, *k = &a->k, *v = &a->v;
    const char *const names[] = {"query", "key", "value"};
    const wan_attn_tensor *const inputs[] = {q, k, v};
    wan_attn_status status = WAN_ATTN_OK;
    for (int n = 0; n < 3 && status == WAN_ATTN_OK; n++)
        status = wan_attn_check_rank_and_dtype(names[n], inputs[n], err);
    for (int n = 0; n < 3 && status == WAN_ATTN_OK; n++)
        status = wan_attn_check_device(names[n], inputs[n], q, "query", err);
    if (status != WAN_ATTN_OK)
        return status;
    const char *f32_or = v->dtype == WAN_ATTN_F32 ? "" : "be float32 or ";
    for (int n = 0; n < 2; n++)
        if (inputs[n]->dtype != v->dtype && inputs[n]->dtype != WAN_ATTN_F32)
            return INVALID(err, "%s must %shave value's dtype %s, got %s", names[n], f32_or,
                           wan_attn_dtype_name(v->dtype), wan_attn_dtype_name(inputs[n]->dtype));
    if (q->shape[3] < 1)
        return INVALID(err, "query must have a head_dim of at least 1, got %s",
                       wan_attn_shape_of(q->shape, 4).text);
    if (q->shape[2] < 1 || k->shape[2] < 1 || q->shape[2] % k->shape[2])
        return INVALID(err,
                       "query must have a multiple of key's heads, got %lld heads for key's %lld",
                       (long long)q->shape[2], (long long)k->shape[2]);
    const int64_t expected[4] = {q->shape[0], k->shape[1], k->shape[2], q->shape[3]};
    status = wan_attn_check_shape("key", k, expected,
                                  "[query's batch, seqlen_k, num_heads_k, query's head_dim]", err);
    return status == WAN_ATTN_OK
               ? wan_attn_check_shape("value", v, expected, "shaped like key", err)
               : status;
}

/* The description of real lengths; their values are read later, where they are needed. */
static wan_attn_status check_lengths(const char *name, const wan_attn_tensor *t,
                                     const wan_attn_tensor *q, wan_attn_lengths *lengths,
                                     wan_attn_error *err) {
    wan_attn_lengths all = {NULL, WAN_ATTN_I32, WAN_ATTN_CPU, 0};
    *lengths = all;
    if (wan_attn_is_absent(t))
        return WAN_ATTN_OK;
    if (t->ndim != 1 || t->shape[0] != q->shape[0])
        return INVALID(err, "%s must be [batch] = [%lld], got %s", name, (long long)q->shape[0],
                       wan_attn_shape_of(t->shape, t->ndim).text);
    if (t->dtype != WAN_ATTN_I32 && t->dtype != WAN_ATTN_I64)
        return INVALID(err, "%s must be int32 or int64, got %s", name,
                       wan_attn_dtype_name(t->dtype));
    if (t->device_type != WAN_ATTN_CPU &&
        (t->device_type != q->device_type || t->device_index != q->device_index))
        return INVALID(err, "%s must be on the CPU or on query's device %s, got %s", name,
                       wan_attn_device_of(q).text, wan_attn_device_of(t).text);
    lengths->data = t->data;
    lengths->dtype = (wan_attn_dtype)t->dtype;
    lengths->device_type = (wan_attn_device)t->device_type;
    lengths->stride = t->shape[0] > 1 ? t->stride[0] : 0;
    wan_attn_status status = wan_attn_check_cpu_index(name, t, err);
    return status == WAN_ATTN_OK ? wan_attn_check_reach(name, t, err) : status;
}

/* Reads lengths that lie on the CPU, once. Where all are the padded length they say nothing, and
 * they are neither read nor moved again. */
static wan_attn_status read_lengths(const char *name, wan_attn_lengths *lengths, int64_t batch,
                                    int64_t padded, wan_attn_error *err) {
    int say_something = 0;
    if (lengths->device_type != WAN_ATTN_CPU || !lengths->data)
        return WAN_ATTN_OK;
    for (int64_t b = 0; b < batch; b++) {
        int64_t n = wan_attn_raw_length_at(lengths, b);
        if (n < 0 || n > padded)
            return INVALID(
                err, "%s must be between 0 and the padded length %lld, got %lld for sample %lld",
                name, (long long)padded, (long long)n, (long long)b);
        say_something |= n != padded;
    }
    if (!say_something)
        lengths->data = NULL;
    return WAN_ATTN_OK;
}

static wan_attn_status check_numbers(const wan_attn_params *a, wan_attn_error *err) {
    if (a->has_softmax_scale && !isfinite(a->softmax_scale))
        return INVALID(err, "scale must be finite, got %g", a->softmax_scale);
    if (a->window_size_left < -1)
        return INVALID(err, "window_left must be -1 (no bound) or at least 0, got %lld",
                       (long long)a->window_size_left);
    if (a->window_size_right < -1)
        return INVALID(err, "window_right must be -1 (no bound) or at least 0, got %lld",
                       (long long)a->window_size_right);
    return WAN_ATTN_OK;
}

static wan_attn_status check_precision(const wan_attn_params *a, wan_attn_error *err) {
    if (a->precision != WAN_ATTN_EXACT && a->precision != WAN_ATTN_QK8)
        return INVALID(err, "precision must be %d (exact) or %d (8-bit scores), got %d",
                       WAN_ATTN_EXACT, WAN_ATTN_QK8, (int)a->precision);
    if (a->guard && a->guard_size != sizeof(wan_attn_guard) &&
        a->guard_size != offsetof(wan_attn_guard, lost_mass))
        return INVALID(err,
                       "guard_size must be %zu (this library's wan_attn_guard) or, without "
                       "lost_mass, %zu, got %u",
                       sizeof(wan_attn_guard), offsetof(wan_attn_guard, lost_mass),
                       (unsigned)a->guard_size);
    if ((uintptr_t)a->guard % sizeof(uint32_t))
        return INVALID(err, "guard must lie at a multiple of 4 bytes, got address %p", a->guard);
    return WAN_ATTN_OK;
}

static int64_t window_bound(int64_t size) {
    return size < 0 || size > WAN_ATTN_UNBOUNDED ? WAN_ATTN_UNBOUNDED : size;
}

/* Of float32's range: rows multiply by it as such, and infinity times a score of 0 is NaN. */
static double scale_of(const wan_attn_params *a) {
    return a->has_softmax_scale ? fmax(-FLT_MAX, fmin(a->softmax_scale, FLT_MAX))
                                : 1.0 / sqrt((double)a->q.shape[3]);
}

static void fill(const wan_attn_params *a, wan_attn_problem *p) {
    p->params = a;
    p->device_type = (wan_attn_device)a->q.device_type;
    p->dtype = (wan_attn_dtype)a->v.dtype;
    p->batch = a->q.shape[0];
    p->seqlen_q = a->q.shape[1];
    p->num_heads_q = a->q.shape[2];
    p->head_dim = a->q.shape[3];
    p->seqlen_k = a->k.shape[1];
    p->num_heads_k = a->k.shape[2];
    p->q = wan_attn_view_of(&a->q);
    p->k = wan_attn_view_of(&a->k);
    p->v = wan_attn_view_of(&a->v);
    p->softmax_scale = scale_of(a);
    p->window_size_left = window_bound(a->window_size_left);
    p->window_size_right = a->is_causal ? 0 : window_bound(a->window_size_right);
}

wan_attn_status wan_attn_check(const wan_attn_params *params, wan_attn_problem *problem,
                               wan_attn_error *err) {
    memset(problem, 0, sizeof(*problem));
    if (!params)
        return INVALID(err, "params must be a pointer, got NULL");
    if (params->struct_size != sizeof(*params) &&
        params->struct_size != WAN_ATTN_PARAMS_BEFORE_LISTS)
        return INVALID(
            err,
            "params.struct_size must be %zu (this library's wan_attn_params) or, without "
            "lists of blocks, %zu, got %u",
            sizeof(*params), WAN_ATTN_PARAMS_BEFORE_LISTS, (unsigned)params->struct_size);
    wan_attn_status status = check_inputs(params, err);
    if (status == WAN_ATTN_OK)
        status = check_numbers(params, err);
    if (status == WAN_ATTN_OK)
        status = check_precision(params, err);
    if (status == WAN_ATTN_OK)
        status = check_lengths("q_lens", &params->seqused_q, &params->q, &problem->seqused_q, err);
    if (status == WAN_ATTN_OK)
        status = check_lengths("k_lens", &params->seqused_k, &params->q, &problem->seqused_k, err);
    if (status == WAN_ATTN_OK && params->struct_size == sizeof(*params))
        status = wan_attn_check_lists(params, problem, err);
    if (status == WAN_ATTN_OK)
        fill(params, problem);
    return status;
}

wan_attn_status wan_attn_check_lengths(wan_attn_problem *p, wan_attn_error *err) {
    wan_attn_status status = wan_attn_check_length_memory(p, WAN_ATTN_CPU, err);
    if (status == WAN_ATTN_OK)
        status = read_lengths("q_lens", &p->seqused_q, p->batch, p->seqlen_q, err);
    return status == WAN_ATTN_OK ? read_lengths("k_lens", &p->seqused_k, p->batch, p->seqlen_k, err)
                                 : status;
}

static wan_attn_status check_out(const wan_attn_tensor *out, const wan_attn_tensor *q,
                                 int32_t v_dtype, wan_attn_error *err) {
    wan_attn_status status = wan_attn_check_rank_and_dtype("out", out, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_device("out", out, q, "query", err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_shape("out", out, q->shape, "shaped like query", err);
    if (status == WAN_ATTN_OK && out->dtype != q->dtype && out->dtype != v_dtype)
        status = INVALID(err, "out must have query's dtype %s%s%s, got %s",
                         wan_attn_dtype_name(q->dtype), q->dtype == v_dtype ? "" : " or value's ",
                         q->dtype == v_dtype ? "" : wan_attn_dtype_name(v_dtype),
                         wan_attn_dtype_name(out->dtype));
    return status == WAN_ATTN_OK ? wan_attn_check_overlap("out", out, err) : status;
}

wan_attn_status wan_attn_check_lse(const char *name, const wan_attn_tensor *lse,
                                   const wan_attn_tensor *q, wan_attn_error *err) {
    if (lse->ndim != 3 || lse->dtype != WAN_ATTN_F32 || lse->shape[0] != q->shape[0] ||
        lse->shape[1] != q->shape[2] || lse->shape[2] != q->shape[1])
        return INVALID(
            err,
            "%s must be float32 [batch, num_heads_q, seqlen_q] = [%lld, %lld, %lld], got %s %s",
            name, (long long)q->shape[0], (long long)q->shape[2], (long long)q->shape[1],
            wan_attn_dtype_name(lse->dtype), wan_attn_shape_of(lse->shape, lse->ndim).text);
    wan_attn_status status = wan_attn_check_device(name, lse, q, "query", err);
    return status == WAN_ATTN_OK ? wan_attn_check_reach(name, lse, err) : status;
}

wan_attn_status wan_attn_check_outputs(wan_attn_problem *p, wan_attn_error *err) {
    const wan_attn_tensor *q = &p->params->q, *out = &p->params->out, *lse = &p->params->lse;
    wan_attn_status status =
        wan_attn_is_absent(out) ? WAN_ATTN_OK : check_out(out, q, p->params->v.dtype, err);
    if (status == WAN_ATTN_OK && !wan_attn_is_absent(lse))
        status = wan_attn_check_lse("lse", lse, q, err);
    if (status == WAN_ATTN_OK && !wan_attn_is_absent(lse))
        status = wan_attn_check_overlap("lse", lse, err);
    if (status != WAN_ATTN_OK)
        return status;
    p->out = wan_attn_view_of(out);
    p->lse = (float *)lse->data;
    p->lse_batch_stride = wan_attn_stride_of(lse, 0);
    p->lse_head_stride = wan_attn_stride_of(lse, 1);
    p->lse_row_stride = wan_attn_stride_of(lse, 2);
    return WAN_ATTN_OK;
}
