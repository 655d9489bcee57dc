/* SPDX-License-Identifier: Apache-2.0
 * call.h - one call on its way to a GPU, for the files that launch its passes.
 */
#ifndef WAN_ATTN_CUDA_HOST_CALL_H
#define WAN_ATTN_CUDA_HOST_CALL_H

#include "cuda/args_lists.h"
#include "cuda/host/plan.h"

typedef struct wan_attn_cuda_call {
    const wan_attn_problem *p;
    const wan_attn_cuda_driver *driver;
    wan_attn_cuda_plan plan;
    int32_t device_index;
    wan_attn_error *err;
} wan_attn_cuda_call;

/* The place in the call's workspace, or NULL. */
static inline void *wan_attn_cuda_at(const wan_attn_cuda_call *c, wan_attn_cuda_place place) {
    return place < 0 ? NULL : (char *)c->p->params->workspace + place;
}

static inline wan_attn_cuda_view wan_attn_cuda_view_of(const wan_attn_view *v) {
    wan_attn_cuda_view view = {v->data, v->batch_stride, v->row_stride, v->head_stride};
    return view;
}

static inline wan_attn_cuda_view wan_attn_cuda_dense(void *data, int64_t seqlen, int64_t heads,
                                                     int64_t head_dim) {
    wan_attn_cuda_view view = {data, seqlen * heads * head_dim, heads * head_dim, head_dim};
    return view;
}

static inline int wan_attn_cuda_bound_of(int64_t window) {
    return (int)(window < WAN_ATTN_CUDA_UNBOUNDED ? window : WAN_ATTN_CUDA_UNBOUNDED);
}

/* launch.c: enqueues one pass; none of 0 blocks. */
wan_attn_status wan_attn_cuda_launch(const wan_attn_cuda_call *c,
                                     const wan_attn_cuda_program *program, int64_t blocks,
                                     void *args);

/* launch.c: lengths that lie on the CPU go to their place in the workspace, if they have one; then
 * what a kernel is told: where they are, or nothing because they say nothing. */
wan_attn_status wan_attn_cuda_put_lengths(const wan_attn_cuda_call *c,
                                          const wan_attn_lengths *lengths, int64_t padded,
                                          wan_attn_cuda_place place);
wan_attn_cuda_lengths wan_attn_cuda_lengths_of(const wan_attn_cuda_call *c,
                                               const wan_attn_lengths *lengths,
                                               wan_attn_cuda_place place);

/* launch.c: a helper pass in which each warp does one piece of the work. */
wan_attn_status wan_attn_cuda_launch_warps(const wan_attn_cuda_call *c, wan_attn_cuda_helper helper,
                                           int64_t warps, void *args);

/* lists.c: what a call that leaves blocks out has to know of them: the means of keys and values,
 * where others than those listed count, and which values are not finite, under a threshold. */
wan_attn_status wan_attn_cuda_survey_blocks(const wan_attn_cuda_call *c,
                                            wan_attn_cuda_lengths seqused_k);

/* lists.c: what such a call's kernel is told beside `call`. */
void wan_attn_cuda_fill_lists(const wan_attn_cuda_call *c, wan_attn_cuda_listed_args *args);

/* lossy.c: makes q and k INT8, where the call's row wants that. */
wan_attn_status wan_attn_cuda_quantise(const wan_attn_cuda_call *c, wan_attn_cuda_lengths seqused_q,
                                       wan_attn_cuda_lengths seqused_k);

/* lossy.c: adds to the call's guard, if it has one, what v and out tell. */
wan_attn_status wan_attn_cuda_watch(const wan_attn_cuda_call *c, wan_attn_cuda_lengths seqused_k);

#endif /* WAN_ATTN_CUDA_HOST_CALL_H */
