/* SPDX-License-Identifier: Apache-2.0
 * operand.c - what every operand has to be, whatever the op: its words for messages, its shape,
 * dtype, device, strides and memory. Knows no op and no kernel.
 */
#include "core/operand.h"

#include <stdio.h>
#include <string.h>

#include "core/overlap.h"
#include "core/util.h"

#define INVALID(err, ...) wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, __VA_ARGS__)

/* More than any memory holds, but a stride of 0 makes every size possible; rows multiply sizes, by
 * bytes and padding too, and 2^15 times this is still a number. */
#define MAX_ELEMENTS (1ll << 48)

wan_attn_shape_text wan_attn_shape_of(const int64_t *shape, int32_t ndim) {
    wan_attn_shape_text s = {"["};
    size_t used = 1;
    for (int32_t d = 0; d < ndim && d < WAN_ATTN_MAX_NDIM; d++)
        used += (size_t)snprintf(s.text + used, sizeof(s.text) - used, d ? ", %lld" : "%lld",
                                 (long long)shape[d]);
    snprintf(s.text + used, sizeof(s.text) - used,
             ndim > WAN_ATTN_MAX_NDIM ? ", ...] (%d dimensions)" : "]", (int)ndim);
    return s;
}

wan_attn_device_text wan_attn_device_of(const wan_attn_tensor *t) {
    wan_attn_device_text d = {"another device"};
    if (t->device_type == WAN_ATTN_CPU)
        snprintf(d.text, sizeof(d.text), "cpu");
    else if (t->device_type == WAN_ATTN_CUDA)
        snprintf(d.text, sizeof(d.text), "cuda:%d", (int)t->device_index);
    return d;
}

wan_attn_status wan_attn_check_reach(const char *name, const wan_attn_tensor *t,
                                     wan_attn_error *err) {
    return wan_attn_is_within_reach(t)
               ? WAN_ATTN_OK
               : INVALID(err, "%s must reach over at most 2^60 bytes, got %s with strides %s", name,
                         wan_attn_shape_of(t->shape, t->ndim).text,
                         wan_attn_shape_of(t->stride, t->ndim).text);
}

wan_attn_status wan_attn_check_rank_and_dtype(const char *name, const wan_attn_tensor *t,
                                              wan_attn_error *err) {
    if (t->ndim != 4)
        return INVALID(err, "%s must be [batch, seqlen, heads, head_dim], got %s", name,
                       wan_attn_shape_of(t->shape, t->ndim).text);
    if (!wan_attn_is_float(t->dtype))
        return INVALID(err, "%s must be float32, float16 or bfloat16, got %s", name,
                       wan_attn_dtype_name(t->dtype));
    int64_t elements = 1; /* as if no size were 0: sizes are also multiplied without the others */
    for (int d = 0; d < 4; d++) {
        if (t->shape[d] < 0)
            return INVALID(err, "%s must have no negative size, got %s", name,
                           wan_attn_shape_of(t->shape, 4).text);
        if (t->shape[d] > MAX_ELEMENTS / elements)
            return INVALID(err, "%s must have at most 2^48 elements, got %s", name,
                           wan_attn_shape_of(t->shape, 4).text);
        elements *= t->shape[d] > 0 ? t->shape[d] : 1;
    }
    if (t->shape[3] > 1 && t->stride[3] != 1)
        return INVALID(
            err,
            "%s must have stride 1 in its last dimension, got %lld (%s.contiguous() makes it so)",
            name, (long long)t->stride[3], name);
    return wan_attn_check_reach(name, t, err);
}

wan_attn_status wan_attn_check_shape(const char *name, const wan_attn_tensor *t,
                                     const int64_t *expected, const char *rule,
                                     wan_attn_error *err) {
    if (memcmp(t->shape, expected, 4 * sizeof(int64_t)) != 0)
        return INVALID(err, "%s must be %s = %s, got %s", name, rule,
                       wan_attn_shape_of(expected, 4).text, wan_attn_shape_of(t->shape, 4).text);
    return WAN_ATTN_OK;
}

