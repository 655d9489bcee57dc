/* SPDX-License-Identifier: Apache-2.0
 * refusing.h - what the campaigns of broken calls share: a fault and its name, a process for each
 * call, so that one that crashes is a line of the report, and what a refusal must be like.
 */
#ifndef WAN_ATTN_TESTS_REFUSING_H
#define WAN_ATTN_TESTS_REFUSING_H

#include <sys/wait.h>

#include "c/elements.h"
#include "fuzz.h"

enum { UNTOUCHED = 0xa5 };

static wan_attn_tensor dense(int32_t dtype, int ndim, int64_t a, int64_t b, int64_t c, int64_t d) {
    wan_attn_tensor t = {NULL, dtype, WAN_ATTN_CPU, 0, ndim, {a, b, c, d}, {0}};
    int64_t step = 1;
    for (int n = ndim - 1; n >= 0; n--) {
        t.stride[n] = step;
        step *= t.shape[n];
    }
    return t;
}

static buffer *give_memory(wan_attn_tensor *t, int fill) {
    size_t count = 1;
    for (int n = 0; n < t->ndim; n++)
        count *= (size_t)t->shape[n];
    buffer *b = make_buffer(count * element_size(t->dtype), 64, 0, fill);
    t->data = b->at;
    return b;
}

/* An address that may be no one's, of a pointer that may be NULL. */
static void *beyond(const void *from, uint64_t bytes) {
    return (void *)(uintptr_t)((uint64_t)(uintptr_t)from + bytes);
}

/* Ways to break the description of any tensor; d is one of its dimensions. X(name, ALL, code):
 * those who add ways of their own say there of which tensors these are. */
#define DESCRIPTION_FAULTS(X)                                                                      \
    X(data_null, ALL, t->data = NULL)                                                              \
    X(data_misaligned, ALL, t->data = (char *)t->data + 1)                                         \
    X(dtype_negative, ALL, t->dtype = -1)                                                          \
    X(dtype_other, ALL, t->dtype = WAN_ATTN_DTYPE_OTHER)                                           \
    X(dtype_beyond, ALL, t->dtype = INT32_MAX)                                                     \
    X(device_cuda, ALL, t->device_type = WAN_ATTN_CUDA)                                            \
    X(device_other, ALL, t->device_type = WAN_ATTN_DEVICE_OTHER)                                   \
    X(device_negative, ALL, t->device_type = -1)                                                   \
    X(device_beyond, ALL, t->device_type = INT32_MAX)                                              \
    X(device_index, ALL, t->device_index = 1)                                                      \
    X(ndim_0, ALL, t->ndim = 0)                                                                    \
    X(ndim_negative, ALL, t->ndim = -1)                                                            \
    X(ndim_min, ALL, t->ndim = INT32_MIN)                                                          \
    X(ndim_more, ALL, t->ndim += 1)                                                                \
    X(ndim_less, ALL, t->ndim -= 1)                                                                \
    X(ndim_max, ALL, t->ndim = INT32_MAX)                                                          \
    X(size_negative, ALL, t->shape[d] = -1)                                                        \
    X(size_min, ALL, t->shape[d] = INT64_MIN)                                                      \
    X(size_max, ALL, t->shape[d] = INT64_MAX)                                                      \
    X(size_more, ALL, t->shape[d] += 1)                                                            \
    X(size_zero, ALL, t->shape[d] = 0)                                                             \
    X(size_wraps, ALL, t->shape[d] += (int64_t)1 << 32)                                            \
    X(sizes_overflow, ALL,                                                                         \
      t->shape[0] = t->shape[1] = t->shape[2] = t->shape[3] = (int64_t)1 << 32)                    \
    X(stride_overflows, ALL, t->stride[d < t->ndim - 1 || t->ndim == 1 ? d : 0] = INT64_MAX / 2)   \
    X(stride_min, ALL, t->stride[d < t->ndim - 1 || t->ndim == 1 ? d : 0] = INT64_MIN)

/* A fault that was put in: what it is called, and the argument that the message must name. Two
 * operands that do not fit each other may both be meant. */
typedef struct fault {
    char name[60];
    const char *argument;
    int is_misfit;
} fault;

typedef enum outcome { REFUSED, ACCEPTED, WORDS, WROTE, CRASHED, OUTCOMES } outcome;

static const char *const OUTCOME_NAMES[] = {"refused", "ACCEPTED", "WORDS", "WROTE", "CRASHED"};

/* What a child tells; in memory that both see. */
typedef struct report {
    outcome found;
    char message[1300];
} report;

static report *told;

static int is_written(buffer *const *outputs, int count) {
    for (int n = 0; n < count; n++)
        for (size_t at = 0; at < outputs[n]->room; at++)
            if (outputs[n]->pages[at] != UNTOUCHED)
                return 1;
    return 0;
}

/* "<argument> must be <rule>, got <value>", terminated, with its status in it; `names` says whether
 * it is about this fault. */
