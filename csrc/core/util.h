/* SPDX-License-Identifier: Apache-2.0
 * util.h - small facts that check, rows and launcher share: dtypes, addresses, division. Knows no
 * kernel.
 */
#ifndef WAN_ATTN_CORE_UTIL_H
#define WAN_ATTN_CORE_UTIL_H

#include "core/kernel.h"

/* exp(x) = 2^(x * log2(e)). */
#define WAN_ATTN_LOG2_E 1.4426950408889634

/* In bytes, of an element. */
static inline int64_t wan_attn_dtype_size(int32_t dtype) {
    return dtype == WAN_ATTN_I64 || dtype == WAN_ATTN_F64    ? 8
           : dtype == WAN_ATTN_F16 || dtype == WAN_ATTN_BF16 ? 2
                                                             : 4;
}

static inline const char *wan_attn_dtype_name(int32_t dtype) {
    static const char *const NAMES[] = {"float32", "float16", "bfloat16",
                                        "int32",   "int64",   "float64"};
    return dtype >= 0 && dtype < WAN_ATTN_DTYPE_OTHER ? NAMES[dtype] : "another dtype";
}

/* n / by, rounded up; both positive, or n 0. */
static inline int64_t wan_attn_divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

/* Address of element `index` of an array of this dtype. */
static inline void *wan_attn_element(const void *base, wan_attn_dtype dtype, int64_t index) {
    /* NOLINTNEXTLINE(clang-analyzer-core.NullPointerArithm): what has elements has memory */
    return (char *)base + index * wan_attn_dtype_size(dtype);
}

/* Address of the head_dim elements of one row of one head. */
static inline void *wan_attn_row_address(const wan_attn_view *view, int64_t b, int64_t row,
                                         int64_t head) {
    return wan_attn_element(view->data, view->dtype,
                            b * view->batch_stride + row * view->row_stride +
                                head * view->head_stride);
}

#endif /* WAN_ATTN_CORE_UTIL_H */
