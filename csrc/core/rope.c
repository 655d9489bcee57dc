/* SPDX-License-Identifier: Apache-2.0
 * rope.c - the table of rope kernels, the choice of a row with its reasons, and the op's functions
 * of the C ABI. Knows rows only through rope.h.
 */
#include "core/rope.h"

#include <stdio.h>

#include "core/rows.h"
#include "core/util.h"

/* First reading of the list: declare the rows. */
#define ROPE(row, ...)                                                                             \
    wan_attn_status wan_attn_##row(const wan_attn_rope_problem *, wan_attn_error *);
#define ROPE_ELSEWHERE(...)
#define ROPE_CUDA(row, ...)                                                                        \
    const char *wan_attn_##row##_refuse(const wan_attn_rope_problem *);                            \
    wan_attn_status wan_attn_##row(const wan_attn_rope_problem *, wan_attn_error *);

/* Rows of another architecture are in the table, so that it reads the same everywhere; what they
 * need is never detected here, so they always refuse. */
#if defined(__x86_64__) || defined(_M_X64)
#define ROPE_X86(...) ROPE(__VA_ARGS__)
#define ROPE_ARM(...) ROPE_ELSEWHERE(__VA_ARGS__)
#elif defined(__aarch64__) || defined(_M_ARM64)
#define ROPE_X86(...) ROPE_ELSEWHERE(__VA_ARGS__)
#define ROPE_ARM(...) ROPE(__VA_ARGS__)
#else
#define ROPE_X86(...) ROPE_ELSEWHERE(__VA_ARGS__)
#define ROPE_ARM(...) ROPE_ELSEWHERE(__VA_ARGS__)
#endif
#include "core/rope_rows.def"
#undef ROPE
#undef ROPE_ELSEWHERE
#undef ROPE_CUDA

/* Second reading: the table. */
/* NOLINTBEGIN(bugprone-macro-parentheses): each argument is a whole initialiser */
#define ANY_ROW(row, device, text, ...)                                                            \
    WAN_ATTN_ROW_INFO(row, device, text,                                                           \
                      1u << WAN_ATTN_F32 | 1u << WAN_ATTN_F16 | 1u << WAN_ATTN_BF16, 1,            \
                      WAN_ATTN_ROPE_MAX_HEAD_DIM, __VA_ARGS__)
#define CPU_ROW(row, needs, text, function)                                                        \
    {ANY_ROW(row, WAN_ATTN_CPU, text, .cpu_features = needs), .run = function},
#define ROPE_CUDA(row, since, text)                                                                \
    {ANY_ROW(row, WAN_ATTN_CUDA, text, .arch_min = since, .arch_max = WAN_ATTN_NEWEST_ARCH),       \
     .refuse = wan_attn_##row##_refuse, .run = wan_attn_##row},
#define ROPE(row, needs, text) CPU_ROW(row, needs, text, wan_attn_##row)
#define ROPE_ELSEWHERE(row, needs, text) CPU_ROW(row, needs, text, NULL)
/* NOLINTEND(bugprone-macro-parentheses) */
static const wan_attn_rope_kernel ROWS[] = {
#include "core/rope_rows.def"
};

enum { ROW_COUNT = sizeof(ROWS) / sizeof(ROWS[0]) };

int32_t wan_attn_rope_kernel_count(void) { return ROW_COUNT; }

wan_attn_status wan_attn_rope_kernel_at(int32_t row, wan_attn_kernel_info *info) {
    return wan_attn_describe_row(row >= 0 && row < ROW_COUNT ? &ROWS[row].info : NULL, info);
}

/* Whether this row takes the call; else why not. arch: of the call's device, if it is a GPU. */
static int takes(wan_attn_rope_problem *p, int32_t row, int32_t arch, char *reason, size_t size) {
    const wan_attn_kernel_info *info = &ROWS[row].info;
    p->kernel = row;
    p->kernel_name = info->name;
    if ((int32_t)p->device_type != info->device_type)
        snprintf(reason, size, "runs on %s, the call is on %s",
                 wan_attn_device_word(info->device_type),
                 wan_attn_device_word((int32_t)p->device_type));
    else if (wan_attn_lacks_features(info->cpu_features, p->params->cpu_features, reason, size) ||
             (info->device_type == WAN_ATTN_CUDA &&
              wan_attn_refused_by_arch(info, arch, p->params->x.device_index, reason, size)))
        return 0;
    else {
        const char *why = ROWS[row].refuse ? ROWS[row].refuse(p) : NULL;
        snprintf(reason, size, "%s", why ? why : "");
        return !why;
    }
    return 0;
}

/* UNSUPPORTED, with the reasons of the rows for the call's device. */
static wan_attn_status no_row(wan_attn_rope_problem *p, int32_t arch, wan_attn_error *err) {
    char reasons[900] = "", reason[200];
    size_t used = 0;
    for (int32_t row = 0; row < ROW_COUNT; row++) {
        if ((int32_t)p->device_type != ROWS[row].info.device_type ||
            takes(p, row, arch, reason, sizeof(reason)))
            continue;
        wan_attn_append(reasons, sizeof(reasons), &used, used ? "; %s" : "%s", ROWS[row].info.name);
        wan_attn_append(reasons, sizeof(reasons), &used, ": %s", reason);
    }
    return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "no kernel takes this call: %s",
                         used ? reasons : "they run on cpu and cuda, the call is on this device");
}

