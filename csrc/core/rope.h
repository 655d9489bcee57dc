/* SPDX-License-Identifier: Apache-2.0
 * rope.h - what a row of the table of rope kernels is, and the checked form of a call that rows
 * receive. Knows no kernel's internals.
 */
#ifndef WAN_ATTN_CORE_ROPE_H
#define WAN_ATTN_CORE_ROPE_H

#include "core/kernel.h"

/* The longest head_dim: attention takes no longer one. */
#define WAN_ATTN_ROPE_MAX_HEAD_DIM 256

/* Sizes of the axes of one sample. */
typedef struct wan_attn_grid {
    int64_t frames, height, width;
} wan_attn_grid;

/* A call that has passed wan_attn_rope_check: everything a row may rely on. */
typedef struct wan_attn_rope_problem {
    const wan_attn_rope_params *params; /* for stream and threads only */
    int32_t kernel;                     /* the row that is asked or run */
    const char *kernel_name;
    wan_attn_device device_type;
    int64_t batch, seqlen, num_heads, head_dim;
    wan_attn_view x, out;
    wan_attn_view weight; /* data == NULL: 1; head_stride == 0: the same for each head */
    /* data == NULL: no rotation. With a grid a position is a row, and only row_stride counts. */
    wan_attn_view table;
    int64_t positions;
    const void *grid_sizes; /* NULL: the table has each token's own angles */
    wan_attn_dtype grid_dtype;
    wan_attn_device grid_device;
    int64_t grid_batch_stride, grid_axis_stride;
    int64_t seqlen_offset;
    int has_norm, is_per_head;
    double eps;
    wan_attn_dtype n_dtype, y_dtype; /* what n and y are rounded to; F32: they are not */
} wan_attn_rope_problem;

/* One row of the table. */
typedef struct wan_attn_rope_kernel {
    wan_attn_kernel_info info;
    /* NULL, or a reason why this row cannot take a call that fits `info`. The field may be NULL. */
    const char *(*refuse)(const wan_attn_rope_problem *problem);
    wan_attn_status (*run)(const wan_attn_rope_problem *problem, wan_attn_error *err);
} wan_attn_rope_kernel;

/* rope_check.c: params -> problem, or INVALID_ARGUMENT. The first reads nothing that a tensor
 * points to; the second reads a grid that lies on the CPU, and looks at all memory. */
wan_attn_status wan_attn_rope_check(const wan_attn_rope_params *params,
                                    wan_attn_rope_problem *problem, wan_attn_error *err);
wan_attn_status wan_attn_rope_check_memory(const wan_attn_rope_problem *problem,
                                           wan_attn_error *err);

/* What stands there for sample b, axis 0 to 2. Only for a grid that the CPU can read. */
static inline int64_t wan_attn_grid_size_at(const wan_attn_rope_problem *p, int64_t b, int axis) {
    int64_t at = b * p->grid_batch_stride + axis * p->grid_axis_stride;
    return p->grid_dtype == WAN_ATTN_I64 ? ((const int64_t *)p->grid_sizes)[at]
                                         : ((const int32_t *)p->grid_sizes)[at];
}

/* The pairs that turn by the line, and as many by the column; the frame has the rest. */
static inline int64_t wan_attn_rope_line_pairs(int64_t head_dim) { return head_dim / 2 / 3; }

#endif /* WAN_ATTN_CORE_ROPE_H */
