/* SPDX-License-Identifier: Apache-2.0
 * loops.h - parallel loops as callers of the library may bring them.
 */
#ifndef WAN_ATTN_TESTS_LOOPS_H
#define WAN_ATTN_TESTS_LOOPS_H

#include <pthread.h>
#include <stdint.h>

#include "wan_attn.h"

typedef struct range {
    int64_t begin, end;
    wan_attn_range_fn fn;
    void *ctx;
} range;

static void *run_range(void *argument) {
    range *r = argument;
    r->fn(r->begin, r->end, r->ctx);
    return NULL;
}

/* One thread for each step; a step whose thread cannot be made is run here. */
static int32_t on_threads(int64_t begin, int64_t end, int64_t grain, wan_attn_range_fn fn,
                          void *ctx) {
    pthread_t threads[16];
    range ranges[16];
    int count = 0, is_started[16];
    for (int64_t at = begin; at < end && count < 16; at += grain, count++) {
        range r = {at, at + grain < end && count < 15 ? at + grain : end, fn, ctx};
        ranges[count] = r;
        is_started[count] = !pthread_create(&threads[count], NULL, run_range, &ranges[count]);
    }
    for (int n = 0; n < count; n++) {
        if (is_started[n])
            pthread_join(threads[n], NULL);
        else
            run_range(&ranges[n]);
    }
    return 0;
}

/* One that fails before it has done anything: the call must still be computed. */
static int32_t broken_loop(int64_t begin, int64_t end, int64_t grain, wan_attn_range_fn fn,
                           void *ctx) {
    (void)begin, (void)end, (void)grain, (void)fn, (void)ctx;
    return 1;
}

#endif /* WAN_ATTN_TESTS_LOOPS_H */
