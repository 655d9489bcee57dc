/* SPDX-License-Identifier: Apache-2.0
 * operand.h - what every operand has to be, whatever the op. The checks return OK, or
 * INVALID_ARGUMENT with "<name> must be <rule>, got <value>". Knows no op and no kernel.
 */
#ifndef WAN_ATTN_CORE_OPERAND_H
#define WAN_ATTN_CORE_OPERAND_H

#include "core/kernel.h"

typedef struct wan_attn_shape_text {
    char text[100];
} wan_attn_shape_text;

/* "[2, 64, 24, 128]"; more dimensions than a tensor describes are counted. */
wan_attn_shape_text wan_attn_shape_of(const int64_t *shape, int32_t ndim);

typedef struct wan_attn_device_text {
    char text[24];
} wan_attn_device_text;

/* "cpu" or "cuda:0". */
wan_attn_device_text wan_attn_device_of(const wan_attn_tensor *t);

static inline int wan_attn_is_float(int32_t dtype) {
    return dtype == WAN_ATTN_F32 || dtype == WAN_ATTN_F16 || dtype == WAN_ATTN_BF16;
}

static inline int wan_attn_is_absent(const wan_attn_tensor *t) { return !t->data && t->ndim == 0; }

/* From the first byte to the last it is not too far to compute with. */
wan_attn_status wan_attn_check_reach(const char *name, const wan_attn_tensor *t,
                                     wan_attn_error *err);

/* [batch, seqlen, heads, head_dim] in a dtype that is computed with, and all of check_reach. */
wan_attn_status wan_attn_check_rank_and_dtype(const char *name, const wan_attn_tensor *t,
                                              wan_attn_error *err);

/* Its four sizes are these; `rule` says which those are. */
wan_attn_status wan_attn_check_shape(const char *name, const wan_attn_tensor *t,
                                     const int64_t *expected, const char *rule,
                                     wan_attn_error *err);

wan_attn_status wan_attn_check_cpu_index(const char *name, const wan_attn_tensor *t,
                                         wan_attn_error *err);

/* On the device of `like`, the operand called `owner`. */
wan_attn_status wan_attn_check_device(const char *name, const wan_attn_tensor *t,
                                      const wan_attn_tensor *like, const char *owner,
                                      wan_attn_error *err);

/* What is written has no two elements in one place. */
wan_attn_status wan_attn_check_overlap(const char *name, const wan_attn_tensor *t,
                                       wan_attn_error *err);

/* There is memory behind it, unless it has no element, at an address that suits its dtype. */
wan_attn_status wan_attn_check_memory(const char *name, const wan_attn_tensor *t,
                                      wan_attn_error *err);

/* Those from first_written on are where no other one is. All have passed the checks above. */
enum { WAN_ATTN_MAX_OPERANDS = 13 };
wan_attn_status wan_attn_check_written(const char *const *names,
                                       const wan_attn_tensor *const *tensors, int first_written,
                                       int count, wan_attn_error *err);

int64_t wan_attn_stride_of(const wan_attn_tensor *t, int dim);
wan_attn_view wan_attn_view_of(const wan_attn_tensor *t);

#endif /* WAN_ATTN_CORE_OPERAND_H */
