/* SPDX-License-Identifier: Apache-2.0
 * rows.h - what the tables of rows (dispatch.c, backward.c, rope.c) have in common: how a row is
 * described to a caller, and the words for why one cannot run. Knows no op and no kernel.
 */
#ifndef WAN_ATTN_CORE_ROWS_H
#define WAN_ATTN_CORE_ROWS_H

#include "core/kernel.h"

/* As much of a row's description as fits the caller's struct. row: NULL where there is none. */
wan_attn_status wan_attn_describe_row(const wan_attn_kernel_info *row, wan_attn_kernel_info *info);

/* "cpu" or "cuda". */
const char *wan_attn_device_word(int32_t device_type);

/* Whether features that a row needs are not there, or not among `allowed` (0: all are); then reason
 * says so. */
int wan_attn_lacks_features(uint32_t needs, uint32_t allowed, char *reason, size_t size);

/* A forced row that is none. */
wan_attn_status wan_attn_no_such_row(int32_t row, int32_t count, wan_attn_error *err);

/* Appends to a text that is cut where the space ends. format has one %s. */
void wan_attn_append(char *text, size_t size, size_t *used, const char *format, const char *word);

#endif /* WAN_ATTN_CORE_ROWS_H */
