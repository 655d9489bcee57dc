/* SPDX-License-Identifier: Apache-2.0
 * overlap.h - which bytes an operand occupies, and whether two elements may share one. Knows no
 * kernel.
 */
#ifndef WAN_ATTN_CORE_OVERLAP_H
#define WAN_ATTN_CORE_OVERLAP_H

#include "core/kernel.h"

/* From an operand's first byte to its last; more than any machine addresses. Rows multiply strides
 * by small numbers, and 8 times this is still a number. */
#define WAN_ATTN_MAX_REACH (1ll << 60)

/* The bytes of an operand: `width` at first + sum of step[d] * i[d], for 0 <= i[d] <= last[d]. */
typedef struct wan_attn_extent {
    uintptr_t first;
    int64_t reach; /* from `first` to the last byte; -1: there is no byte */
    int64_t step[WAN_ATTN_MAX_NDIM], last[WAN_ATTN_MAX_NDIM]; /* step: in bytes, positive */
    int32_t ndim;                                             /* that are walked along */
    int64_t width;
} wan_attn_extent;

/* Whether the bytes from the first to the last element are at most WAN_ATTN_MAX_REACH. */
int wan_attn_is_within_reach(const wan_attn_tensor *tensor);

/* Whether the operand lies within the address space, and where. It must be within reach. */
int wan_attn_find_extent(const wan_attn_tensor *tensor, wan_attn_extent *extent);

/* Whether two elements of one operand may lie in one place. Strides that interleave without a
 * collision count as if they had one. */
int wan_attn_may_overlap(const wan_attn_tensor *tensor);

/* Whether two operands share a byte. Exact for views of one tensor and whatever else is settled
 * within some thousand steps; for the rest the answer is yes. */
int wan_attn_share_memory(const wan_attn_extent *a, const wan_attn_extent *b);

#endif /* WAN_ATTN_CORE_OVERLAP_H */
