/* SPDX-License-Identifier: Apache-2.0
 * dispatch.c - the kernel table and the choice of a row, with its reasons. Knows rows only through
 * kernel.h.
 */
#include <stdio.h>
#include <string.h>

#include "core/cpuid.h"
#include "core/kernel.h"

#define DT(dtype) (1u << WAN_ATTN_##dtype)
#define ON_CPU WAN_ATTN_CPU, 0, 0
#define ON_CUDA(arch_min, arch_max) WAN_ATTN_CUDA, arch_min, arch_max
#define ON_CUDA_FROM(arch_min) WAN_ATTN_CUDA, arch_min, WAN_ATTN_NEWEST_ARCH
#define HEAD_DIM(min, max, multiple) min, max, multiple
#define ONE_HEAD_DIM(size) size, size, 1

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

/* First reading of the list: declare each row's entry point and what it may name under `plan`. */
#define KERNEL(name, ...)                                                                          \
    wan_attn_status wan_attn_##name(const wan_attn_problem *, wan_attn_error *);                   \
    const char *wan_attn_##name##_plan(wan_attn_problem *);
#define KERNEL_ELSEWHERE(...)
#define KERNEL_CUDA(...)
#include "core/kernels.def"
#undef KERNEL
#undef KERNEL_ELSEWHERE
#undef KERNEL_CUDA

/* Second reading: the table. The detour through KERNEL_EXPAND lets ON_CPU and HEAD_DIM expand into
 * their fields first. */
#define KERNEL_INFO(row, device, amin, amax, dtypes, dmin, dmax, dmul, needs, lossy, description)  \
    {sizeof(wan_attn_kernel_info),                                                                 \
     device,                                                                                       \
     #row,                                                                                         \
     description,                                                                                  \
     dtypes,                                                                                       \
     dmin,                                                                                         \
     dmax,                                                                                         \
     dmul,                                                                                         \
     amin,                                                                                         \
     amax,                                                                                         \
     needs,                                                                                        \
     lossy}
#define KERNEL_HERE(row, device, amin, amax, dtypes, dmin, dmax, dmul, needs, lossy, plan,         \
                    description)                                                                   \
    {KERNEL_INFO(row, device, amin, amax, dtypes, dmin, dmax, dmul, needs, lossy, description),    \
     plan, wan_attn_##row},
#define KERNEL_ABSENT(row, device, amin, amax, dtypes, dmin, dmax, dmul, needs, lossy, plan,       \
                      description)                                                                 \
    {KERNEL_INFO(row, device, amin, amax, dtypes, dmin, dmax, dmul, needs, lossy, description),    \
     NULL, NULL},
/* CUDA rows are data for the code in cuda/host: none has functions of its own. */
#define KERNEL_ON_CUDA(row, device, amin, amax, dtypes, dmin, dmax, dmul, lossy, description)      \
    {KERNEL_INFO(row, device, amin, amax, dtypes, dmin, dmax, dmul, 0, lossy, description),        \
     wan_attn_cuda_plan_call, wan_attn_cuda_run_call},
#define KERNEL_EXPAND(macro, ...) macro(__VA_ARGS__)
#define KERNEL(...) KERNEL_EXPAND(KERNEL_HERE, __VA_ARGS__)
#define KERNEL_ELSEWHERE(...) KERNEL_EXPAND(KERNEL_ABSENT, __VA_ARGS__)
#define KERNEL_CUDA(...) KERNEL_EXPAND(KERNEL_ON_CUDA, __VA_ARGS__)
static const wan_attn_kernel KERNELS[] = {
#include "core/kernels.def"
};
#undef KERNEL
#undef KERNEL_ELSEWHERE
#undef KERNEL_CUDA

enum { KERNEL_COUNT = sizeof(KERNELS) / sizeof(KERNELS[0]) };

int32_t wan_attn_kernel_count(void) { return KERNEL_COUNT; }

wan_attn_status wan_attn_kernel_at(int32_t row, wan_attn_kernel_info *info) {
    if (row < 0 || row >= KERNEL_COUNT || !info || info->struct_size < sizeof(uint32_t))
        return WAN_ATTN_INVALID_ARGUMENT;
    uint32_t size = info->struct_size;
    memcpy(info, &KERNELS[row].info, size < sizeof(*info) ? size : sizeof(*info));
    info->struct_size = size;
    return WAN_ATTN_OK;
}

static const char *dtype_name(wan_attn_dtype dtype) {
    static const char *const NAMES[] = {"float32", "float16", "bfloat16"};
    return dtype <= WAN_ATTN_BF16 ? NAMES[dtype] : "other";
}

static const char *device_name(int32_t device_type) {
    return device_type == WAN_ATTN_CPU    ? "cpu"
           : device_type == WAN_ATTN_CUDA ? "cuda"
                                          : "this device";
}

