/* SPDX-License-Identifier: Apache-2.0
 * backward.c - the table of backward kernels, the choice of a row with its reasons, and their
 * functions of the C ABI. Knows rows only through backward.h.
 */
#include "core/backward.h"

#include <stdio.h>

#include "core/rows.h"
#include "core/util.h"

#define DT(dtype) (1u << WAN_ATTN_##dtype)

/* First reading of the list: declare the rows. */
#define BACKWARD(row, ...)                                                                         \
    void wan_attn_##row##_plan(wan_attn_backward_problem *);                                       \
    void wan_attn_##row(const wan_attn_backward_problem *);
#define BACKWARD_ELSEWHERE(...)

/* Rows of another architecture are in the table, so that it reads the same everywhere; what they
 * need is never detected here, so they always refuse. */
#if defined(__x86_64__) || defined(_M_X64)
#define BACKWARD_X86(...) BACKWARD(__VA_ARGS__)
#else
#define BACKWARD_X86(...) BACKWARD_ELSEWHERE(__VA_ARGS__)
#endif
#include "core/backward_rows.def"
#undef BACKWARD
#undef BACKWARD_ELSEWHERE

/* Second reading: the table. */
/* NOLINTBEGIN(bugprone-macro-parentheses): each argument is a whole initialiser */
#define CPU_ROW(row, dtype_bits, needs, text, ...)                                                 \
    {.info = {.struct_size = sizeof(wan_attn_kernel_info),                                         \
              .device_type = WAN_ATTN_CPU,                                                         \
              .name = #row,                                                                        \
              .description = text,                                                                 \
              .dtypes = dtype_bits,                                                                \
              .head_dim_min = 1,                                                                   \
              .head_dim_max = 256,                                                                 \
              .head_dim_multiple = 1,                                                              \
              .cpu_features = needs},                                                              \
     __VA_ARGS__},
#define BACKWARD(row, dtypes, needs, text)                                                         \
    CPU_ROW(row, dtypes, needs, text, .plan = wan_attn_##row##_plan, .run = wan_attn_##row)
#define BACKWARD_ELSEWHERE(row, dtypes, needs, text)                                               \
    CPU_ROW(row, dtypes, needs, text, .plan = NULL, .run = NULL)
/* NOLINTEND(bugprone-macro-parentheses) */
static const wan_attn_backward_kernel ROWS[] = {
#include "core/backward_rows.def"
};

enum { ROW_COUNT = sizeof(ROWS) / sizeof(ROWS[0]) };

int32_t wan_attn_backward_kernel_count(void) { return ROW_COUNT; }

wan_attn_status wan_attn_backward_kernel_at(int32_t row, wan_attn_kernel_info *info) {
    return wan_attn_describe_row(row >= 0 && row < ROW_COUNT ? &ROWS[row].info : NULL, info);
}

/* Whether this row takes the call, which has its plan then; else why not. */
static int takes(wan_attn_backward_problem *p, int32_t row, char *reason, size_t size) {
    const wan_attn_kernel_info *info = &ROWS[row].info;
    wan_attn_problem *call = &p->call;
    if (call->device_type != WAN_ATTN_CPU)
        snprintf(reason, size, "runs on cpu, the call is on %s",
                 wan_attn_device_word((int32_t)call->device_type));
    else if (!(info->dtypes & 1u << call->dtype))
        snprintf(reason, size, "does not take %s", wan_attn_dtype_name(call->dtype));
    else if (call->head_dim < info->head_dim_min || call->head_dim > info->head_dim_max)
        snprintf(reason, size, "takes head_dim %d to %d, got %lld", (int)info->head_dim_min,
                 (int)info->head_dim_max, (long long)call->head_dim);
    else if (wan_attn_lacks_features(info->cpu_features, call->params->cpu_features, reason, size))
        return 0;
    else {
        call->kernel = row;
        call->kernel_name = info->name;
        call->workspace_size = 0;
        ROWS[row].plan(p);
        return 1;
    }
    return 0;
}

/* UNSUPPORTED, with the reason of every row. */
static wan_attn_status no_row(wan_attn_backward_problem *p, wan_attn_error *err) {
    char reasons[900] = "", reason[200];
    size_t used = 0;
    for (int32_t row = 0; row < ROW_COUNT; row++) {
        if (takes(p, row, reason, sizeof(reason)))
            continue;
        wan_attn_append(reasons, sizeof(reasons), &used, used ? "; %s" : "%s", ROWS[row].info.name);
        wan_attn_append(reasons, sizeof(reasons), &used, ": %s", reason);
    }
    return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "no kernel computes this call's gradients: %s",
                         reasons);
}

/* The forced row if it can, else the first that can. */
static wan_attn_status choose(wan_attn_backward_problem *p, wan_attn_error *err) {
    char reason[200];
    int32_t forced = p->params->kernel;
    if (forced != -1 && (forced < 0 || forced >= ROW_COUNT))
        return wan_attn_no_such_row(forced, ROW_COUNT, err);
    if (forced != -1)
        return takes(p, forced, reason, sizeof(reason))
                   ? WAN_ATTN_OK
                   : wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s: %s", ROWS[forced].info.name,
                                   reason);
    for (int32_t row = 0; row < ROW_COUNT; row++)
        if (takes(p, row, reason, sizeof(reason)))
            return WAN_ATTN_OK;
    return no_row(p, err);
}

wan_attn_status wan_attn_backward_select(const wan_attn_backward_params *params, int32_t *row,
                                         size_t *workspace_size, wan_attn_error *err) {
    wan_attn_backward_problem problem;
    wan_attn_status status = wan_attn_backward_check(params, &problem, err);
    if (status == WAN_ATTN_OK)
        status = choose(&problem, err);
    if (status != WAN_ATTN_OK)
        return status;
    if (row)
        *row = problem.call.kernel;
    if (workspace_size)
        *workspace_size = problem.call.workspace_size;
    return wan_attn_ok(err);
}

wan_attn_status wan_attn_backward(const wan_attn_backward_params *params, int32_t *row,
                                  wan_attn_error *err) {
    wan_attn_backward_problem problem;
    wan_attn_status status = wan_attn_backward_check(params, &problem, err);
    if (status == WAN_ATTN_OK)
        status = choose(&problem, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_backward_check_memory(&problem, err);
    if (status != WAN_ATTN_OK)
        return status;
    if (row)
        *row = problem.call.kernel;
    if (problem.call.batch)
        ROWS[problem.call.kernel].run(&problem);
    return wan_attn_ok(err);
}
