/* SPDX-License-Identifier: Apache-2.0
 * large_pages.h - asks the system to back fresh memory with large pages. Knows no kernel.
 */
#ifndef WAN_ATTN_CPU_LARGE_PAGES_H
#define WAN_ATTN_CPU_LARGE_PAGES_H

#include <stdint.h>

/* A hint about `bytes` of the caller's memory, taken where it is worth the system call. What the
 * memory holds stays, and pages that are there already stay as they are. */
void wan_attn_prefer_large_pages(const void *start, int64_t bytes);

#endif /* WAN_ATTN_CPU_LARGE_PAGES_H */
