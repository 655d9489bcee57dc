/* SPDX-License-Identifier: Apache-2.0
 * threads.c - the parallel loop of the CPU rows. No pool is kept: torch lends its own
 * (params->parallel), and where it cannot, threads live for one call. So nothing fights torch's
 * pool, breaks after fork, or waits at exit; a thread costs some 20 us, an attention call that is
 * worth splitting takes milliseconds. Knows no kernel.
 */
#include "cpu/threads.h"

#include "core/atomic.h"
#include "core/platform.h"

#define MAX_THREADS 256

typedef struct job {
    wan_attn_counter next;        /* the first task that no thread has taken */
    wan_attn_counter next_worker; /* the first number that no thread has     */
    int64_t count;
    wan_attn_task_fn fn;
    void *ctx;
} job;

static void drain_as(job *j, int64_t worker) {
    for (int64_t task; (task = wan_attn_fetch_add(&j->next, 1)) < j->count;)
        j->fn(task, worker, j->ctx);
}

static void drain(job *j) { drain_as(j, wan_attn_fetch_add(&j->next_worker, 1)); }

/* A range of the caller's loop stands for one or more workers, not for tasks. One drain serves the
 * whole range. */
static void drain_range(int64_t begin, int64_t end, void *ctx) {
    if (begin < end)
        drain((job *)ctx);
}

static wan_attn_thread_result WAN_ATTN_THREAD_CALL thread_main(void *ctx) {
    drain((job *)ctx);
    return WAN_ATTN_THREAD_DONE;
}

static void drain_on_own_threads(job *j, int64_t workers) {
    wan_attn_thread threads[MAX_THREADS];
    int started = 0;
    /* A thread that cannot be made is no error: those that could, and this one, do its share. */
    while (started < workers - 1 && wan_attn_start_thread(&threads[started], thread_main, j))
        started++;
    drain(j);
    for (int t = 0; t < started; t++)
        wan_attn_join_thread(threads[t]);
}

int64_t wan_attn_workers(const wan_attn_params *params, int64_t count) {
    int64_t workers = params->num_threads < count ? params->num_threads : count;
    workers = workers < MAX_THREADS ? workers : MAX_THREADS;
    return workers > 1 ? workers : 1;
}

void wan_attn_run_tasks(const wan_attn_params *params, int64_t count, wan_attn_task_fn fn,
                        void *ctx) {
    job j = {0, 0, count, fn, ctx};
    int64_t workers = wan_attn_workers(params, count);
    if (workers > 1 && params->parallel)
        params->parallel(0, workers, 1, drain_range, &j);
    else if (workers > 1)
        drain_on_own_threads(&j, workers);
    /* Everything, if there is one worker or the caller's loop failed; otherwise nothing is left. No
     * other thread runs now, so number 0 is free. */
    drain_as(&j, 0);
}
