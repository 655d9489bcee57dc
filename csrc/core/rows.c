/* SPDX-License-Identifier: Apache-2.0
 * rows.c - what the tables of rows have in common.
 */
#include "core/rows.h"

#include <stdio.h>
#include <string.h>

#include "core/cpuid.h"
#include "core/util.h"

wan_attn_status wan_attn_describe_row(const wan_attn_kernel_info *row, wan_attn_kernel_info *info) {
    if (!row || !info || info->struct_size < sizeof(uint32_t))
        return WAN_ATTN_INVALID_ARGUMENT;
    uint32_t size = info->struct_size;
    memcpy(info, row, size < sizeof(*info) ? size : sizeof(*info));
    info->struct_size = size;
    return WAN_ATTN_OK;
}

const char *wan_attn_device_word(int32_t device_type) {
    return device_type == WAN_ATTN_CPU    ? "cpu"
           : device_type == WAN_ATTN_CUDA ? "cuda"
                                          : "this device";
}

int wan_attn_lacks_features(uint32_t needs, uint32_t allowed, char *reason, size_t size) {
    uint32_t detected = wan_attn_cpu_features();
    uint32_t missing = needs & ~(allowed ? detected & allowed : detected);
    if (missing)
        snprintf(reason, size, "needs %s, which this CPU %s", wan_attn_cpu_feature_words(missing),
                 missing & ~detected ? "does not have" : "has but the caller has masked");
    return missing != 0;
}

wan_attn_fit wan_attn_kind_of(const wan_attn_kernel_info *row, const wan_attn_problem *p) {
    if ((int32_t)p->device_type != row->device_type)
        return WAN_ATTN_OTHER_DEVICE;
    /* On a GPU a row that takes lists is for nothing else. */
    int is_for_lists = row->takes_block_lists && row->device_type == WAN_ATTN_CUDA;
    if (wan_attn_leaves_out(p) ? !row->takes_block_lists : is_for_lists)
        return WAN_ATTN_OTHER_LISTS;
    if (!(row->dtypes & 1u << p->dtype))
        return WAN_ATTN_OTHER_DTYPE;
    if (p->head_dim < row->head_dim_min || p->head_dim > row->head_dim_max)
        return WAN_ATTN_OTHER_HEAD_DIM;
    return WAN_ATTN_TAKES;
}

void wan_attn_tell_kind(wan_attn_fit found, const wan_attn_kernel_info *row,
                        const wan_attn_problem *p, char *reason, size_t size) {
    if (found == WAN_ATTN_OTHER_DEVICE)
        snprintf(reason, size, "runs on %s, the call is on %s",
                 wan_attn_device_word(row->device_type),
                 wan_attn_device_word((int32_t)p->device_type));
    else if (found == WAN_ATTN_OTHER_DTYPE)
        snprintf(reason, size, "does not take %s", wan_attn_dtype_name(p->dtype));
    else if (found == WAN_ATTN_OTHER_LISTS)
        snprintf(reason, size, "%s",
                 row->takes_block_lists ? "is for block lists or a skip_threshold alone"
                                        : "takes neither block lists nor a skip_threshold");
    else if (row->head_dim_min == row->head_dim_max)
        snprintf(reason, size, "takes head_dim %d, got %lld", (int)row->head_dim_min,
                 (long long)p->head_dim);
    else
        snprintf(reason, size, "takes head_dim %d to %d, got %lld", (int)row->head_dim_min,
                 (int)row->head_dim_max, (long long)p->head_dim);
}

wan_attn_status wan_attn_find_arch(wan_attn_problem *p, const char *what, wan_attn_error *err) {
    wan_attn_error why = {WAN_ATTN_OK, ""};
    if (p->device_type != WAN_ATTN_CUDA || p->arch)
        return WAN_ATTN_OK;
    wan_attn_status status = wan_attn_cuda_find_arch(p->params->q.device_index, &p->arch, &why);
    return status == WAN_ATTN_OK ? status : wan_attn_fail(err, status, "%s: %s", what, why.message);
}

int wan_attn_refused_by_arch(const wan_attn_kernel_info *row, int32_t arch, int32_t device_index,
                             char *reason, size_t size) {
    int index = (int)device_index;
    if (arch >= row->arch_min && arch <= row->arch_max)
        return 0;
    if (row->arch_max == WAN_ATTN_NEWEST_ARCH)
        snprintf(reason, size, "needs compute capability %d.%d or newer, cuda:%d has %d.%d",
                 row->arch_min / 10, row->arch_min % 10, index, arch / 10, arch % 10);
    else if (row->arch_min == row->arch_max)
        snprintf(reason, size, "needs compute capability %d.%d, cuda:%d has %d.%d",
                 row->arch_min / 10, row->arch_min % 10, index, arch / 10, arch % 10);
    else
        snprintf(reason, size, "needs compute capability %d.%d to %d.%d, cuda:%d has %d.%d",
                 row->arch_min / 10, row->arch_min % 10, row->arch_max / 10, row->arch_max % 10,
                 index, arch / 10, arch % 10);
    return 1;
}

/* Whether the row lacks nothing but the call's head_dim. */
static int wants_other_head_dim(const wan_attn_kernel_info *row, const wan_attn_problem *p) {
    return !row->is_lossy && wan_attn_kind_of(row, p) == WAN_ATTN_OTHER_HEAD_DIM;
}

void wan_attn_tell_head_dims(wan_attn_info_at info_at, int32_t count, const wan_attn_problem *p,
                             char *text, size_t size) {
    size_t used = 0;
    for (int32_t row = 0; row < count; row++) {
        int is_told = !wants_other_head_dim(info_at(row), p);
        for (int32_t before = 0; before < row && !is_told; before++)
            is_told = wants_other_head_dim(info_at(before), p) &&
                      info_at(before)->head_dim_max == info_at(row)->head_dim_max;
        char number[16];
        snprintf(number, sizeof(number), "%d", (int)info_at(row)->head_dim_max);
        if (!is_told)
            wan_attn_append(text, size, &used, used ? ", %s" : "%s", number);
    }
}

wan_attn_status wan_attn_no_such_row(int32_t row, int32_t count, wan_attn_error *err) {
    return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT,
                         "kernel must be -1 (the best) or a row from 0 to %d, got %d",
                         (int)count - 1, (int)row);
}

void wan_attn_append(char *text, size_t size, size_t *used, const char *format, const char *word) {
    int n = snprintf(text + *used, size - *used, format, word);
    if (n > 0)
        *used = *used + (size_t)n < size ? *used + (size_t)n : size - 1;
}
