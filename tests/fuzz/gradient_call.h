/* SPDX-License-Identifier: Apache-2.0
 * gradient_call.h - one random call of wan_attn_backward that the contract of wan_attn.h allows,
 * and the forward call before it, run by the library. What is stored of rows that see no key and of
 * keys that no row sees is NaN, and nothing but gradients and the workspace can be written to.
 */
#ifndef WAN_ATTN_TESTS_GRADIENT_CALL_H
#define WAN_ATTN_TESTS_GRADIENT_CALL_H

#include "random_call.h"

typedef struct gradient_call {
    wan_attn_params p;
    wan_attn_backward_params a; /* forward is not set */
    numbers kind;
} gradient_call;

static int sees_a_key(const wan_attn_params *p, int64_t sample, int64_t i) {
    for (int64_t j = 0; j < p->k.shape[1]; j++)
        if (sees(p, sample, i, j))
            return 1;
    return 0;
}

static int is_seen(const wan_attn_params *p, int64_t sample, int64_t j) {
    for (int64_t i = 0; i < p->q.shape[1]; i++)
        if (sees(p, sample, i, j))
            return 1;
    return 0;
}

static wan_attn_tensor shaped_like(const wan_attn_tensor *t, int32_t dtype) {
    return describe(dtype, 4, t->shape[0], t->shape[1], t->shape[2], t->shape[3]);
}

static wan_attn_tensor shaped_like_lse(const wan_attn_tensor *q) {
    return describe(WAN_ATTN_F32, 3, q->shape[0], q->shape[2], q->shape[1], 0);
}

static void choose_dlse(gradient_call *g) {
    exponents range = {-4, 1};
    if (one_in(4))
        range = exponents_of(g->kind, WAN_ATTN_F32);
    g->a.dlse = shaped_like_lse(&g->p.q);
    choose_strides(&g->a.dlse, 0);
    buffer *memory = give_memory(&g->a.dlse, POISON);
    for (int64_t b = 0; b < g->p.q.shape[0]; b++)
        for (int64_t i = 0; i < g->p.q.shape[1]; i++)
            for (int64_t h = 0; h < g->p.q.shape[2] && sees_a_key(&g->p, b, i); h++)
                put(element(&g->a.dlse, b, h, i, 0), WAN_ATTN_F32,
                    range.low + (int)pick(range.high - range.low + 1));
    make_read_only(memory);
}

static void choose_dout(gradient_call *g) {
    static const int32_t FLOATS[] = {WAN_ATTN_F32, WAN_ATTN_F16, WAN_ATTN_BF16};
    static const exponents NONE = {-300, -300};
    wan_attn_tensor *dout = &g->a.dout;
    *dout = shaped_like(&g->p.q, one_in(3) ? PICK(FLOATS) : g->p.q.dtype);
    exponents range = exponents_of(one_in(4) ? g->kind : ORDINARY, dout->dtype);
    buffer *memory = random_operand(dout, &g->p, sees_a_key, one_in(12) ? NONE : range);
    if (one_in(12) && count_of(dout)) { /* as sum() hands it over: alike everywhere */
        dout->stride[0] = dout->stride[1] = dout->stride[2] = 0;
        for (int64_t d = 0; d < dout->shape[3]; d++)
            put(element(dout, 0, 0, 0, d), dout->dtype, -1);
    }
    make_read_only(memory);
}

/* An infinite or a NaN number in some rows of q, dout or dlse. */
static void put_special_rows(gradient_call *g) {
    wan_attn_tensor *const tensors[] = {&g->p.q, &g->a.dout, &g->a.dlse};
    wan_attn_tensor *t = PICK(tensors);
    int is_lse = t == &g->a.dlse;
    for (int n = 0; n < 3 && t->ndim && count_of(t); n++) {
        int64_t b = pick(g->p.q.shape[0]), i = pick(g->p.q.shape[1]), h = pick(g->p.q.shape[2]);
        void *at = is_lse ? element(t, b, h, i, 0) : element(t, b, i, h, pick(t->shape[3]));
        const buffer *memory = buffer_at(at);
        make_writable(memory);
        if (one_in(2))
            put_infinity(at, t->dtype, one_in(2));
        else
            memset(at, POISON, element_size(t->dtype));
        make_read_only(memory);
    }
}

