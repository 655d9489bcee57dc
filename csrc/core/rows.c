/* SPDX-License-Identifier: Apache-2.0
 * rows.c - what the tables of rows have in common.
 */
#include "core/rows.h"

#include <stdio.h>
#include <string.h>

#include "core/cpuid.h"

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
