/* SPDX-License-Identifier: Apache-2.0
 * backward.c - the table of backward kernels, the choice of a row with its reasons, and their
 * functions of the C ABI. Knows rows only through backward.h.
 */
#include "core/backward.h"

#include <stdio.h>

#include "core/rows.h"
#include "core/util.h"

#define DT(dtype) (1u << WAN_ATTN_##dtype)

/* First reading of the list: declare the rows of the CPU. */
#define BACKWARD_ROW(...)
#define BACKWARD(row, ...)                                                                         \
    const char *wan_attn_##row##_plan(wan_attn_backward_problem *);                                \
    wan_attn_status wan_attn_##row(const wan_attn_backward_problem *, wan_attn_error *);
#define BACKWARD_ELSEWHERE(...)

/* Rows of another architecture are in the table, so that it reads the same everywhere; what they
 * need is never detected here, so they always refuse. */
#if defined(__x86_64__) || defined(_M_X64)
#define BACKWARD_X86(...) BACKWARD(__VA_ARGS__)
#else
#define BACKWARD_X86(...) BACKWARD_ELSEWHERE(__VA_ARGS__)
#endif
#include "core/backward_rows.def"
#undef BACKWARD_ROW
#undef BACKWARD
#undef BACKWARD_ELSEWHERE

/* Second reading: the table. A CUDA row is data for cuda/host; its family stands for five
 * arguments, hence the detour. */
/* NOLINTBEGIN(bugprone-macro-parentheses): each argument is a whole initialiser */
#define BACKWARD_ROW(...) CUDA_ROW(__VA_ARGS__)
#define CUDA_ROW(row, min_arch, max_arch, lossy, lists, text, dtype_bits, size)                    \
    {WAN_ATTN_ROW_INFO(row, WAN_ATTN_CUDA, text, dtype_bits, size, size, .arch_min = min_arch,     \
                       .arch_max = max_arch),                                                      \
     .plan = wan_attn_cuda_plan_backward, .run = wan_attn_cuda_run_backward},
#define CPU_ROW(row, dtype_bits, needs, text, ...)                                                 \
    {WAN_ATTN_ROW_INFO(row, WAN_ATTN_CPU, text, dtype_bits, 1, 256, .cpu_features = needs),        \
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

static const wan_attn_kernel_info *info_at(int32_t row) { return &ROWS[row].info; }

int32_t wan_attn_backward_kernel_count(void) { return ROW_COUNT; }

wan_attn_status wan_attn_backward_kernel_at(int32_t row, wan_attn_kernel_info *info) {
    return wan_attn_describe_row(row >= 0 && row < ROW_COUNT ? &ROWS[row].info : NULL, info);
}

/* TAKES, and the call has the row and its plan; or why the row cannot take it is in reason. */
static wan_attn_fit ask(wan_attn_backward_problem *p, int32_t row, char *reason, size_t size) {
    const wan_attn_kernel_info *info = &ROWS[row].info;
    wan_attn_problem *call = &p->call;
    wan_attn_fit found = wan_attn_kind_of(info, call);
    if (found != WAN_ATTN_TAKES) {
        wan_attn_tell_kind(found, info, call, reason, size);
        return found;
    }
    if (wan_attn_lacks_features(info->cpu_features, call->params->cpu_features, reason, size))
        return WAN_ATTN_CANNOT;
    if (info->device_type == WAN_ATTN_CUDA &&
        wan_attn_refused_by_arch(info, call->arch, call->params->q.device_index, reason, size))
        return WAN_ATTN_CANNOT;
    call->kernel = row;
    call->kernel_name = info->name;
    call->workspace_size = 0;
    const char *why = ROWS[row].plan(p);
    if (why)
        snprintf(reason, size, "%s", why);
    return why ? WAN_ATTN_CANNOT : WAN_ATTN_TAKES;
}

/* UNSUPPORTED, with the reasons of the rows that fit best. CUDA rows have one head_dim each: those
 * are told together. */
static wan_attn_status no_row(wan_attn_backward_problem *p, wan_attn_fit best,
                              wan_attn_error *err) {
    char reasons[900] = "", reason[200];
    size_t used = 0;
    int is_cuda = p->call.device_type == WAN_ATTN_CUDA;
    if (is_cuda && best == WAN_ATTN_OTHER_DTYPE)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                             "no kernel computes this call's gradients: none for cuda takes %s",
                             wan_attn_dtype_name(p->call.dtype));
    if (is_cuda && best == WAN_ATTN_OTHER_HEAD_DIM) {
        wan_attn_tell_head_dims(info_at, ROW_COUNT, &p->call, reasons, sizeof(reasons));
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                             "no kernel computes this call's gradients: those for cuda take "
                             "head_dim %s, got %lld",
                             reasons, (long long)p->call.head_dim);
    }
    for (int32_t row = 0; row < ROW_COUNT; row++) {
        if (ask(p, row, reason, sizeof(reason)) != best)
            continue;
        wan_attn_append(reasons, sizeof(reasons), &used, used ? "; %s" : "%s", ROWS[row].info.name);
        wan_attn_append(reasons, sizeof(reasons), &used, ": %s", reason);
    }
    return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "no kernel computes this call's gradients: %s",
                         reasons);
}

static wan_attn_status force(wan_attn_backward_problem *p, int32_t row, wan_attn_error *err) {
    char reason[200];
    if (row < 0 || row >= ROW_COUNT)
        return wan_attn_no_such_row(row, ROW_COUNT, err);
    if (wan_attn_kind_of(&ROWS[row].info, &p->call) == WAN_ATTN_TAKES) {
        wan_attn_status status = wan_attn_find_arch(&p->call, ROWS[row].info.name, err);
        if (status != WAN_ATTN_OK)
            return status;
    }
    return ask(p, row, reason, sizeof(reason)) == WAN_ATTN_TAKES
               ? WAN_ATTN_OK
               : wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s: %s", ROWS[row].info.name, reason);
}

/* The forced row if it can, else the first that can. */
static wan_attn_status choose(wan_attn_backward_problem *p, wan_attn_error *err) {
    char reason[200];
    wan_attn_fit best = WAN_ATTN_OTHER_DEVICE;
    if (p->params->kernel != -1)
        return force(p, p->params->kernel, err);
    for (int32_t row = 0; row < ROW_COUNT; row++) {
        wan_attn_fit found = wan_attn_kind_of(&ROWS[row].info, &p->call);
        if (found == WAN_ATTN_TAKES) {
            wan_attn_status status =
                wan_attn_find_arch(&p->call, "no kernel computes this call's gradients", err);
            if (status != WAN_ATTN_OK)
                return status;
            found = ask(p, row, reason, sizeof(reason));
        }
        if (found == WAN_ATTN_TAKES)
            return WAN_ATTN_OK;
        best = found > best ? found : best;
    }
    return no_row(p, best, err);
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
    return problem.call.batch ? ROWS[problem.call.kernel].run(&problem, err) : wan_attn_ok(err);
}
