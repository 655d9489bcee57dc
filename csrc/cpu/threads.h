/* SPDX-License-Identifier: Apache-2.0
 * threads.h - runs numbered tasks on the caller's parallel loop, or on threads made for the call.
 * Knows no kernel.
 */
#ifndef WAN_ATTN_CPU_THREADS_H
#define WAN_ATTN_CPU_THREADS_H

#include "wan_attn.h"

/* `worker` numbers the thread that runs the task: 0 <= worker < wan_attn_workers(), one task at a
 * time. It names a piece of scratch memory and nothing else. */
typedef void (*wan_attn_task_fn)(int64_t task, int64_t worker, void *ctx);

/* How many threads at most will run `count` tasks; at least 1. */
int64_t wan_attn_workers(const wan_attn_params *params, int64_t count);

/* Calls fn(0, ...) ... fn(count - 1, ...), each once, in any order, on at most params->num_threads
 * threads; returns when all are done. Tasks are handed out one by one, so uneven ones (causal,
 * ragged lengths) still fill every thread. What a task computes must depend on its number alone:
 * then the result does not depend on the number of threads. */
void wan_attn_run_tasks(const wan_attn_params *params, int64_t count, wan_attn_task_fn fn,
                        void *ctx);

#endif /* WAN_ATTN_CPU_THREADS_H */
