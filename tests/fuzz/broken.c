/* SPDX-License-Identifier: Apache-2.0
 * broken.c - calls that the contract forbids, one fault at a time and two at once: each must be
 * refused with words that name the argument, and nothing may be written. Each runs in a process of
 * its own, so that one that crashes is a line of the report, too.
 *
 *     broken SEED FIRST COUNT [SECONDS]     prints every case that was not refused as it should be
 *
 * Cases below FAULTS are the single faults, each in its place; the others are random pairs.
 */
#include <sys/wait.h>

#include "broken_call.h"

typedef enum outcome { REFUSED, ACCEPTED, WORDS, WROTE, CRASHED, OUTCOMES } outcome;

static const char *const OUTCOME_NAMES[] = {"refused", "ACCEPTED", "WORDS", "WROTE", "CRASHED"};

/* What a child tells; in memory that both see. */
typedef struct report {
    outcome found;
    char message[1020];
} report;

static report *told;

static int is_written(const good_call *c) {
    for (int n = 0; n < OUTPUTS; n++)
        for (size_t at = 0; at < c->outputs[n]->room; at++)
            if (c->outputs[n]->pages[at] != UNTOUCHED)
                return 1;
    return 0;
}

static int names(const char *message, const fault *f) {
    return strstr(message, f->argument) != NULL ||
           (f->is_misfit &&
            (strstr(message, "query") || strstr(message, "key") || strstr(message, "_lens")));
}