/* The CPU is one device, with one number. */
wan_attn_status wan_attn_check_cpu_index(const char *name, const wan_attn_tensor *t,
                                         wan_attn_error *err) {
    if (t->device_type == WAN_ATTN_CPU && t->device_index != 0)
        return INVALID(err, "%s must have device_index 0 on the CPU, got %d", name,
                       (int)t->device_index);
    return WAN_ATTN_OK;
}

wan_attn_status wan_attn_check_device(const char *name, const wan_attn_tensor *t,
                                      const wan_attn_tensor *like, const char *owner,
                                      wan_attn_error *err) {
    wan_attn_status status = wan_attn_check_cpu_index(name, t, err);
    if (status != WAN_ATTN_OK)
        return status;
    if (t->device_type != like->device_type || t->device_index != like->device_index)
        return INVALID(err, "%s must be on %s's device %s, got %s", name, owner,
                       wan_attn_device_of(like).text, wan_attn_device_of(t).text);
    return WAN_ATTN_OK;
}

/* 0 for a dimension that is never walked along: its stride may be any number, also one that no
 * address could be computed with. */
wan_attn_status wan_attn_check_written(const char *const *names,
                                       const wan_attn_tensor *const *tensors, int first_written,
                                       int count, wan_attn_error *err) {
    wan_attn_extent extents[WAN_ATTN_MAX_OPERANDS];
    for (int n = 0; n < count; n++)
        (void)wan_attn_find_extent(tensors[n], &extents[n]);
    for (int n = first_written; n < count; n++)
        for (int other = 0; other < n; other++)
            if (tensors[n]->device_type == tensors[other]->device_type &&
                wan_attn_share_memory(&extents[n], &extents[other]))
                return INVALID(err, "%s must share no memory with %s, got addresses %p and %p",
                               names[n], names[other], tensors[n]->data, tensors[other]->data);
    return WAN_ATTN_OK;
}

int64_t wan_attn_stride_of(const wan_attn_tensor *t, int dim) {
    for (int32_t d = 0; d < t->ndim; d++)
        if (t->shape[d] == 0)
            return 0;
    return t->shape[dim] > 1 ? t->stride[dim] : 0;
}

wan_attn_view wan_attn_view_of(const wan_attn_tensor *t) {
    wan_attn_view view = {t->data, (wan_attn_dtype)t->dtype, wan_attn_stride_of(t, 0),
                          wan_attn_stride_of(t, 1), wan_attn_stride_of(t, 2)};
    return view;
}

/* An operand that is described, unless it has no element, lies at a multiple of its element's
 * size. */
wan_attn_status wan_attn_check_memory(const char *name, const wan_attn_tensor *t,
                                      wan_attn_error *err) {
    int64_t size = wan_attn_dtype_size(t->dtype);
    wan_attn_extent extent;
    for (int d = 0; d < t->ndim && d < WAN_ATTN_MAX_NDIM; d++)
        if (t->shape[d] == 0)
            return WAN_ATTN_OK;
    if (!t->data)
        return INVALID(err, "%s must point to memory, got NULL", name);
    if ((uintptr_t)t->data % (uintptr_t)size)
        return INVALID(err, "%s must lie at a multiple of its element's %d bytes, got address %p",
                       name, (int)size, t->data);
    if (!wan_attn_find_extent(t, &extent))
        return INVALID(err, "%s must lie within the address space, got address %p", name, t->data);
    return WAN_ATTN_OK;
}

wan_attn_status wan_attn_check_overlap(const char *name, const wan_attn_tensor *t,
                                       wan_attn_error *err) {
    return wan_attn_may_overlap(t)
               ? INVALID(err,
                         "%s must have each element in a place of its own, got %s with strides %s",
                         name, wan_attn_shape_of(t->shape, t->ndim).text,
                         wan_attn_shape_of(t->stride, t->ndim).text)
               : WAN_ATTN_OK;
}
