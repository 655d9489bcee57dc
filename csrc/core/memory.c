/* SPDX-License-Identifier: Apache-2.0
 * memory.c - what a call's pointers have to be before anything is read or written there. Knows no
 * kernel.
 */
#include "core/operand.h"
#include "core/util.h"

#define INVALID(err, ...) wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, __VA_ARGS__)

enum { WORKSPACE_ALIGNMENT = 64 };

static wan_attn_status check_if_given(const char *name, const wan_attn_tensor *t,
                                      wan_attn_error *err) {
    return t->ndim || t->data ? wan_attn_check_memory(name, t, err) : WAN_ATTN_OK;
}

wan_attn_status wan_attn_check_length_memory(const wan_attn_problem *p, wan_attn_device device,
                                             wan_attn_error *err) {
    const wan_attn_tensor *seqused_q = &p->params->seqused_q;
    const wan_attn_tensor *seqused_k = &p->params->seqused_k;
    wan_attn_status status = WAN_ATTN_OK;
    if (seqused_q->device_type == (int32_t)device)
        status = check_if_given("q_lens", seqused_q, err);
    if (status == WAN_ATTN_OK && seqused_k->device_type == (int32_t)device)
        status = check_if_given("k_lens", seqused_k, err);
    return status;
}

wan_attn_status wan_attn_check_input_memory(const wan_attn_problem *p, wan_attn_error *err) {
    const wan_attn_params *a = p->params;
    wan_attn_status status = wan_attn_check_memory("query", &a->q, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_memory("key", &a->k, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_memory("value", &a->v, err);
    if (status == WAN_ATTN_OK && p->has_lists)
        status = wan_attn_check_memory("block_counts", &a->block_counts, err);
    if (status == WAN_ATTN_OK && p->has_lists)
        status = wan_attn_check_memory("block_indices", &a->block_indices, err);
    /* Those on the CPU have been read. */
    return status == WAN_ATTN_OK && p->device_type != WAN_ATTN_CPU
               ? wan_attn_check_length_memory(p, p->device_type, err)
               : status;
}

wan_attn_status wan_attn_check_output_memory(const wan_attn_problem *p, wan_attn_error *err) {
    const wan_attn_params *a = p->params;
    wan_attn_status status =
        p->batch * p->seqlen_q > 0 ? wan_attn_check_memory("out", &a->out, err) : WAN_ATTN_OK;
    return status == WAN_ATTN_OK ? check_if_given("lse", &a->lse, err) : status;
}

wan_attn_status wan_attn_check_workspace(const wan_attn_problem *p, wan_attn_error *err) {
    const wan_attn_params *a = p->params;
    if (!p->workspace_size)
        return WAN_ATTN_OK;
    if (!a->workspace || a->workspace_size < p->workspace_size)
        return INVALID(err, "workspace must be at least %zu bytes for %s, got %zu",
                       p->workspace_size, p->kernel_name,
                       a->workspace ? a->workspace_size : (size_t)0);
    if ((uintptr_t)a->workspace % WORKSPACE_ALIGNMENT)
        return INVALID(err, "workspace must lie at a multiple of %d bytes, got address %p",
                       WORKSPACE_ALIGNMENT, a->workspace);
    return WAN_ATTN_OK;
}

wan_attn_tensor wan_attn_workspace_of(const wan_attn_problem *p) {
    const wan_attn_params *a = p->params;
    wan_attn_tensor workspace = {a->workspace, WAN_ATTN_I32, a->q.device_type, a->q.device_index, 1,
                                 {0},          {1}};
    workspace.shape[0] = wan_attn_divide_up((int64_t)p->workspace_size, 4);
    return workspace;
}

wan_attn_status wan_attn_check_sharing(const wan_attn_problem *p, wan_attn_error *err) {
    enum { FIRST_WRITTEN = 7, ALL = 10 };
    const wan_attn_params *a = p->params;
    const wan_attn_tensor workspace = wan_attn_workspace_of(p);
    const wan_attn_tensor none = {.data = NULL};
    const wan_attn_tensor *counts = p->has_lists ? &a->block_counts : &none;
    const wan_attn_tensor *indices = p->has_lists ? &a->block_indices : &none;
    const wan_attn_tensor *const tensors[ALL] = {&a->q,         &a->k,     &a->v,   &a->seqused_q,
                                                 &a->seqused_k, counts,    indices, &a->out,
                                                 &a->lse,       &workspace};
    static const char *const NAMES[ALL] = {"query",  "key",          "value",         "q_lens",
                                           "k_lens", "block_counts", "block_indices", "out",
                                           "lse",    "workspace"};
    return wan_attn_check_written(NAMES, tensors, FIRST_WRITTEN, ALL, err);
}
