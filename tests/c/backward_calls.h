/* SPDX-License-Identifier: Apache-2.0
 * backward_calls.h - gradients of random calls on every row of the backward table, against double
 * precision: strided operands, NaN behind the lengths, any threads; and calls that must be refused.
 */
#ifndef WAN_ATTN_TESTS_BACKWARD_CALLS_H
#define WAN_ATTN_TESTS_BACKWARD_CALLS_H

#include "loops.h"
#include "random.h"

/* Dense sums in double precision, and the sums of their terms' sizes, which rounding goes by. */
typedef struct gradient_truth {
    double *dq, *dk, *dv, *dq_size, *dk_size, *dv_size;
} gradient_truth;

static int64_t elements_of(const wan_attn_tensor *t) {
    return t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3];
}

static double *dense(double *x, const wan_attn_tensor *t, int64_t b, int64_t i, int64_t h) {
    return x + ((b * t->shape[1] + i) * t->shape[2] + h) * t->shape[3];
}

/* What one row gives to all gradients. weight: room for seqlen_k numbers; out: for head_dim. */
static void add_truth_of_row(const wan_attn_backward_params *a, int64_t b, int64_t h, int64_t i,
                             double *weight, double *out, gradient_truth *to) {
    const wan_attn_params *p = a->forward;
    int64_t head_dim = p->q.shape[3], hk = h / (p->q.shape[2] / p->k.shape[2]);
    double scale = p->has_softmax_scale ? p->softmax_scale : 1.0 / sqrt((double)head_dim);
    for (int64_t j = 0; j < p->k.shape[1]; j++)
        weight[j] = -INFINITY; /* those that it sees not */
    double lse = reference_row(p, b, h, i, weight, out), delta = 0.0, delta_size = 0.0;
    double *dq = dense(to->dq, &p->q, b, i, h), *dq_size = dense(to->dq_size, &p->q, b, i, h);
    if (lse == -INFINITY)
        return;
    for (int64_t d = 0; d < head_dim; d++) {
        double term = value_at(&a->dout, b, i, h, d) * out[d];
        delta += term, delta_size += fabs(term);
    }
    double dlse = a->dlse.data ? value_at(&a->dlse, b, h, i, 0) : 0.0;
    for (int64_t j = 0; j < p->k.shape[1]; j++) {
        if (weight[j] == -INFINITY)
            continue;
        double w = exp(weight[j] - lse), dw = 0.0, dw_size = 0.0;
        double *dk = dense(to->dk, &p->k, b, j, hk), *dk_size = dense(to->dk_size, &p->k, b, j, hk);
        double *dv = dense(to->dv, &p->k, b, j, hk), *dv_size = dense(to->dv_size, &p->k, b, j, hk);
        for (int64_t d = 0; d < head_dim; d++) {
            double of_out = value_at(&a->dout, b, i, h, d);
            double term = of_out * value_at(&p->v, b, j, hk, d);
            dw += term, dw_size += fabs(term);
            dv[d] += w * of_out, dv_size[d] += w * fabs(of_out);
        }
        double ds = scale * w * (dw - delta + dlse);
        double ds_size = fabs(scale) * w * (dw_size + delta_size + fabs(dlse));
        for (int64_t d = 0; d < head_dim; d++) {
            double q = value_at(&p->q, b, i, h, d), k = value_at(&p->k, b, j, hk, d);
            dq[d] += ds * k, dq_size[d] += ds_size * fabs(k);
            dk[d] += ds * q, dk_size[d] += ds_size * fabs(q);
        }
    }
}

/* How much of its terms' sizes a gradient may be off by: float32's scores and sums, and what is
 * rounded to the dtype on the way. */
static double part_of_size(int32_t dtype) {
    return dtype == WAN_ATTN_F32 ? 2e-5 : dtype == WAN_ATTN_F16 ? 0x1p-10 : 0x1p-7;
}

static int is_wrong_gradient(const wan_attn_tensor *got, double *want, double *size,
                             int32_t dtype) {
    for (int64_t b = 0; b < got->shape[0]; b++)
        for (int64_t i = 0; i < got->shape[1]; i++)
            for (int64_t h = 0; h < got->shape[2]; h++)
                for (int64_t d = 0; d < got->shape[3]; d++) {
                    double x = value_at(got, b, i, h, d), y = dense(want, got, b, i, h)[d];
                    double bound = part_of_size(dtype) * dense(size, got, b, i, h)[d];
                    /* The smallest f16; weights that no float32 holds. */
                    bound += dtype == WAN_ATTN_F16 ? 0x1p-24 : 0x1p-99;
                    if (!(fabs(x - y) <= bound)) /* a NaN is wrong */
                        return 1;
                }
    return 0;
}