/* What the call's GPU is; 0 elsewhere. `what`: the words before the reason. */
static wan_attn_status find_arch(const wan_attn_rope_problem *p, const char *what, int32_t *arch,
                                 wan_attn_error *err) {
    wan_attn_error why = {WAN_ATTN_OK, ""};
    *arch = 0;
    if (p->device_type != WAN_ATTN_CUDA)
        return WAN_ATTN_OK;
    wan_attn_status status = wan_attn_cuda_find_arch(p->params->x.device_index, arch, &why);
    return status == WAN_ATTN_OK ? status : wan_attn_fail(err, status, "%s: %s", what, why.message);
}

static wan_attn_status force(wan_attn_rope_problem *p, int32_t row, wan_attn_error *err) {
    char reason[200];
    int32_t arch = 0;
    if (row < 0 || row >= ROW_COUNT)
        return wan_attn_no_such_row(row, ROW_COUNT, err);
    if ((int32_t)p->device_type == ROWS[row].info.device_type) {
        wan_attn_status status = find_arch(p, ROWS[row].info.name, &arch, err);
        if (status != WAN_ATTN_OK)
            return status;
    }
    if (!takes(p, row, arch, reason, sizeof(reason)))
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s: %s", ROWS[row].info.name, reason);
    return WAN_ATTN_OK;
}

/* The forced row if it can, else the first that can: p->kernel. */
static wan_attn_status choose(wan_attn_rope_problem *p, wan_attn_error *err) {
    char reason[200];
    int32_t arch;
    if (p->params->kernel != -1)
        return force(p, p->params->kernel, err);
    wan_attn_status status = find_arch(p, "no kernel takes this call", &arch, err);
    for (int32_t row = 0; status == WAN_ATTN_OK && row < ROW_COUNT; row++)
        if (takes(p, row, arch, reason, sizeof(reason)))
            return WAN_ATTN_OK;
    return status == WAN_ATTN_OK ? no_row(p, arch, err) : status;
}

wan_attn_status wan_attn_rope_select(const wan_attn_rope_params *params, int32_t *row,
                                     wan_attn_error *err) {
    wan_attn_rope_problem problem;
    if (!row)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, "row must be a pointer, got NULL");
    wan_attn_status status = wan_attn_rope_check(params, &problem, err);
    if (status == WAN_ATTN_OK)
        status = choose(&problem, err);
    if (status != WAN_ATTN_OK)
        return status;
    *row = problem.kernel;
    return wan_attn_ok(err);
}

wan_attn_status wan_attn_rms_norm_rope(const wan_attn_rope_params *params, int32_t *row,
                                       wan_attn_error *err) {
    wan_attn_rope_problem problem;
    wan_attn_status status = wan_attn_rope_check(params, &problem, err);
    if (status == WAN_ATTN_OK)
        status = choose(&problem, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_rope_check_memory(&problem, err);
    if (status != WAN_ATTN_OK)
        return status;
    if (row)
        *row = problem.kernel;
    return problem.batch && problem.seqlen ? ROWS[problem.kernel].run(&problem, err)
                                           : wan_attn_ok(err);
}
