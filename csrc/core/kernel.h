/* SPDX-License-Identifier: Apache-2.0
 * kernel.h - what a row of the kernel table is, and the checked form of a call that rows receive.
 * Knows no kernel's internals.
 */
#ifndef WAN_ATTN_CORE_KERNEL_H
#define WAN_ATTN_CORE_KERNEL_H

#include "wan_attn.h"

/* Infinities, NaN and the order of sums carry meaning in every kernel. */
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) ||                                     \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0)
#error wan_attn must be built without -ffast-math, -ffinite-math-only and -fassociative-math
#endif

/* One [batch, seqlen, heads, head_dim] operand; head_dim has stride 1. */
typedef struct wan_attn_view {
    void *data;
    wan_attn_dtype dtype;
    int64_t batch_stride, row_stride, head_stride;
} wan_attn_view;

/* Real lengths of a padded batch. data == NULL: every sample has the padded length. */
typedef struct wan_attn_lengths {
    const void *data;
    wan_attn_dtype dtype; /* I32 or I64 */
    wan_attn_device device_type;
    int64_t stride;
} wan_attn_lengths;

/* Stands for "no bound" in window_size_left and window_size_right: larger than any key index, small
 * enough to be added to one. */
#define WAN_ATTN_UNBOUNDED (INT64_MAX / 4)

/* arch_max of rows that newer GPUs can run too. */
#define WAN_ATTN_NEWEST_ARCH 999

/* What a row has worked out about a call when it took it. Only the row knows what the words mean:
 * it copies a struct of its own in, and out again when it runs. */
enum { WAN_ATTN_PLAN_WORDS = 28 };
typedef struct wan_attn_row_plan {
    uint64_t words[WAN_ATTN_PLAN_WORDS];
} wan_attn_row_plan;

/* A call that has passed wan_attn_check: everything a row may rely on without looking again. */
typedef struct wan_attn_problem {
    const wan_attn_params *params; /* for stream, workspace, threads and lists of blocks only */
    /* The row that is asked or run, and what it has worked out: its plan, and the bytes of
     * workspace that it needs. */
    int32_t kernel;
    const char *kernel_name;
    wan_attn_row_plan plan;
    size_t workspace_size;
    wan_attn_device device_type;
    int32_t arch;         /* CUDA: of the call's device; 0: not asked yet */
    wan_attn_dtype dtype; /* of v; q and k have it too or are f32 */
    int64_t batch, num_heads_q, num_heads_k, seqlen_q, seqlen_k, head_dim;
    wan_attn_view q, k, v, out;
    float *lse; /* NULL: not wanted */
    int64_t lse_batch_stride, lse_head_stride, lse_row_stride;
    wan_attn_lengths seqused_q, seqused_k;
    double softmax_scale; /* as a float32 it is finite, too */
    /* >= 0; is_causal has become window_size_right = 0. */
    int64_t window_size_left, window_size_right;
    int32_t has_lists; /* of blocks, in params (lists.h); 0: they are absent, or say nothing */
    int32_t pools_others;
    float skip_threshold; /* 0: off */
} wan_attn_problem;

/* One row of the kernel table. */
typedef struct wan_attn_kernel {
    wan_attn_kernel_info info;
    /* NULL, and the problem's plan and workspace_size are filled; or a reason why this row cannot
     * take a call that fits `info`. The whole field may be NULL: the row takes every such call, and
     * needs neither. */
    const char *(*plan)(wan_attn_problem *problem);
    /* Runs a problem that `plan` has filled. */
    wan_attn_status (*run)(const wan_attn_problem *problem, wan_attn_error *err);
} wan_attn_kernel;

/* The keys [begin, end) that one query row sees; begin >= end: none. */
typedef struct wan_attn_key_range {
    int64_t begin, end;
} wan_attn_key_range;

/* cuda/host: what all CUDA rows have in common. The arch of a device, or why it cannot be asked:
 * UNSUPPORTED, or DEVICE_ERROR where it is in trouble; then the two functions of each row. */
wan_attn_status wan_attn_cuda_find_arch(int32_t device_index, int32_t *arch, wan_attn_error *err);
const char *wan_attn_cuda_plan_call(wan_attn_problem *problem);
wan_attn_status wan_attn_cuda_run_call(const wan_attn_problem *problem, wan_attn_error *err);

/* Where the call's guard has the share that a row has lost; NULL: nobody asks. */
static inline float *wan_attn_lost_mass_of(const wan_attn_params *params) {
    wan_attn_guard *guard = (wan_attn_guard *)params->guard;
    return guard && params->guard_size == sizeof(*guard) ? &guard->lost_mass : NULL;
}

/* cpu/guard.c: adds what the operands and the results of a call on the CPU, which has run, tell to
 * its guard. */
void wan_attn_cpu_guard(const wan_attn_problem *problem);

