/* SPDX-License-Identifier: Apache-2.0
 * lists.h - a list of blocks of keys, as rows of the CPU walk along it. Knows no kernel.
 */
#ifndef WAN_ATTN_CORE_LISTS_H
#define WAN_ATTN_CORE_LISTS_H

#include "core/operand.h"
#include "core/util.h"

/* What one block of queries of one head sees. */
typedef struct wan_attn_list {
    const int32_t *index; /* NULL: every block */
    int64_t stride, count;
} wan_attn_list;

static inline int64_t wan_attn_key_blocks(int64_t keys) {
    return wan_attn_divide_up(keys, WAN_ATTN_BLOCK);
}

/* The list of the block that query `row` is in. Not more than what there is room for, should
 * another thread have changed the counts since they were checked. */
static inline wan_attn_list wan_attn_list_of(const wan_attn_problem *p, int64_t b, int64_t head,
                                             int64_t row) {
    const wan_attn_tensor *counts = &p->params->block_counts, *indices = &p->params->block_indices;
    int64_t block = row / WAN_ATTN_BLOCK;
    wan_attn_list list = {.count = wan_attn_key_blocks(p->seqlen_k)};
    if (!p->has_lists)
        return list;
    list.count = ((const int32_t *)counts->data)[b * wan_attn_stride_of(counts, 0) +
                                                 head * wan_attn_stride_of(counts, 1) +
                                                 block * wan_attn_stride_of(counts, 2)];
    list.count = list.count < indices->shape[3] ? list.count : indices->shape[3];
    list.stride = wan_attn_stride_of(indices, 3);
    /* What has no room for an index is no memory. */
    list.index = list.count > 0
                     ? (const int32_t *)indices->data + (b * wan_attn_stride_of(indices, 0) +
                                                         head * wan_attn_stride_of(indices, 1) +
                                                         block * wan_attn_stride_of(indices, 2))
                     : NULL;
    return list;
}

static inline int64_t wan_attn_listed(const wan_attn_list *list, int64_t n) {
    return list->index ? list->index[n * list->stride] : n;
}

/* Passes the blocks whose keys are all before this one. */
static inline void wan_attn_pass_blocks(const wan_attn_list *list, int64_t *at, int64_t key) {
    while (*at < list->count && (wan_attn_listed(list, *at) + 1) * WAN_ATTN_BLOCK <= key)
        ++*at;
}

/* The next blocks of the list, from number *at on, that have a key within the range; at most
 * `most` that are neighbours, as the keys of all of them: whole blocks, whose last may be cut by
 * lengths. begin == end: there are no more. */
static inline wan_attn_key_range wan_attn_next_run(const wan_attn_list *list, int64_t *at,
                                                   wan_attn_key_range within, int64_t most) {
    wan_attn_key_range run = {0, 0};
    wan_attn_pass_blocks(list, at, within.begin);
    if (*at >= list->count || wan_attn_listed(list, *at) * WAN_ATTN_BLOCK >= within.end)
        return run;
    run.begin = run.end = wan_attn_listed(list, *at) * WAN_ATTN_BLOCK;
    for (; *at < list->count && most > 0 && run.end < within.end &&
           wan_attn_listed(list, *at) * WAN_ATTN_BLOCK == run.end;
         ++*at, most--)
        run.end += WAN_ATTN_BLOCK;
    return run;
}

/* Whether a listed block has a key within the range, which is not empty. *at: how far in the list;
 * it starts at 0, and the range's begin must not fall. */
static inline int wan_attn_sees_listed(const wan_attn_list *list, int64_t *at,
                                       wan_attn_key_range within) {
    wan_attn_pass_blocks(list, at, within.begin);
    return *at < list->count && wan_attn_listed(list, *at) * WAN_ATTN_BLOCK < within.end;
}

/* The blocks of which a row with these keys sees every real one. */
static inline wan_attn_key_range wan_attn_whole_blocks(wan_attn_key_range keys, int64_t len_k) {
    wan_attn_key_range blocks = {wan_attn_divide_up(keys.begin, WAN_ATTN_BLOCK),
                                 keys.end == len_k ? wan_attn_key_blocks(len_k)
                                                   : keys.end / WAN_ATTN_BLOCK};
    return blocks;
}

/* How many real keys block n has. */
static inline int64_t wan_attn_keys_in_block(int64_t n, int64_t len_k) {
    int64_t left = len_k - n * WAN_ATTN_BLOCK;
    return left < WAN_ATTN_BLOCK ? left : WAN_ATTN_BLOCK;
}

/* The first block from n on that is not in the list. *at: how far in the list; it starts at 0 and n
 * must not fall. */
static inline int64_t wan_attn_next_other(const wan_attn_list *list, int64_t *at, int64_t n) {
    while (*at < list->count && wan_attn_listed(list, *at) < n)
        ++*at;
    for (; *at < list->count && wan_attn_listed(list, *at) == n; ++*at)
        n++;
    return n;
}

#endif /* WAN_ATTN_CORE_LISTS_H */
