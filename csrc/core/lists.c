/* SPDX-License-Identifier: Apache-2.0
 * lists.c - the contract of lists of blocks, and of a skip_threshold. Knows no kernel.
 */
#include "core/lists.h"

#define INVALID(err, ...) wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, __VA_ARGS__)

/* The first `ndim` sizes of a list are these; what block_indices have behind them is their room. */
static wan_attn_status check_list(const char *name, const wan_attn_tensor *t, int32_t ndim,
                                  const wan_attn_tensor *q, wan_attn_error *err) {
    const int64_t expected[3] = {q->shape[0], q->shape[2], wan_attn_key_blocks(q->shape[1])};
    const char *room = ndim == 4 ? ", capacity" : "";
    int is_shaped = t->ndim == ndim && t->dtype == WAN_ATTN_I32;
    for (int d = 0; d < 3 && is_shaped; d++)
        is_shaped = t->shape[d] == expected[d];
    if (!is_shaped || (ndim == 4 && t->shape[3] < 0))
        return INVALID(err,
                       "%s must be int32 [batch, num_heads_q, ceil(seqlen_q / %d)%s] = [%lld, "
                       "%lld, %lld%s], got %s %s",
                       name, WAN_ATTN_BLOCK, room, (long long)expected[0], (long long)expected[1],
                       (long long)expected[2], room, wan_attn_dtype_name(t->dtype),
                       wan_attn_shape_of(t->shape, t->ndim).text);
    wan_attn_status status = wan_attn_check_device(name, t, q, "query", err);
    return status == WAN_ATTN_OK ? wan_attn_check_reach(name, t, err) : status;
}

wan_attn_status wan_attn_check_lists(const wan_attn_params *a, wan_attn_problem *p,
                                     wan_attn_error *err) {
    int has_counts = !wan_attn_is_absent(&a->block_counts);
    int has_indices = !wan_attn_is_absent(&a->block_indices);
    wan_attn_status status = WAN_ATTN_OK;
    if (!(a->skip_threshold >= 0.0 && a->skip_threshold <= 1.0))
        return INVALID(err, "skip_threshold must be between 0 (off) and 1, got %g",
                       a->skip_threshold);
    if (has_counts != has_indices)
        return INVALID(err, "%s must be given with %s, got None",
                       has_counts ? "block_indices" : "block_counts",
                       has_counts ? "block_counts" : "block_indices");
    if (a->pools_others && !has_counts)
        return INVALID(err, "pools_others must be 0 without block_counts, got %d",
                       (int)a->pools_others);
    if (has_counts)
        status = check_list("block_counts", &a->block_counts, 3, &a->q, err);
    if (has_counts && status == WAN_ATTN_OK)
        status = check_list("block_indices", &a->block_indices, 4, &a->q, err);
    p->has_lists = has_counts;
    p->pools_others = a->pools_others != 0;
    p->skip_threshold = (float)a->skip_threshold;
    return status;
}

/* One list: *is_full becomes 0 if it leaves a block out. */
static wan_attn_status read_list(const wan_attn_problem *p, int64_t b, int64_t head, int64_t block,
                                 int *is_full, wan_attn_error *err) {
    const wan_attn_tensor *counts = &p->params->block_counts;
    int64_t room = p->params->block_indices.shape[3], blocks = wan_attn_key_blocks(p->seqlen_k);
    int64_t count = ((const int32_t *)counts->data)[b * wan_attn_stride_of(counts, 0) +
                                                    head * wan_attn_stride_of(counts, 1) +
                                                    block * wan_attn_stride_of(counts, 2)];
    if (count < 0 || count > room)
        return INVALID(err,
                       "block_counts must be between 0 and block_indices' capacity %lld, got %lld "
                       "for sample %lld, head %lld, block %lld",
                       (long long)room, (long long)count, (long long)b, (long long)head,
                       (long long)block);
    wan_attn_list list = wan_attn_list_of(p, b, head, block * WAN_ATTN_BLOCK);
    for (int64_t n = 0, before = -1; n < count; n++) {
        int64_t index = wan_attn_listed(&list, n);
        if (index <= before || index >= blocks)
            return INVALID(err,
                           "block_indices must rise from 0 on, below ceil(seqlen_k / %d) = %lld, "
                           "got %lld as number %lld for sample %lld, head %lld, block %lld",
                           WAN_ATTN_BLOCK, (long long)blocks, (long long)index, (long long)n,
                           (long long)b, (long long)head, (long long)block);
        before = index;
    }
    *is_full &= count == blocks;
    return WAN_ATTN_OK;
}

wan_attn_status wan_attn_read_lists(wan_attn_problem *p, wan_attn_error *err) {
    wan_attn_status status = WAN_ATTN_OK;
    int is_full = 1;
    int64_t blocks = wan_attn_key_blocks(p->seqlen_q);
    for (int64_t b = 0; b < p->batch && p->has_lists; b++)
        for (int64_t head = 0; head < p->num_heads_q; head++)
            for (int64_t block = 0; block < blocks && status == WAN_ATTN_OK; block++)
                status = read_list(p, b, head, block, &is_full, err);
    if (is_full)
        p->has_lists = p->pools_others = 0;
    return status;
}
