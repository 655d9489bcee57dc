/* SPDX-License-Identifier: Apache-2.0
 * features.c - core/cpuid.c of the test library: what it finds, and AMX where the rest that the AMX
 * row needs is there.
 */
#define wan_attn_cpu_features detected_features
#include "core/cpuid.c" /* NOLINT(bugprone-suspicious-include): under another name */
#undef wan_attn_cpu_features

uint32_t wan_attn_cpu_features(void) {
    uint32_t found = detected_features();
    return found & WAN_ATTN_CPU_AVX512_BF16 ? found | WAN_ATTN_CPU_AMX : found;
}
