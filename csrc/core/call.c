/* SPDX-License-Identifier: Apache-2.0
 * call.c - the steps of a call: check it, choose its row, let that row make its plan, run it. Each
 * happens once, and a wan_attn_call carries what was found from prepare to run. Knows no kernel.
 */
#include <string.h>

#include "core/kernel.h"

/* What wan_attn_call.opaque holds. The plan is good for these very parameters. */
typedef struct prepared {
    uint64_t tag;
    wan_attn_params params;
    wan_attn_problem problem;
} prepared;

_Static_assert(sizeof(prepared) <= sizeof(((wan_attn_call *)0)->opaque),
               "wan_attn_call.opaque must hold a prepared call");

/* Marks a call that prepare has filled: nothing else is likely to begin so. */
#define PREPARED 0x9d5c1e7a3b60f482ull

/* What prepare has to know; out, lse and the workspace come later. */
static wan_attn_status check_and_choose(const wan_attn_params *params, wan_attn_problem *p,
                                        wan_attn_error *err) {
    wan_attn_status status = wan_attn_check(params, p, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_lengths(p, err);
    return status == WAN_ATTN_OK ? wan_attn_choose(p, err) : status;
}

/* The second half: where the results go, and the row. */
static wan_attn_status check_and_run(wan_attn_problem *p, wan_attn_error *err) {
    wan_attn_status status = wan_attn_check_outputs(p, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_output_memory(p, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_workspace(p, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_sharing(p, err);
    if (status == WAN_ATTN_OK && p->device_type == WAN_ATTN_CPU)
        status = wan_attn_read_lists(p, err);
    if (status != WAN_ATTN_OK || !p->batch || !p->seqlen_q)
        return status; /* nothing to write; rows may divide by these */
    status = wan_attn_kernel_of(p->kernel)->run(p, err);
    if (status == WAN_ATTN_OK && p->params->guard && p->device_type == WAN_ATTN_CPU)
        wan_attn_cpu_guard(p);
    return status;
}

wan_attn_status wan_attn_why_not(const wan_attn_params *params, int32_t row, wan_attn_error *err) {
    wan_attn_problem problem;
    wan_attn_status status = wan_attn_check(params, &problem, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_outputs(&problem, err);
    return status == WAN_ATTN_OK ? wan_attn_ask_row(&problem, row, err) : status;
}

wan_attn_status wan_attn_select(const wan_attn_params *params, int32_t *row, wan_attn_error *err) {
    wan_attn_problem problem;
    if (!row)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, "row must be a pointer, got NULL");
    wan_attn_status status = wan_attn_check(params, &problem, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_outputs(&problem, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_choose(&problem, err);
    if (status == WAN_ATTN_OK)
        *row = problem.kernel;
    return status;
}

wan_attn_status wan_attn_workspace_size(const wan_attn_params *params, size_t *size,
                                        wan_attn_error *err) {
    wan_attn_problem problem;
    if (!size)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, "size must be a pointer, got NULL");
    wan_attn_status status = check_and_choose(params, &problem, err);
    if (status == WAN_ATTN_OK)
        *size = problem.workspace_size;
    return status;
}

wan_attn_status wan_attn_prepare(const wan_attn_params *params, wan_attn_call *call,
                                 wan_attn_error *err) {
    prepared made;
    if (!call || call->struct_size != sizeof(*call))
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT,
                             "call.struct_size must be %zu (this library's wan_attn_call), got %u",
                             sizeof(*call), call ? (unsigned)call->struct_size : 0u);
    memset(call->opaque, 0, sizeof(made.tag)); /* unprepared, should anything below fail */
    wan_attn_status status = check_and_choose(params, &made.problem, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_input_memory(&made.problem, err);
    if (status != WAN_ATTN_OK)
        return status;
    made.tag = PREPARED;
    memset(&made.params, 0, sizeof(made.params));
    memcpy(&made.params, params, params->struct_size); /* bytes, which run compares */
    memcpy(call->opaque, &made, sizeof(made));
    call->kernel = made.problem.kernel;
    call->workspace_size = made.problem.workspace_size;
    return WAN_ATTN_OK;
}

#define PART_IS_SAME(a, b, begin, end)                                                             \
    (memcmp((const char *)(a) + (begin), (const char *)(b) + (begin), (end) - (begin)) == 0)

/* Whether all is as it was but what only run reads: out and lse, the workspace. */
static int is_same_call(const wan_attn_params *a, const wan_attn_params *b) {
    return PART_IS_SAME(a, b, 0, offsetof(wan_attn_params, out)) &&
           PART_IS_SAME(a, b, offsetof(wan_attn_params, seqused_q),
                        offsetof(wan_attn_params, workspace)) &&
           PART_IS_SAME(a, b, offsetof(wan_attn_params, stream), (size_t)b->struct_size);
}

wan_attn_status wan_attn_run(const wan_attn_params *params, const wan_attn_call *call,
                             wan_attn_error *err) {
    prepared made = {.tag = 0};
    if (!params)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, "params must be a pointer, got NULL");
    if (call && call->struct_size == sizeof(*call))
        memcpy(&made, call->opaque, sizeof(made));
    if (made.tag != PREPARED)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT,
                             "call must come from wan_attn_prepare, got one that does not");
    if (!is_same_call(params, &made.params))
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT,
                             "params must be as wan_attn_prepare saw them but for out, lse and "
                             "workspace, got others");
    made.problem.params = params;
    return check_and_run(&made.problem, err);
}

wan_attn_status wan_attn_forward(const wan_attn_params *params, wan_attn_error *err) {
    wan_attn_problem problem;
    wan_attn_status status = check_and_choose(params, &problem, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_check_input_memory(&problem, err);
    return status == WAN_ATTN_OK ? check_and_run(&problem, err) : status;
}
