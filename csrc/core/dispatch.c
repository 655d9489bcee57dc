/* SPDX-License-Identifier: Apache-2.0
 * dispatch.c - the kernel table and the choice of a row, with its reasons. Knows rows only through
 * kernel.h.
 */
#include <stdio.h>
#include <string.h>

#include "core/rows.h"
#include "core/util.h"

#define DT(dtype) (1u << WAN_ATTN_##dtype)

/* First reading of the list: declare the two functions of each row of the CPU. */
#define ROW(...)
#define KERNEL(row, ...)                                                                           \
    const char *wan_attn_##row##_plan(wan_attn_problem *);                                         \
    wan_attn_status wan_attn_##row(const wan_attn_problem *, wan_attn_error *);
#define KERNEL_ELSEWHERE(...)

/* Rows of another architecture are in the table, so that it reads the same everywhere, but not in
 * the library: what they need is never detected here, so they always refuse. */
#if defined(__x86_64__) || defined(_M_X64)
#define KERNEL_X86(...) KERNEL(__VA_ARGS__)
#define KERNEL_ARM(...) KERNEL_ELSEWHERE(__VA_ARGS__)
#elif defined(__aarch64__) || defined(_M_ARM64)
#define KERNEL_X86(...) KERNEL_ELSEWHERE(__VA_ARGS__)
#define KERNEL_ARM(...) KERNEL(__VA_ARGS__)
#else
#define KERNEL_X86(...) KERNEL_ELSEWHERE(__VA_ARGS__)
#define KERNEL_ARM(...) KERNEL_ELSEWHERE(__VA_ARGS__)
#endif
#include "core/kernels.def"
#undef ROW
#undef KERNEL
#undef KERNEL_ELSEWHERE

/* Second reading: the table. A CUDA row is data for cuda/host; its family stands for the first
 * five arguments, hence the detour. */
/* NOLINTBEGIN(bugprone-macro-parentheses): each argument is a whole initialiser */
#define ROW(...) CUDA_ROW(__VA_ARGS__)
#define CUDA_ROW(row, min_arch, max_arch, lossy, lists, text, dtype_bits, size)                    \
    {WAN_ATTN_ROW_INFO(row, WAN_ATTN_CUDA, text, dtype_bits, size, size, .arch_min = min_arch,     \
                       .arch_max = max_arch, .is_lossy = lossy, .takes_block_lists = lists),       \
     .plan = wan_attn_cuda_plan_call, .run = wan_attn_cuda_run_call},
#define CPU_ROW(row, dtype_bits, needs, lossy, text, ...)                                          \
    {WAN_ATTN_ROW_INFO(row, WAN_ATTN_CPU, text, dtype_bits, 1, 256, .cpu_features = needs,         \
                       .is_lossy = lossy, .takes_block_lists = 1),                                 \
     __VA_ARGS__},
#define KERNEL(row, dtypes, needs, lossy, text)                                                    \
    CPU_ROW(row, dtypes, needs, lossy, text, .plan = wan_attn_##row##_plan, .run = wan_attn_##row)
#define KERNEL_ELSEWHERE(row, dtypes, needs, lossy, text)                                          \
    CPU_ROW(row, dtypes, needs, lossy, text, .plan = NULL, .run = NULL)
/* NOLINTEND(bugprone-macro-parentheses) */
static const wan_attn_kernel KERNELS[] = {
#include "core/kernels.def"
};

enum { KERNEL_COUNT = sizeof(KERNELS) / sizeof(KERNELS[0]) };

static const wan_attn_kernel_info *info_at(int32_t row) { return &KERNELS[row].info; }

int32_t wan_attn_kernel_count(void) { return KERNEL_COUNT; }

wan_attn_status wan_attn_kernel_at(int32_t row, wan_attn_kernel_info *info) {
    return wan_attn_describe_row(row >= 0 && row < KERNEL_COUNT ? &KERNELS[row].info : NULL, info);
}

/* TAKES, and the row and its plan are in p; or why the row cannot take the call is in reason. */
static wan_attn_fit ask(int32_t row, wan_attn_problem *p, char *reason, size_t size) {
    /* NOLINTNEXTLINE(clang-analyzer-security.ArrayBound): callers have checked the row */
    const wan_attn_kernel *kernel = &KERNELS[row];
    const wan_attn_kernel_info *info = &kernel->info;
    wan_attn_fit found = wan_attn_kind_of(info, p);
    if (found != WAN_ATTN_TAKES) {
        wan_attn_tell_kind(found, info, p, reason, size);
        return found;
    }
    if (wan_attn_lacks_features(info->cpu_features, p->params->cpu_features, reason, size))
        return WAN_ATTN_CANNOT;
    if (info->device_type == WAN_ATTN_CUDA &&
        wan_attn_refused_by_arch(info, p->arch, p->params->q.device_index, reason, size))
        return WAN_ATTN_CANNOT;
    if ((p->pools_others || p->skip_threshold > 0.0f) && info->is_lossy) {
        snprintf(reason, size, "takes block lists, but neither pools_others nor a skip_threshold");
        return WAN_ATTN_CANNOT;
    }
    p->kernel = row;
    p->kernel_name = info->name;
    p->workspace_size = 0;
    const char *why = kernel->plan ? kernel->plan(p) : NULL;
    if (why)
        snprintf(reason, size, "%s", why);
    return why ? WAN_ATTN_CANNOT : WAN_ATTN_TAKES;
}

static int is_row(int32_t row) { return row >= 0 && row < KERNEL_COUNT; }

static wan_attn_status take(wan_attn_problem *p, int32_t row, wan_attn_error *err) {
    char reason[200];
    if (wan_attn_kind_of(&KERNELS[row].info, p) == WAN_ATTN_TAKES) {
        wan_attn_status status = wan_attn_find_arch(p, KERNELS[row].info.name, err);
        if (status != WAN_ATTN_OK)
            return status;
    }
    if (ask(row, p, reason, sizeof(reason)) != WAN_ATTN_TAKES)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s: %s", KERNELS[row].info.name, reason);
    return wan_attn_ok(err);
}

/* UNSUPPORTED, where all rows of the device are for calls of another kind. CUDA rows have one
 * head_dim each: a line for every row would be a page. */
static wan_attn_status no_cuda_row_of_the_kind(wan_attn_problem *p, wan_attn_fit best,
                                               wan_attn_error *err) {
    char sizes[100] = "";
    const char *those = p->has_lists             ? "cuda with block lists"
                        : wan_attn_leaves_out(p) ? "cuda with a skip_threshold"
                                                 : "cuda";
    if (best == WAN_ATTN_OTHER_DTYPE)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                             "no kernel takes this call: none for %s takes %s", those,
                             wan_attn_dtype_name(p->dtype));
    wan_attn_tell_head_dims(info_at, KERNEL_COUNT, p, sizes, sizeof(sizes));
    return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                         "no kernel takes this call: those for %s take head_dim %s, got %lld",
                         those, sizes, (long long)p->head_dim);
}

