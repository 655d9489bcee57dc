/* SPDX-License-Identifier: Apache-2.0
 * running.h - what it takes to run a call and to look at what it wrote: callers' loops, results
 * that are taken out of guarded memory, and words for a call that went wrong.
 */
#ifndef WAN_ATTN_TESTS_RUNNING_H
#define WAN_ATTN_TESTS_RUNNING_H

#include <pthread.h>

#include "random_tensor.h"

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

/* A caller's parallel loop: one thread for each step. */
static int32_t on_threads(int64_t begin, int64_t end, int64_t grain, wan_attn_range_fn fn,
                          void *ctx) {
    pthread_t threads[16];
    range ranges[16];
    int count = 0;
    for (int64_t at = begin; at < end && count < 16; at += grain, count++) {
        range r = {at, at + grain < end && count < 15 ? at + grain : end, fn, ctx};
        ranges[count] = r;
        if (pthread_create(&threads[count], NULL, run_range, &ranges[count]))
            abort();
    }
    for (int n = 0; n < count; n++)
        pthread_join(threads[n], NULL);
    return 0;
}

static int32_t backwards(int64_t begin, int64_t end, int64_t grain, wan_attn_range_fn fn,
                         void *ctx) {
    (void)grain;
    for (int64_t at = end; at-- > begin;)
        fn(at, at + 1, ctx);
    return 0;
}

/* A loop that fails before it has done anything: the call must still be computed. */
static int32_t broken(int64_t begin, int64_t end, int64_t grain, wan_attn_range_fn fn, void *ctx) {
    (void)begin, (void)end, (void)grain, (void)fn, (void)ctx;
    return 1;
}

/* The elements, in order; the places where they were are filled again. */
static size_t take(const wan_attn_tensor *t, const buffer *b, unsigned char **to) {
    size_t width = element_size(t->dtype), size = (size_t)count_of(t) * width;
    unsigned char *next = *to = malloc(size + 1);
    for (int64_t a = 0; a < t->shape[0]; a++)
        for (int64_t i = 0; i < t->shape[1]; i++)
            for (int64_t c = 0; c < t->shape[2]; c++)
                for (int64_t d = 0; d < (t->ndim == 4 ? t->shape[3] : 1); d++, next += width) {
                    void *at = element(t, a, i, c, d);
                    memcpy(next, at, width);
                    memset(at, b->fill, width);
                }
    return size;
}

static int all_is(const buffer *b) {
    for (size_t n = 0; n < b->room; n++)
        if (b->pages[n] != (unsigned char)b->fill)
            return 0;
    return 1;
}

static void print_tensor(const char *name, const wan_attn_tensor *t) {
    fprintf(stderr, "  %s: dtype %d, shape", name, t->dtype);
    for (int d = 0; d < t->ndim; d++)
        fprintf(stderr, " %lld", (long long)t->shape[d]);
    fprintf(stderr, ", strides");
    for (int d = 0; d < t->ndim; d++)
        fprintf(stderr, " %lld", (long long)t->stride[d]);
    fprintf(stderr, "\n");
}

#endif /* WAN_ATTN_TESTS_RUNNING_H */