static uint32_t allowed_cpu_features(const wan_attn_params *params) {
    uint32_t detected = wan_attn_cpu_features();
    return params->cpu_features ? detected & params->cpu_features : detected;
}

/* The same for the call's GPU: whether a CUDA row was made for it. */
static int refused_by_arch(const wan_attn_kernel_info *info, int32_t device_index, char *reason,
                           size_t size) {
    int32_t arch = wan_attn_cuda_arch(device_index, reason, size);
    if (arch >= info->arch_min && arch <= info->arch_max)
        return 0;
    if (arch && info->arch_max == WAN_ATTN_NEWEST_ARCH)
        snprintf(reason, size, "needs compute capability %d.%d or newer, cuda:%d has %d.%d",
                 info->arch_min / 10, info->arch_min % 10, (int)device_index, arch / 10, arch % 10);
    else if (arch && info->arch_min == info->arch_max)
        snprintf(reason, size, "needs compute capability %d.%d, cuda:%d has %d.%d",
                 info->arch_min / 10, info->arch_min % 10, (int)device_index, arch / 10, arch % 10);
    else if (arch)
        snprintf(reason, size, "needs compute capability %d.%d to %d.%d, cuda:%d has %d.%d",
                 info->arch_min / 10, info->arch_min % 10, info->arch_max / 10, info->arch_max % 10,
                 (int)device_index, arch / 10, arch % 10);
    return 1;
}

/* How near a row came to taking a call. */
typedef enum nearness { OTHER_DEVICE, OTHER_DTYPE, OTHER_HEAD_DIM, CANNOT, TAKES } nearness;

/* Whether the row is for such calls at all. No words yet: most rows are not, in every call. */
static nearness kind_of(const wan_attn_kernel_info *info, const wan_attn_problem *p) {
    if ((int32_t)p->device_type != info->device_type)
        return OTHER_DEVICE;
    if (!(info->dtypes & 1u << p->dtype))
        return OTHER_DTYPE;
    if (p->head_dim < info->head_dim_min || p->head_dim > info->head_dim_max ||
        p->head_dim % info->head_dim_multiple)
        return OTHER_HEAD_DIM;
    return TAKES;
}

static void tell_kind(nearness near, const wan_attn_kernel_info *info, const wan_attn_problem *p,
                      char *reason, size_t size) {
    if (near == OTHER_DEVICE)
        snprintf(reason, size, "runs on %s, the call is on %s", device_name(info->device_type),
                 device_name((int32_t)p->device_type));
    else if (near == OTHER_DTYPE)
        snprintf(reason, size, "does not take %s", dtype_name(p->dtype));
    else if (info->head_dim_min == info->head_dim_max)
        snprintf(reason, size, "takes head_dim %d, got %lld", (int)info->head_dim_min,
                 (long long)p->head_dim);
    else
        snprintf(reason, size, "takes head_dim %d to %d in steps of %d, got %lld",
                 (int)info->head_dim_min, (int)info->head_dim_max, (int)info->head_dim_multiple,
                 (long long)p->head_dim);
}

/* TAKES, and the row and its plan are in p; or why the row cannot take the call is in reason. */
static nearness ask(int32_t row, wan_attn_problem *p, char *reason, size_t size) {
    const wan_attn_kernel *kernel = &KERNELS[row];
    const wan_attn_kernel_info *info = &kernel->info;
    nearness near = kind_of(info, p);
    if (near != TAKES) {
        tell_kind(near, info, p, reason, size);
        return near;
    }
    uint32_t missing = info->cpu_features & ~allowed_cpu_features(p->params);
    if (missing) {
        snprintf(reason, size, "needs %s, which this CPU %s", wan_attn_cpu_feature_name(missing),
                 missing & ~wan_attn_cpu_features() ? "does not have"
                                                    : "has but the caller has masked");
        return CANNOT;
    }
    if (info->device_type == WAN_ATTN_CUDA &&
        refused_by_arch(info, p->params->q.device_index, reason, size))
        return CANNOT;
    p->kernel = row;
    p->kernel_name = info->name;
    p->workspace_size = 0;
    const char *why = kernel->plan ? kernel->plan(p) : NULL;
    if (why)
        snprintf(reason, size, "%s", why);
    return why ? CANNOT : TAKES;
}

static wan_attn_status forced_row_in_range(int32_t row, wan_attn_error *err) {
    if (row < -1 || row >= KERNEL_COUNT)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT,
                             "kernel must be -1 (the best) or a row from 0 to %d, got %d",
                             KERNEL_COUNT - 1, (int)row);
    return WAN_ATTN_OK;
}

static wan_attn_status take(wan_attn_problem *p, int32_t row, wan_attn_error *err) {
    char reason[200];
    if (ask(row, p, reason, sizeof(reason)) != TAKES)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s: %s", KERNELS[row].info.name, reason);
    return wan_attn_fail(err, WAN_ATTN_OK, "%s", "");
}