/* Some row of the exact ones that take the call. */
static int32_t random_forward_row(const wan_attn_params *p) {
    int32_t first = (int32_t)pick(wan_attn_kernel_count());
    for (int32_t n = 0; n < wan_attn_kernel_count(); n++) {
        int32_t row = (first + n) % wan_attn_kernel_count();
        wan_attn_kernel_info info = {.struct_size = sizeof(info)};
        wan_attn_kernel_at(row, &info);
        if (!info.is_lossy && wan_attn_why_not(p, row, NULL) == WAN_ATTN_OK)
            return row;
    }
    return -1;
}

static void forget_rows_without_keys(wan_attn_params *p) {
    for (int64_t b = 0; b < p->q.shape[0]; b++)
        for (int64_t i = 0; i < p->q.shape[1]; i++)
            for (int64_t h = 0; h < p->q.shape[2] && !sees_a_key(p, b, i); h++) {
                size_t size = (size_t)p->out.shape[3] * element_size(p->out.dtype);
                memset(element(&p->out, b, i, h, 0), POISON, size);
                memset(element(&p->lse, b, h, i, 0), POISON, sizeof(float));
            }
}

/* out and lse, as the library leaves them. */
static wan_attn_status run_forward(wan_attn_params *p, wan_attn_error *err) {
    size_t size = 0;
    choose_strides(&p->out, 1);
    choose_strides(&p->lse, 1);
    buffer *out = give_memory(&p->out, POISON), *lse = give_memory(&p->lse, POISON);
    p->kernel = random_forward_row(p);
    wan_attn_status status = wan_attn_workspace_size(p, &size, err);
    if (status != WAN_ATTN_OK)
        return status;
    p->workspace = make_buffer(size, 64, 1, POISON)->at;
    p->workspace_size = size;
    status = wan_attn_forward(p, err);
    forget_rows_without_keys(p);
    make_read_only(out);
    make_read_only(lse);
    p->kernel = -1;
    return status;
}

static wan_attn_status random_gradient(gradient_call *g, wan_attn_error *err) {
    static const double SCALES[] = {1e-30, 1e-45, -1e-300, 1e10, 1e30, -1e38, 3.5e38, -1e300};
    const wanted w = {one_in(6) ? 420 : 70, sees_a_key, is_seen};
    wan_attn_params *p = &g->p;
    memset(g, 0, sizeof(*g));
    g->kind = random_call(p, &w);
    if (p->has_softmax_scale && g->kind != MINUS_INFINITY && one_in(4))
        p->softmax_scale = PICK(SCALES);
    if (one_in(4)) /* of a caller from before there were lists of blocks */
        p->struct_size = (uint32_t)offsetof(wan_attn_params, block_counts);
    p->out = shaped_like(&p->q, one_in(3) ? p->v.dtype : p->q.dtype);
    p->lse = shaped_like_lse(&p->q);
    choose_dout(g);
    if (one_in(2))
        choose_dlse(g);
    if (one_in(6))
        put_special_rows(g);
    g->a.struct_size = sizeof(g->a);
    g->a.kernel = -1;
    g->a.dq = shaped_like(&p->q, p->q.dtype);
    g->a.dk = shaped_like(&p->k, p->k.dtype);
    g->a.dv = shaped_like(&p->v, p->v.dtype);
    choose_strides(&g->a.dq, 1);
    choose_strides(&g->a.dk, 1);
    choose_strides(&g->a.dv, 1);
    return run_forward(p, err);
}

#endif /* WAN_ATTN_TESTS_GRADIENT_CALL_H */
