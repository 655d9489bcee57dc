/* SPDX-License-Identifier: Apache-2.0
 * rope.c - the table of rope kernels, the choice of a row with its reasons, and the op's functions
 * of the C ABI. Knows rows only through rope.h.
 */
#include "core/rope.h"

#include <string.h>

#include "core/cpuid.h"
#include "core/util.h"

/* First reading of the list: declare the rows. */
#define ROPE(row, ...)                                                                             \
    wan_attn_status wan_attn_##row(const wan_attn_rope_problem *, wan_attn_error *);
#define ROPE_ELSEWHERE(...)

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

/* Second reading: the table. */
/* NOLINTBEGIN(bugprone-macro-parentheses): each argument is a whole initialiser */
#define CPU_ROW(row, needs, text, function)                                                        \
    {.info = {.struct_size = sizeof(wan_attn_kernel_info),                                         \
              .device_type = WAN_ATTN_CPU,                                                         \
              .name = #row,                                                                        \
              .description = text,                                                                 \
              .dtypes = 1u << WAN_ATTN_F32 | 1u << WAN_ATTN_F16 | 1u << WAN_ATTN_BF16,             \
              .head_dim_min = 1,                                                                   \
              .head_dim_max = WAN_ATTN_ROPE_MAX_HEAD_DIM,                                          \
              .head_dim_multiple = 1,                                                              \
              .cpu_features = needs},                                                              \
     .run = function},
#define ROPE(row, needs, text) CPU_ROW(row, needs, text, wan_attn_##row)
#define ROPE_ELSEWHERE(row, needs, text) CPU_ROW(row, needs, text, NULL)
/* NOLINTEND(bugprone-macro-parentheses) */
static const wan_attn_rope_kernel ROWS[] = {
#include "core/rope_rows.def"
};

enum { ROW_COUNT = sizeof(ROWS) / sizeof(ROWS[0]) };

int32_t wan_attn_rope_kernel_count(void) { return ROW_COUNT; }

wan_attn_status wan_attn_rope_kernel_at(int32_t row, wan_attn_kernel_info *info) {
    if (row < 0 || row >= ROW_COUNT || !info || info->struct_size < sizeof(uint32_t))
        return WAN_ATTN_INVALID_ARGUMENT;
    uint32_t size = info->struct_size;
    memcpy(info, &ROWS[row].info, size < sizeof(*info) ? size : sizeof(*info));
    info->struct_size = size;
    return WAN_ATTN_OK;
}

static uint32_t missing_features(const wan_attn_rope_problem *p, int32_t row) {
    uint32_t detected = wan_attn_cpu_features(), allowed = p->params->cpu_features;
    return ROWS[row].info.cpu_features & ~(allowed ? detected & allowed : detected);
}

static wan_attn_status refuse_device(const wan_attn_rope_problem *p, const char *what,
                                     wan_attn_error *err) {
    return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s: runs on cpu, the call is on %s", what,
                         p->device_type == WAN_ATTN_CUDA ? "cuda" : "this device");
}

static wan_attn_status force(const wan_attn_rope_problem *p, int32_t row, wan_attn_error *err) {
    if (row < 0 || row >= ROW_COUNT)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT,
                             "kernel must be -1 (the best) or a row from 0 to %d, got %d",
                             ROW_COUNT - 1, (int)row);
    if ((int32_t)p->device_type != ROWS[row].info.device_type)
        return refuse_device(p, ROWS[row].info.name, err);
    uint32_t missing = missing_features(p, row);
    if (missing)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s: needs %s, which this CPU %s",
                             ROWS[row].info.name, wan_attn_cpu_feature_words(missing),
                             missing & ~wan_attn_cpu_features() ? "does not have"
                                                                : "has but the caller has masked");
    return WAN_ATTN_OK;
}

/* The forced row if it can, else the first that can. */
static wan_attn_status choose(const wan_attn_rope_problem *p, int32_t *row, wan_attn_error *err) {
    int32_t forced = p->params->kernel;
    *row = forced;
    if (forced != -1)
        return force(p, forced, err);
    for (*row = 0; *row < ROW_COUNT; ++*row)
        if ((int32_t)p->device_type == ROWS[*row].info.device_type && !missing_features(p, *row))
            return WAN_ATTN_OK;
    return refuse_device(p, "no kernel takes this call", err);
}

wan_attn_status wan_attn_rope_select(const wan_attn_rope_params *params, int32_t *row,
                                     wan_attn_error *err) {
    wan_attn_rope_problem problem;
    int32_t found = -1;
    if (!row)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, "row must be a pointer, got NULL");
    wan_attn_status status = wan_attn_rope_check(params, &problem, err);
    if (status == WAN_ATTN_OK)
        status = choose(&problem, &found, err);
    if (status != WAN_ATTN_OK)
        return status;
    *row = found;
    return wan_attn_ok(err);
}

wan_attn_status wan_attn_rms_norm_rope(const wan_attn_rope_params *params, int32_t *row,
                                       wan_attn_error *err) {
    wan_attn_rope_problem problem;
    int32_t found = -1;
    wan_attn_status status = wan_attn_rope_check(params, &problem, err);
    if (status == WAN_ATTN_OK)
        status = choose(&problem, &found, err);
    if (status == WAN_ATTN_OK)
        status = wan_attn_rope_check_memory(&problem, err);
    if (status != WAN_ATTN_OK)
        return status;
    if (row)
        *row = found;
    return problem.batch && problem.seqlen ? ROWS[found].run(&problem, err) : wan_attn_ok(err);
}