/* "<argument> must be <rule>, got <value>", terminated, with its status in it. */
static outcome judge(wan_attn_status status, const wan_attn_error *err, const fault *faults,
                     int count) {
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

/* Questions may refuse or answer; they must come back, and have words for a refusal. */
static outcome ask_everything(const wan_attn_params *p) {
    int32_t row = -1;
    size_t size = 0;
    for (int32_t r = -2; r <= wan_attn_kernel_count(); r++) {
        wan_attn_error err;
        memset(&err, '?', sizeof(err));
        wan_attn_status status = r == -2   ? wan_attn_select(p, &row, &err)
                                 : r == -1 ? wan_attn_workspace_size(p, &size, &err)
                                           : wan_attn_why_not(p, r, &err);
        if (status != WAN_ATTN_OK && (!memchr(err.message, 0, sizeof(err.message)) ||
                                      !err.message[0] || err.status != (int32_t)status))
            return WORDS;
    }
    return wan_attn_select(p, &row, NULL) == WAN_ATTN_INTERNAL ? WORDS : REFUSED;
}

/* Two faults of one argument, or the same one of two operands: one more row of key and of value. */
static int may_undo(int one, int other) {
    int tensors = TENSORS * TENSOR_FAULT_COUNT;
    return !strcmp(argument_of(one), argument_of(other)) ||
           (one < tensors && other < tensors &&
            one % TENSOR_FAULT_COUNT == other % TENSOR_FAULT_COUNT);
}

static void run_child(uint64_t number) {
    good_call c = make_good_call();
    fault faults[2];
    wan_attn_error err;
    int count = number < FAULTS ? 1 : 2;
    int numbers[2] = {(int)number, 0};
    if (count > 1) {
        numbers[0] = (int)pick(FAULTS);
        do
            numbers[1] = (int)pick(FAULTS);
        while (may_undo(numbers[0], numbers[1]));
    }
    for (int n = 0; n < count; n++)
        if (!break_call(&c.p, numbers[n], pick(4), &faults[n])) {
            told->found = REFUSED; /* there is no such fault */
            return;
        }
    snprintf(told->message, sizeof(told->message), "%s%s%s: ", faults[0].name,
             count > 1 ? " and " : "", count > 1 ? faults[1].name : "");
    size_t used = strlen(told->message);
    outcome found = ask_everything(&c.p);
    memset(&err, '?', sizeof(err));
    wan_attn_status status = wan_attn_forward(&c.p, &err);
    err.message[sizeof(err.message) - 1] = 0;
    snprintf(told->message + used, sizeof(told->message) - used, "%s",
             status == WAN_ATTN_OK ? "" : err.message);
    if (found == REFUSED)
        found = judge(status, &err, faults, count);
    told->found = found == REFUSED && is_written(&c) ? WROTE : found;
}

static outcome run_case(uint64_t seed, uint64_t number) {
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
        run_child(number);
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

/* Pointers and numbers beside wan_attn_params. */
static int check_functions(void) {
    wan_attn_kernel_info info[2];
    wan_attn_error err = {0, ""};
    good_call c = make_good_call();
    int32_t count = wan_attn_kernel_count();
    int wrong = 0;
#define EXPECT(condition)                                                                          \
    if (!(condition))                                                                              \
    wrong += failed(#condition)
    EXPECT(wan_attn_forward(NULL, NULL) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_forward(NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "params"));
    EXPECT(wan_attn_select(&c.p, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "row"));
    EXPECT(wan_attn_workspace_size(&c.p, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "size"));
    EXPECT(wan_attn_why_not(&c.p, -1, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "row"));
    EXPECT(wan_attn_why_not(&c.p, count, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_kernel_at(0, NULL) == WAN_ATTN_INVALID_ARGUMENT);
    for (uint32_t size = 0; size <= sizeof(info); size++) {
        memset(info, UNTOUCHED, sizeof(info));
        info[0].struct_size = size;
        wan_attn_status status = wan_attn_kernel_at(0, info);
        size_t most = size < sizeof(info[0]) ? size : sizeof(info[0]);
        most = most < sizeof(uint32_t) ? sizeof(uint32_t) : most;
        for (size_t at = most; at < sizeof(info); at++)
            EXPECT(((unsigned char *)info)[at] == UNTOUCHED);
        EXPECT(size < sizeof(uint32_t) ? status != WAN_ATTN_OK : status == WAN_ATTN_OK);
    }
    info[0].struct_size = sizeof(info[0]);
    EXPECT(wan_attn_kernel_at(-1, info) != WAN_ATTN_OK &&
           wan_attn_kernel_at(count, info) != WAN_ATTN_OK);
    EXPECT(wan_attn_cuda_configure(NULL, &err) == WAN_ATTN_INVALID_ARGUMENT);
    wan_attn_cuda_config config = {sizeof(config) - 1, NULL, NULL, NULL};
    EXPECT(wan_attn_cuda_configure(&config, NULL) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_cuda_device_at(0, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(strcmp(wan_attn_status_name(INT32_MIN), "UNKNOWN") == 0);
    release_buffers_from(0);
    return wrong;
}

/* A wan_attn_call that does not belong to these parameters, or to any. */
static int check_calls(void) {
    good_call c = make_good_call();
    wan_attn_call call;
    wan_attn_error err = {0, ""};
    int wrong = 0;
    memset(&call, 0, sizeof(call));
    EXPECT(wan_attn_prepare(&c.p, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "call"));
    EXPECT(wan_attn_prepare(&c.p, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_run(&c.p, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "call"));
    EXPECT(wan_attn_run(&c.p, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    call.struct_size = sizeof(call);
    EXPECT(wan_attn_run(&c.p, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    memset((char *)&call + sizeof(uint32_t), UNTOUCHED, sizeof(call) - sizeof(uint32_t));
    EXPECT(wan_attn_run(&c.p, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_prepare(NULL, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_prepare(&c.p, &call, &err) == WAN_ATTN_OK);
    EXPECT(wan_attn_run(NULL, &call, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "params"));
    wan_attn_params other = c.p;
    other.q.shape[1] -= 1;
    other.out.shape[1] -= 1;
    EXPECT(wan_attn_run(&other, &call, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "params"));
    other = c.p;
    other.num_threads += 7;
    EXPECT(wan_attn_run(&other, &call, &err) != WAN_ATTN_OK);
    other = c.p;
    other.k.shape[1] = 3; /* a prepare that fails makes the call useless */
    EXPECT(wan_attn_prepare(&other, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_run(&c.p, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(!is_written(&c));
    release_buffers_from(0);
    return wrong;
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: broken SEED FIRST COUNT [SECONDS]\n");
        return 2;
    }
    uint64_t seed = strtoull(argv[1], NULL, 0), first = strtoull(argv[2], NULL, 0), n = 0;
    uint64_t count = strtoull(argv[3], NULL, 0);
    double end = argc > 4 ? seconds_now() + strtod(argv[4], NULL) : INFINITY;
    int counts[OUTCOMES] = {0};
    say_the_case_of_every_death("broken");
    told = mmap(NULL, sizeof(*told), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (told == MAP_FAILED)
        abort();
    int wrong = first == 0 ? check_functions() + check_calls() : 0;
    for (; n < count && seconds_now() < end; n++)
        counts[run_case(seed, first + n)]++;
    printf("%llu broken calls of the C ABI (%d single faults):", (unsigned long long)n, FAULTS);
    for (int found = 0; found < OUTCOMES; found++)
        printf(" %d %s", counts[found], OUTCOME_NAMES[found]);
    printf("; %d wrong about pointers\n", wrong);
    printf("counted: %llu calls, %d crashes, %d wrong, %d accepted\n", (unsigned long long)n,
           counts[CRASHED], wrong + counts[WORDS] + counts[WROTE], counts[ACCEPTED]);
    return wrong != 0 || (uint64_t)counts[REFUSED] != n;
}
