/* SPDX-License-Identifier: Apache-2.0
 * running.h - what it takes to run calls and to look at what they wrote: cases by their numbers,
 * one more of callers' loops, results that are taken out of guarded memory, words for a call that
 * went wrong.
 */
#ifndef WAN_ATTN_TESTS_RUNNING_H
#define WAN_ATTN_TESTS_RUNNING_H

#include "c/loops.h"
#include "random_tensor.h"

static int32_t backwards(int64_t begin, int64_t end, int64_t grain, wan_attn_range_fn fn,
                         void *ctx) {
    (void)grain;
    for (int64_t at = end; at-- > begin;)
        fn(at, at + 1, ctx);
    return 0;
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

/* Whether the bytes beside the buffer are as they were. */
static inline int beside_is_untouched(const buffer *b) {
    for (const unsigned char *at = b->pages; at < b->pages + b->room; at++)
        if ((at < b->at || at >= b->at + b->size) && *at != (unsigned char)b->fill)
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

/* Whether a row that was chosen needs features that the call may not use; 0 allows all. */
static int needs_others(wan_attn_status (*kernel_at)(int32_t, wan_attn_kernel_info *), int32_t row,
                        uint32_t allowed) {
    wan_attn_kernel_info info = {.struct_size = sizeof(info)};
    return kernel_at(row, &info) != WAN_ATTN_OK || (allowed && info.cpu_features & ~allowed);
}

/* Runs the cases that the words of a command name: SEED FIRST COUNT [SECONDS]. How many were wrong;
 * -1: there are too few words. *ran: how many cases. */
static int run_cases(const char *name, int argc, char **argv,
                     int (*run_case)(uint64_t seed, uint64_t number), uint64_t *ran) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s SEED FIRST COUNT [SECONDS]\n", name);
        return -1;
    }
    uint64_t seed = strtoull(argv[1], NULL, 0), first = strtoull(argv[2], NULL, 0);
    uint64_t count = strtoull(argv[3], NULL, 0);
    double end = argc > 4 ? seconds_now() + strtod(argv[4], NULL) : INFINITY;
    int wrong = 0;
    say_the_case_of_every_death(name);
    for (*ran = 0; *ran < count && wrong < MOST_FAILURES && seconds_now() < end; ++*ran)
        wrong += run_case(seed, first + *ran);
    return wrong;
}

#endif /* WAN_ATTN_TESTS_RUNNING_H */
