/* SPDX-License-Identifier: Apache-2.0
 * cpuid.h - names of CPU features; detection itself is public (wan_attn_cpu_features). Knows no
 * kernel.
 */
#ifndef WAN_ATTN_CORE_CPUID_H
#define WAN_ATTN_CORE_CPUID_H

#include "wan_attn.h"

/* The name of the lowest feature in the set, for messages. */
const char *wan_attn_cpu_feature_name(uint32_t features);

#endif /* WAN_ATTN_CORE_CPUID_H */