/* Whether the row is of the precision that the call asks for. */
static int is_asked(const wan_attn_kernel_info *info, const wan_attn_problem *p) {
    return info->is_lossy == (p->params->precision == WAN_ATTN_QK8);
}

/* UNSUPPORTED, with the reasons of the rows that fit best: a user of one card is not told of
 * the rows for other dtypes. Neighbours with the same reason share it: "a, b: reason; c: other". */
static wan_attn_status no_row(wan_attn_problem *p, wan_attn_fit best, wan_attn_error *err) {
    char reasons[900] = "", reason[200], before[200] = "";
    size_t used = 0;
    if (p->params->precision == WAN_ATTN_QK8 && best != WAN_ATTN_CANNOT &&
        best != WAN_ATTN_OTHER_LISTS)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                             "no kernel takes this call: none for %s computes 8-bit scores of "
                             "%s with head_dim %lld",
                             wan_attn_device_word((int32_t)p->device_type),
                             wan_attn_dtype_name(p->dtype), (long long)p->head_dim);
    if (p->device_type == WAN_ATTN_CUDA &&
        (best == WAN_ATTN_OTHER_DTYPE || best == WAN_ATTN_OTHER_HEAD_DIM))
        return no_cuda_row_of_the_kind(p, best, err);
    for (int32_t r = 0; r < KERNEL_COUNT; r++) {
        if (!is_asked(&KERNELS[r].info, p) || ask(r, p, reason, sizeof(reason)) != best)
            continue;
        if (strcmp(reason, before) != 0) {
            wan_attn_append(reasons, sizeof(reasons), &used, used ? ": %s; " : "%s", before);
            snprintf(before, sizeof(before), "%s", reason);
            wan_attn_append(reasons, sizeof(reasons), &used, "%s", KERNELS[r].info.name);
        } else {
            wan_attn_append(reasons, sizeof(reasons), &used, ", %s", KERNELS[r].info.name);
        }
    }
    wan_attn_append(reasons, sizeof(reasons), &used, ": %s", before);
    return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "no kernel takes this call: %s", reasons);
}

/* The row to run: the forced one if it can, else the first of the asked precision that can. */
wan_attn_status wan_attn_choose(wan_attn_problem *p, wan_attn_error *err) {
    int32_t forced = p->params->kernel;
    if (forced != -1)
        return is_row(forced) ? take(p, forced, err)
                              : wan_attn_no_such_row(forced, KERNEL_COUNT, err);
    char reason[200];
    wan_attn_fit best = WAN_ATTN_OTHER_DEVICE;
    for (int32_t r = 0; r < KERNEL_COUNT; r++) {
        if (!is_asked(&KERNELS[r].info, p))
            continue;
        wan_attn_fit found = wan_attn_kind_of(&KERNELS[r].info, p);
        if (found == WAN_ATTN_TAKES) {
            wan_attn_status status = wan_attn_find_arch(p, "no kernel takes this call", err);
            if (status != WAN_ATTN_OK)
                return status;
            found = ask(r, p, reason, sizeof(reason));
        }
        if (found == WAN_ATTN_TAKES)
            return WAN_ATTN_OK;
        best = found > best ? found : best;
    }
    return no_row(p, best, err);
}

wan_attn_status wan_attn_ask_row(const wan_attn_problem *p, int32_t row, wan_attn_error *err) {
    wan_attn_problem asked = *p;
    if (row < 0)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, "row must be at least 0, got %d",
                             (int)row);
    return is_row(row) ? take(&asked, row, err) : wan_attn_no_such_row(row, KERNEL_COUNT, err);
}

const wan_attn_kernel *wan_attn_kernel_of(int32_t row) { return &KERNELS[row]; }
