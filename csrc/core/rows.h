/* SPDX-License-Identifier: Apache-2.0
 * rows.h - what the tables of rows (dispatch.c, backward.c, rope.c) have in common: how a row is
 * described to a caller, and the words for why one cannot run. Knows no kernel.
 */
#ifndef WAN_ATTN_CORE_ROWS_H
#define WAN_ATTN_CORE_ROWS_H

#include "core/kernel.h"

/* NOLINTBEGIN(bugprone-macro-parentheses): each argument is a whole initialiser */
/* A row's description, for the tables; behind `most` fields that only some rows have. */
#define WAN_ATTN_ROW_INFO(row, device, text, dtype_bits, least, most, ...)                         \
    .info = {.struct_size = sizeof(wan_attn_kernel_info),                                          \
             .device_type = device,                                                                \
             .name = #row,                                                                         \
             .description = text,                                                                  \
             .dtypes = dtype_bits,                                                                 \
             .head_dim_min = least,                                                                \
             .head_dim_max = most,                                                                 \
             .head_dim_multiple = 1,                                                               \
             __VA_ARGS__}
/* NOLINTEND(bugprone-macro-parentheses) */

/* Row n of a table. */
typedef const wan_attn_kernel_info *(*wan_attn_info_at)(int32_t row);

/* As much of a row's description as fits the caller's struct. row: NULL where there is none. */
wan_attn_status wan_attn_describe_row(const wan_attn_kernel_info *row, wan_attn_kernel_info *info);

/* "cpu" or "cuda". */
const char *wan_attn_device_word(int32_t device_type);

/* Whether features that a row needs are not there, or not among `allowed` (0: all are); then reason
 * says so. */
int wan_attn_lacks_features(uint32_t needs, uint32_t allowed, char *reason, size_t size);

/* How well a row fits a call; the further down, the better. */
typedef enum wan_attn_fit {
    WAN_ATTN_OTHER_DEVICE,
    WAN_ATTN_OTHER_LISTS,
    WAN_ATTN_OTHER_DTYPE,
    WAN_ATTN_OTHER_HEAD_DIM,
    WAN_ATTN_CANNOT,
    WAN_ATTN_TAKES
} wan_attn_fit;

/* Whether the call may leave blocks of keys out. */
static inline int wan_attn_leaves_out(const wan_attn_problem *problem) {
    return problem->has_lists || problem->skip_threshold > 0.0f;
}

/* Whether a row of attention or its gradient is for such calls at all. No words yet: most rows are
 * not, in every call. */
wan_attn_fit wan_attn_kind_of(const wan_attn_kernel_info *row, const wan_attn_problem *problem);
/* The words, where it is not. */
void wan_attn_tell_kind(wan_attn_fit found, const wan_attn_kernel_info *row,
                        const wan_attn_problem *problem, char *reason, size_t size);

/* A call on a GPU needs to know which it is, once. `what`: the words before the reason. */
wan_attn_status wan_attn_find_arch(wan_attn_problem *problem, const char *what,
                                   wan_attn_error *err);
/* Whether a CUDA row was not made for this GPU; then reason says so. */
int wan_attn_refused_by_arch(const wan_attn_kernel_info *row, int32_t arch, int32_t device_index,
                             char *reason, size_t size);

/* Of a table whose CUDA rows have one head_dim each: "64, 80, 128", of the exact rows that lack
 * nothing but the call's. */
void wan_attn_tell_head_dims(wan_attn_info_at info_at, int32_t count,
                             const wan_attn_problem *problem, char *text, size_t size);

/* A forced row that is none. */
wan_attn_status wan_attn_no_such_row(int32_t row, int32_t count, wan_attn_error *err);

/* Appends to a text that is cut where the space ends. format has one %s. */
void wan_attn_append(char *text, size_t size, size_t *used, const char *format, const char *word);

#endif /* WAN_ATTN_CORE_ROWS_H */