/* A gradient to be written, shaped like `like` and with gaps. */
static wan_attn_tensor result_like(const wan_attn_tensor *like) {
    wan_attn_tensor t = operand(like->dtype, like->shape, (int)pick(EXPANDED));
    allocate(&t, UNTOUCHED);
    return t;
}

static wan_attn_status give_backward_workspace(const wan_attn_backward_params *a,
                                               wan_attn_params *p, wan_attn_error *err) {
    size_t size = 0;
    wan_attn_status status = wan_attn_backward_select(a, NULL, &size, err);
    p->workspace = size ? allocate_aligned(size) : NULL;
    p->workspace_size = size;
    return status;
}

/* The same on other threads: the bits must not depend on them. */
static int other_threads_other_bits(const wan_attn_backward_params *a) {
    static const wan_attn_parallel_fn LOOPS[] = {NULL, on_threads, broken_loop};
    int different = 0;
    for (size_t n = 0; n < sizeof(LOOPS) / sizeof(LOOPS[0]); n++) {
        wan_attn_backward_params again = *a;
        wan_attn_params p = *a->forward;
        wan_attn_tensor *const now[] = {&again.dq, &again.dk, &again.dv};
        const wan_attn_tensor *const before[] = {&a->dq, &a->dk, &a->dv};
        again.forward = &p;
        p.num_threads = (int32_t)(3 * n + 1);
        p.parallel = LOOPS[n];
        for (int g = 0; g < 3; g++)
            allocate(now[g], UNTOUCHED);
        different |= give_backward_workspace(&again, &p, NULL) != WAN_ATTN_OK ||
                     wan_attn_backward(&again, NULL, NULL) != WAN_ATTN_OK;
        for (int g = 0; g < 3; g++) {
            different |= memcmp(now[g]->data, before[g]->data, buffer_size(now[g])) != 0;
            free(now[g]->data);
        }
        free_aligned(p.workspace);
    }
    return different;
}

static int run_backward_row(wan_attn_backward_params *a, wan_attn_params *p, int32_t row,
                            const gradient_truth *truth, int *runs) {
    wan_attn_error err = {0, ""};
    int32_t ran = -1;
    a->kernel = row;
    wan_attn_status status = wan_attn_backward_select(a, NULL, NULL, &err);
    if (status == WAN_ATTN_UNSUPPORTED)
        return err.message[0] == '\0'; /* a refusal has a reason */
    if (status != WAN_ATTN_OK || give_backward_workspace(a, p, &err) != WAN_ATTN_OK ||
        wan_attn_backward(a, &ran, &err) != WAN_ATTN_OK || ran != row)
        FAIL("gradients refused: %s", err.message);
    int wrong = other_threads_other_bits(a);
    free_aligned(p->workspace);
    p->workspace = NULL;
    if (wrong)
        FAIL("gradients on other threads have other bits%s", "");
    if (is_wrong_gradient(&a->dq, truth->dq, truth->dq_size, p->v.dtype))
        FAIL("dq of row %d is wrong", (int)row);
    if (is_wrong_gradient(&a->dk, truth->dk, truth->dk_size, p->v.dtype))
        FAIL("dk of row %d is wrong", (int)row);
    if (is_wrong_gradient(&a->dv, truth->dv, truth->dv_size, p->v.dtype))
        FAIL("dv of row %d is wrong", (int)row);
    if (wrote_between_elements(&a->dq) || wrote_between_elements(&a->dk) ||
        wrote_between_elements(&a->dv))
        FAIL("row %d wrote beside a gradient", (int)row);
    ++*runs;
    return 0;
}

