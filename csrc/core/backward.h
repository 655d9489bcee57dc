/* SPDX-License-Identifier: Apache-2.0
 * backward.h - what a row of the table of backward kernels is, and the checked form of a call that
 * rows receive. Knows no kernel's internals.
 */
#ifndef WAN_ATTN_CORE_BACKWARD_H
#define WAN_ATTN_CORE_BACKWARD_H

#include "core/kernel.h"

/* A call that has passed wan_attn_backward_check: everything a row may rely on. */
typedef struct wan_attn_backward_problem {
    const wan_attn_backward_params *params;
    /* The forward call: sizes, mask, q, k, v, out and lse; params, for workspace and threads.
     * kernel, kernel_name, plan and workspace_size are the backward row's. */
    wan_attn_problem call;
    wan_attn_view dout, dq, dk, dv;
    const float *dlse; /* NULL: zeros */
    int64_t dlse_batch_stride, dlse_head_stride, dlse_row_stride;
} wan_attn_backward_problem;

/* One row of the table. */
typedef struct wan_attn_backward_kernel {
    wan_attn_kernel_info info;
    /* NULL, and the call's plan and workspace_size are filled; or why this row cannot take a call
     * that fits `info`. Reads nothing that a tensor points to; results may be absent. */
    const char *(*plan)(wan_attn_backward_problem *problem);
    /* Runs a problem that `plan` has filled; batch is at least 1, either length may be 0. */
    wan_attn_status (*run)(const wan_attn_backward_problem *problem, wan_attn_error *err);
} wan_attn_backward_kernel;

/* cuda/host/backward.c: the two functions of each CUDA row. */
const char *wan_attn_cuda_plan_backward(wan_attn_backward_problem *problem);
wan_attn_status wan_attn_cuda_run_backward(const wan_attn_backward_problem *problem,
                                           wan_attn_error *err);

/* backward_check.c: params -> problem, or INVALID_ARGUMENT. The first reads nothing that a tensor
 * points to, and takes absent results; the second reads lengths that lie on the CPU, wants all
 * tensors, and looks at all memory. */
wan_attn_status wan_attn_backward_check(const wan_attn_backward_params *params,
                                        wan_attn_backward_problem *problem, wan_attn_error *err);
wan_attn_status wan_attn_backward_check_memory(wan_attn_backward_problem *problem,
                                               wan_attn_error *err);

/* What forward has left of row i, and what is wanted of it. Only for rows that see a key. */
static inline float wan_attn_lse_at(const wan_attn_backward_problem *p, int64_t b, int64_t head,
                                    int64_t i) {
    return p->call.lse[b * p->call.lse_batch_stride + head * p->call.lse_head_stride +
                       i * p->call.lse_row_stride];
}
static inline float wan_attn_dlse_at(const wan_attn_backward_problem *p, int64_t b, int64_t head,
                                     int64_t i) {
    return p->dlse ? p->dlse[b * p->dlse_batch_stride + head * p->dlse_head_stride +
                             i * p->dlse_row_stride]
                   : 0.0f;
}

#endif /* WAN_ATTN_CORE_BACKWARD_H */