/* lists.c: the description of lists of blocks, and what goes with them; then, on the CPU, what they
 * hold. Where every list names every block they say nothing, and has_lists becomes 0. */
wan_attn_status wan_attn_check_lists(const wan_attn_params *params, wan_attn_problem *problem,
                                     wan_attn_error *err);
wan_attn_status wan_attn_read_lists(wan_attn_problem *problem, wan_attn_error *err);

/* The struct_size of callers that were compiled before there were lists of blocks. */
#define WAN_ATTN_PARAMS_BEFORE_LISTS offsetof(wan_attn_params, block_counts)

/* check.c: params -> problem; INVALID_ARGUMENT with "<argument> must be <rule>, got <value>". The
 * first reads no tensor and leaves out and lse absent; the second reads lengths that lie on the
 * CPU; the third adds out and lse, where they are given. */
wan_attn_status wan_attn_check(const wan_attn_params *params, wan_attn_problem *problem,
                               wan_attn_error *err);
wan_attn_status wan_attn_check_lengths(wan_attn_problem *problem, wan_attn_error *err);
wan_attn_status wan_attn_check_outputs(wan_attn_problem *problem, wan_attn_error *err);

/* check.c: what lse is, and its gradient: float32 [batch, num_heads_q, seqlen_q]. */
wan_attn_status wan_attn_check_lse(const char *name, const wan_attn_tensor *lse,
                                   const wan_attn_tensor *q, wan_attn_error *err);

/* memory.c: there is memory behind what has elements, at addresses that suit it: behind lengths
 * that lie on `device`, behind the inputs, behind out and lse; the workspace that the plan wants.
 * And the last, where all those are well: what is written shares no memory with anything else. */
wan_attn_status wan_attn_check_length_memory(const wan_attn_problem *problem,
                                             wan_attn_device device, wan_attn_error *err);
wan_attn_status wan_attn_check_input_memory(const wan_attn_problem *problem, wan_attn_error *err);
wan_attn_status wan_attn_check_output_memory(const wan_attn_problem *problem, wan_attn_error *err);
wan_attn_status wan_attn_check_workspace(const wan_attn_problem *problem, wan_attn_error *err);
wan_attn_status wan_attn_check_sharing(const wan_attn_problem *problem, wan_attn_error *err);
/* The workspace as an operand. */
wan_attn_tensor wan_attn_workspace_of(const wan_attn_problem *problem);

/* dispatch.c: the choice. Fills the problem's kernel, kernel_name, plan and workspace_size; or
 * UNSUPPORTED, with reasons. */
wan_attn_status wan_attn_choose(wan_attn_problem *problem, wan_attn_error *err);

/* dispatch.c: why this row cannot take the call; other rows do not matter. */
wan_attn_status wan_attn_ask_row(const wan_attn_problem *problem, int32_t row, wan_attn_error *err);

/* dispatch.c: a row of the table, which must be one. */
const wan_attn_kernel *wan_attn_kernel_of(int32_t row);

/* status.c: writes err (if there is one) and returns status, so that a failure is one
 * `return wan_attn_fail(...)`. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
wan_attn_status wan_attn_fail(wan_attn_error *err, wan_attn_status status, const char *format, ...);

/* status.c: writes success into err (if there is one) and returns it. */
wan_attn_status wan_attn_ok(wan_attn_error *err);

/* What stands there for sample b. Only for lengths that the CPU can read, and that are given. */
static inline int64_t wan_attn_raw_length_at(const wan_attn_lengths *lengths, int64_t b) {
    return lengths->dtype == WAN_ATTN_I64 ? ((const int64_t *)lengths->data)[b * lengths->stride]
                                          : ((const int32_t *)lengths->data)[b * lengths->stride];
}

/* The real length of sample b, clamped to [0, padded]. Only for lengths that the CPU can read. */
static inline int64_t wan_attn_length_at(const wan_attn_lengths *lengths, int64_t b,
                                         int64_t padded) {
    if (!lengths->data)
        return padded;
    int64_t n = wan_attn_raw_length_at(lengths, b);
    return n < 0 ? 0 : n < padded ? n : padded;
}

/* The whole mask, in one place: row i of a sample with len_q queries and len_k keys, aligned
 * bottom-right. */
static inline wan_attn_key_range wan_attn_visible_keys(const wan_attn_problem *p, int64_t i,
                                                       int64_t len_q, int64_t len_k) {
    wan_attn_key_range r = {0, 0};
    if (i >= len_q)
        return r;
    int64_t diagonal = i + len_k - len_q;
    r.begin = diagonal - p->window_size_left;
    r.end = diagonal + p->window_size_right + 1;
    r.begin = r.begin > 0 ? r.begin : 0;
    r.end = r.end < len_k ? r.end : len_k;
    return r;
}

#endif /* WAN_ATTN_CORE_KERNEL_H */