static outcome judge(wan_attn_status status, const wan_attn_error *err, const fault *faults,
                     int count, int (*names)(const char *message, const fault *f)) {
    if (status == WAN_ATTN_OK)
        return ACCEPTED;
    if (!memchr(err->message, 0, sizeof(err->message)) || err->status != (int32_t)status ||
        !strstr(err->message, " must ") || !strstr(err->message, ", got "))
        return WORDS;
    for (int n = 0; n < count; n++)
        if (names(err->message, &faults[n]))
            return REFUSED;
    return WORDS;
}

/* Whether the answer to a question is OK, or a refusal with words. */
static int is_answer(wan_attn_status status, const wan_attn_error *err) {
    return status == WAN_ATTN_OK || (memchr(err->message, 0, sizeof(err->message)) &&
                                     err->message[0] && err->status == (int32_t)status);
}

/* Writes down the faults, and what was said of them. */
static void tell(const fault *faults, int count, const char *message) {
    snprintf(told->message, sizeof(told->message), "%s%s%s: %s", faults[0].name,
             count > 1 ? " and " : "", count > 1 ? faults[1].name : "", message);
}

#define EXPECT(condition)                                                                          \
    if (!(condition))                                                                              \
    wrong += failed(#condition)

/* A table of `count` rows fills no more of a description than its reader has room for. */
static int check_descriptions(wan_attn_status (*kernel_at)(int32_t, wan_attn_kernel_info *),
                              int32_t count) {
    wan_attn_kernel_info info[2];
    int wrong = 0;
    EXPECT(kernel_at(0, NULL) == WAN_ATTN_INVALID_ARGUMENT);
    for (uint32_t size = 0; size <= sizeof(info); size++) {
        memset(info, UNTOUCHED, sizeof(info));
        info[0].struct_size = size;
        wan_attn_status status = kernel_at(0, info);
        size_t most = size < sizeof(info[0]) ? size : sizeof(info[0]);
        most = most < sizeof(uint32_t) ? sizeof(uint32_t) : most;
        for (size_t at = most; at < sizeof(info); at++)
            EXPECT(((unsigned char *)info)[at] == UNTOUCHED);
        EXPECT((size < sizeof(uint32_t)) == (status != WAN_ATTN_OK));
    }
    info[0].struct_size = sizeof(info[0]);
    EXPECT(kernel_at(-1, info) != WAN_ATTN_OK && kernel_at(count, info) != WAN_ATTN_OK);
    return wrong;
}

/* One campaign: cases below `faults` are the single faults, each in its place; the others are
 * random pairs. */
typedef struct refusals {
    const char *name, *of;
    int faults;
    void (*run_child)(uint64_t number); /* leaves its report in `told` */
    int (*check_rest)(void);            /* what is no fault of a call's parameters */
} refusals;

static outcome run_case(const refusals *r, uint64_t seed, uint64_t number) {
    int status = 0;
    begin_case(seed, number);
    memset(told, 0, sizeof(*told));
    told->found = CRASHED; /* unless the child says otherwise */
    pid_t child = fork();
    if (child < 0)
        abort();
    if (child == 0) {
        if (!getenv("FUZZ_CHILD_SPEAKS") && !freopen("/dev/null", "w", stderr))
            _exit(4);
        r->run_child(number);
        _exit(0);
    }
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        told->found = CRASHED;
    if (told->found != REFUSED) {
        fprintf(stderr, "%s %s\n", OUTCOME_NAMES[told->found], told->message);
        say_how_to_repeat();
    }
    return told->found;
}

static int refuse_all(const refusals *r, int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s SEED FIRST COUNT [SECONDS]\n", r->name);
        return 2;
    }
    uint64_t seed = strtoull(argv[1], NULL, 0), first = strtoull(argv[2], NULL, 0), n = 0;
    uint64_t count = strtoull(argv[3], NULL, 0);
    double end = argc > 4 ? seconds_now() + strtod(argv[4], NULL) : INFINITY;
    int counts[OUTCOMES] = {0};
    say_the_case_of_every_death(r->name);
    told = mmap(NULL, sizeof(*told), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (told == MAP_FAILED)
        abort();
    int wrong = first == 0 ? r->check_rest() : 0;
    for (; n < count && seconds_now() < end; n++)
        counts[run_case(r, seed, first + n)]++;
    printf("%llu broken calls of %s (%d single faults):", (unsigned long long)n, r->of, r->faults);
    for (int found = 0; found < OUTCOMES; found++)
        printf(" %d %s", counts[found], OUTCOME_NAMES[found]);
    printf("; %d wrong about pointers\n", wrong);
    printf("counted: %llu calls, %d crashes, %d wrong, %d accepted\n", (unsigned long long)n,
           counts[CRASHED], wrong + counts[WORDS] + counts[WROTE], counts[ACCEPTED]);
    return wrong != 0 || (uint64_t)counts[REFUSED] != n;
}

#endif /* WAN_ATTN_TESTS_REFUSING_H */
