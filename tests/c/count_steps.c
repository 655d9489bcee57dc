/* SPDX-License-Identifier: Apache-2.0
 * count_steps.c - counts how often a call is checked, its lengths read, its row chosen and its plan
 * made. Linked into libwan_attn with --wrap for each of these functions (tests/test_call_steps.py).
 */
#include "core/kernel.h"
#include "cpu/blocked.h"
#include "cuda/host/plan.h"

enum { CHECKS, LENGTHS, CHOICES, CPU_PLANS, CUDA_PLANS, COUNTERS };

static int counted[COUNTERS];

__attribute__((visibility("default"))) int steps_counted(int step) {
    int count = counted[step];
    counted[step] = 0;
    return count;
}

/* NOLINTBEGIN(bugprone-reserved-identifier): the linker's names, see --wrap */
wan_attn_status __real_wan_attn_check(const wan_attn_params *, wan_attn_problem *,
                                      wan_attn_error *);
wan_attn_status __wrap_wan_attn_check(const wan_attn_params *params, wan_attn_problem *problem,
                                      wan_attn_error *err) {
    counted[CHECKS]++;
    return __real_wan_attn_check(params, problem, err);
}

wan_attn_status __real_wan_attn_check_lengths(wan_attn_problem *, wan_attn_error *);
wan_attn_status __wrap_wan_attn_check_lengths(wan_attn_problem *problem, wan_attn_error *err) {
    counted[LENGTHS]++;
    return __real_wan_attn_check_lengths(problem, err);
}

wan_attn_status __real_wan_attn_choose(wan_attn_problem *, wan_attn_error *);
wan_attn_status __wrap_wan_attn_choose(wan_attn_problem *problem, wan_attn_error *err) {
    counted[CHOICES]++;
    return __real_wan_attn_choose(problem, err);
}

const char *__real_wan_attn_blocked_plan(wan_attn_problem *, const wan_attn_blocking *);
const char *__wrap_wan_attn_blocked_plan(wan_attn_problem *problem,
                                         const wan_attn_blocking *blocking) {
    counted[CPU_PLANS]++;
    return __real_wan_attn_blocked_plan(problem, blocking);
}

wan_attn_cuda_plan __real_wan_attn_cuda_make_plan(const wan_attn_problem *,
                                                  const wan_attn_cuda_tile *);
wan_attn_cuda_plan __wrap_wan_attn_cuda_make_plan(const wan_attn_problem *problem,
                                                  const wan_attn_cuda_tile *tile) {
    counted[CUDA_PLANS]++;
    return __real_wan_attn_cuda_make_plan(problem, tile);
}
/* NOLINTEND(bugprone-reserved-identifier) */
