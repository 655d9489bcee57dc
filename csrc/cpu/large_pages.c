/* SPDX-License-Identifier: Apache-2.0
 * large_pages.c - asks Linux for large pages. A fresh output of 32 MiB costs 8,192 page faults,
 * more than a tenth of the time of a cross-attention; with pages of 2 MiB it costs 16. numpy does
 * the same for its arrays. Knows no kernel.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* madvise */
#endif

#include "cpu/large_pages.h"

#if defined(__linux__)

#include <sys/mman.h>

/* Below, there are few faults to save. */
#define LEAST_BYTES (4ll << 20)
#define LARGE_PAGE (2ull << 20)

void wan_attn_prefer_large_pages(const void *start, int64_t bytes) {
    uintptr_t first = ((uintptr_t)start + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    uintptr_t end = ((uintptr_t)start + (uintptr_t)bytes) / LARGE_PAGE * LARGE_PAGE;
    if (bytes >= LEAST_BYTES && first < end)
        (void)madvise((void *)first, end - first, MADV_HUGEPAGE); /* a refusal changes nothing */
}

#else

void wan_attn_prefer_large_pages(const void *start, int64_t bytes) {
    (void)start;
    (void)bytes;
}

#endif