/* Each of these must be refused, with words. */
static int broken_backward_is_taken(const wan_attn_backward_params *right) {
    for (int n = 0; n < 9; n++) {
        wan_attn_backward_params a = *right;
        wan_attn_params p = *right->forward;
        wan_attn_error err = {0, ""};
        a.forward = &p;
        a.kernel = -1;
        switch (n) {
        case 0: a.struct_size = 0; break;
        case 1: a.forward = NULL; break;
        case 2: a.kernel = wan_attn_backward_kernel_count(); break;
        case 3: a.dout.shape[1] += 1; break;
        case 4: a.dv.dtype = WAN_ATTN_I32; break;
        case 5: p.precision = WAN_ATTN_QK8; break;
        case 6: a.dk.ndim = 3; break;
        case 7: p.skip_threshold = 0.5; break;
        default: p.window_size_right = -2; break;
        }
        if (wan_attn_backward(&a, NULL, &err) != WAN_ATTN_INVALID_ARGUMENT ||
            wan_attn_backward_select(&a, NULL, NULL, NULL) != WAN_ATTN_INVALID_ARGUMENT ||
            strlen(err.message) < 10)
            FAIL("broken backward call %d was not refused", n);
    }
    wan_attn_backward_params a = *right;
    wan_attn_error err = {0, ""};
    a.dk.data = a.forward->k.data; /* where there is k */
    if (elements_of(&a.dk) && wan_attn_backward(&a, NULL, &err) != WAN_ATTN_INVALID_ARGUMENT)
        FAIL("gradients in place of an operand were taken%s", "");
    if (a.forward->seqused_k.data && a.forward->q.shape[0]) {
        wan_attn_tensor lens = a.forward->seqused_k;
        double before = value_at(&lens, 0, 0, 0, 0);
        a = *right;
        write_element(lens.data, lens.dtype, 1e6);
        wan_attn_status status = wan_attn_backward(&a, NULL, NULL);
        write_element(lens.data, lens.dtype, before);
        if (status != WAN_ATTN_INVALID_ARGUMENT)
            FAIL("gradients of too many keys were not refused%s", "");
    }
    a = *right;
    memset(&a.dq, 0, sizeof(a.dq));
    if (wan_attn_backward(&a, NULL, &err) != WAN_ATTN_INVALID_ARGUMENT)
        FAIL("a missing result was not refused%s", "");
    return 0;
}

/* Gradients of this call, on every row. */
static int test_backward_of(const wan_attn_params *call, int *runs) {
    wan_attn_params p = *call;
    int64_t of_q = elements_of(&p.q), of_k = elements_of(&p.k);
    int64_t lse_shape[4] = {p.q.shape[0], p.q.shape[2], p.q.shape[1], 1};
    double *memory = calloc((size_t)(2 * of_q + 4 * of_k + p.k.shape[1] + p.q.shape[3] + 1), 8);
    double *k_truth = memory + 2 * of_q, *room = k_truth + 4 * of_k;
    gradient_truth truth = {
        memory, k_truth, k_truth + of_k, memory + of_q, k_truth + 2 * of_k, k_truth + 3 * of_k};
    wan_attn_backward_params a = {.struct_size = sizeof(a), .forward = &p};
    int wrong = 0;
    p.kernel = -1;
    p.workspace = NULL;
    memset(&p.block_counts, 0, sizeof(p.block_counts)); /* gradients are dense */
    memset(&p.block_indices, 0, sizeof(p.block_indices));
    p.pools_others = 0;
    p.skip_threshold = 0.0;
    p.out = operand(p.q.dtype, p.q.shape, PACKED);
    allocate(&p.out, UNTOUCHED);
    p.lse = operand(WAN_ATTN_F32, lse_shape, PACKED);
    p.lse.ndim = 3;
    allocate(&p.lse, UNTOUCHED);
    a.dout = input(pick(4) ? p.q.dtype : WAN_ATTN_F32, p.q.shape, &p.seqused_q);
    if (pick(2)) {
        wan_attn_tensor none = {0};
        a.dlse = input(WAN_ATTN_F32, lse_shape, &none);
        a.dlse.ndim = 3;
    }
    a.dq = result_like(&p.q), a.dk = result_like(&p.k), a.dv = result_like(&p.v);
    if (give_workspace(&p, NULL) != WAN_ATTN_OK || wan_attn_forward(&p, NULL) != WAN_ATTN_OK)
        wrong = 1;
    free_aligned(p.workspace);
    for (int64_t b = 0; b < p.q.shape[0]; b++)
        for (int64_t h = 0; h < p.q.shape[2]; h++)
            for (int64_t i = 0; i < p.q.shape[1]; i++)
                add_truth_of_row(&a, b, h, i, room, room + p.k.shape[1], &truth);
    for (int32_t row = 0; row < wan_attn_backward_kernel_count() && !wrong; row++)
        wrong = run_backward_row(&a, &p, row, &truth, runs);
    wrong = wrong || broken_backward_is_taken(&a);
    wan_attn_tensor *const made[] = {&p.out, &p.lse, &a.dout, &a.dlse, &a.dq, &a.dk, &a.dv};
    for (size_t n = 0; n < sizeof(made) / sizeof(made[0]); n++)
        free(made[n]->data);
    free(memory);
    return wrong;
}

#endif /* WAN_ATTN_TESTS_BACKWARD_CALLS_H */