/* Appends to a text that is cut where the space ends. */
static void append(char *text, size_t size, size_t *used, const char *format, const char *word) {
    int n = snprintf(text + *used, size - *used, format, word);
    if (n > 0)
        *used = *used + (size_t)n < size ? *used + (size_t)n : size - 1;
}

/* Whether an earlier row, for calls of the same device and dtype, takes this one's head_dim. */
static int head_dim_was_before(int32_t row, const wan_attn_problem *p) {
    for (int32_t r = 0; r < row; r++)
        if (KERNELS[r].info.device_type == (int32_t)p->device_type && !KERNELS[r].info.is_lossy &&
            KERNELS[r].info.dtypes & 1u << p->dtype &&
            KERNELS[r].info.head_dim_max == KERNELS[row].info.head_dim_max)
            return 1;
    return 0;
}

/* UNSUPPORTED, where all rows of the device are for calls of another kind. CUDA rows have one dtype
 * and one head_dim each: a line for every row would be a page. */
static wan_attn_status no_cuda_row_of_the_kind(wan_attn_problem *p, nearness nearest,
                                               wan_attn_error *err) {
    char sizes[100] = "", size[16], reason[200];
    size_t used = 0;
    if (nearest == OTHER_DTYPE)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                             "no kernel takes this call: none for cuda takes %s",
                             dtype_name(p->dtype));
    for (int32_t r = 0; r < KERNEL_COUNT; r++)
        if (!KERNELS[r].info.is_lossy && !head_dim_was_before(r, p) &&
            ask(r, p, reason, sizeof(reason)) == nearest) {
            snprintf(size, sizeof(size), "%d", (int)KERNELS[r].info.head_dim_max);
            append(sizes, sizeof(sizes), &used, used ? ", %s" : "%s", size);
        }
    return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                         "no kernel takes this call: those for cuda take head_dim %s, got %lld",
                         sizes, (long long)p->head_dim);
}

/* UNSUPPORTED, with the reasons of the rows that came nearest: a user of one card is not told of
 * the rows for other dtypes. Neighbours with the same reason share it: "a, b: reason; c: other". */
static wan_attn_status no_row(wan_attn_problem *p, nearness nearest, wan_attn_error *err) {
    char reasons[900] = "", reason[200], before[200] = "";
    size_t used = 0;
    if (p->device_type == WAN_ATTN_CUDA && (nearest == OTHER_DTYPE || nearest == OTHER_HEAD_DIM))
        return no_cuda_row_of_the_kind(p, nearest, err);
    for (int32_t r = 0; r < KERNEL_COUNT; r++) {
        if (KERNELS[r].info.is_lossy || ask(r, p, reason, sizeof(reason)) != nearest)
            continue;
        if (strcmp(reason, before) != 0) {
            append(reasons, sizeof(reasons), &used, used ? ": %s; " : "%s", before);
            snprintf(before, sizeof(before), "%s", reason);
            append(reasons, sizeof(reasons), &used, "%s", KERNELS[r].info.name);
        } else {
            append(reasons, sizeof(reasons), &used, ", %s", KERNELS[r].info.name);
        }
    }
    append(reasons, sizeof(reasons), &used, ": %s", before);
    return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "no kernel takes this call: %s", reasons);
}

/* The row to run: the forced one if it can, else the first exact one that can. */
wan_attn_status wan_attn_choose(wan_attn_problem *p, wan_attn_error *err) {
    int32_t forced = p->params->kernel;
    wan_attn_status status = forced_row_in_range(forced, err);
    if (status != WAN_ATTN_OK || forced >= 0)
        return status == WAN_ATTN_OK ? take(p, forced, err) : status;
    char reason[200];
    nearness nearest = OTHER_DEVICE;
    for (int32_t r = 0; r < KERNEL_COUNT; r++) {
        if (KERNELS[r].info.is_lossy)
            continue;
        nearness near = kind_of(&KERNELS[r].info, p);
        if (near == TAKES)
            near = ask(r, p, reason, sizeof(reason));
        if (near == TAKES)
            return WAN_ATTN_OK;
        nearest = near > nearest ? near : nearest;
    }
    return no_row(p, nearest, err);
}

wan_attn_status wan_attn_ask_row(const wan_attn_problem *p, int32_t row, wan_attn_error *err) {
    wan_attn_problem asked = *p;
    if (row < 0)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT, "row must be at least 0, got %d",
                             (int)row);
    wan_attn_status status = forced_row_in_range(row, err);
    return status == WAN_ATTN_OK ? take(&asked, row, err) : status;
}

const wan_attn_kernel *wan_attn_kernel_of(int32_t row) { return &KERNELS[row]; }
