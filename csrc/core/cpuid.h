/* SPDX-License-Identifier: Apache-2.0
 * cpuid.h - CPU features in words; names and detection are public (wan_attn.h). Knows no kernel.
 */
#ifndef WAN_ATTN_CORE_CPUID_H
#define WAN_ATTN_CORE_CPUID_H

#include "wan_attn.h"

/* The lowest feature in the set, for messages. */
const char *wan_attn_cpu_feature_words(uint32_t features);

#endif /* WAN_ATTN_CORE_CPUID_H */
