/* SPDX-License-Identifier: Apache-2.0
 * broken_call.h - a good call of the C ABI, and every way to break one of its arguments.
 */
#ifndef WAN_ATTN_TESTS_BROKEN_CALL_H
#define WAN_ATTN_TESTS_BROKEN_CALL_H

#include "refusing.h"

enum { OUTPUTS = 3 };

typedef struct good_call {
    wan_attn_params p;
    buffer *outputs[OUTPUTS]; /* out, lse, workspace */
} good_call;

/* No size is 1, so that every stride is walked along; q, k and v are 0. */
static good_call make_good_call(void) {
    good_call c;
    wan_attn_params *p = &c.p;
    size_t size = 0;
    memset(&c, 0, sizeof(c));
    p->struct_size = sizeof(*p);
    p->kernel = -1;
    p->q = dense(WAN_ATTN_F32, 4, 2, 70, 4, 16);
    p->k = p->v = dense(WAN_ATTN_F32, 4, 2, 100, 2, 16);
    p->seqused_q = p->seqused_k = dense(WAN_ATTN_I32, 1, 2, 0, 0, 0);
    wan_attn_tensor *const inputs[] = {&p->q, &p->k, &p->v, &p->seqused_q, &p->seqused_k};
    for (int n = 0; n < 5; n++) {
        buffer *memory = give_memory(inputs[n], 0);
        if (n < 3)
            make_read_only(memory);
    }
    for (int n = 3; n < 5; n++)
        for (int64_t b = 0; b < 2; b++)
            write_element(element(inputs[n], b, 0, 0, 0), WAN_ATTN_I32, 3.0);
    p->block_counts = dense(WAN_ATTN_I32, 3, 2, 4, 2, 0);
    p->block_indices = dense(WAN_ATTN_I32, 4, 2, 4, 2, 2);
    give_memory(&p->block_counts, 0);
    give_memory(&p->block_indices, 0);
    for (int64_t n = 0; n < 2 * 4 * 2; n++) { /* both blocks of keys, each time */
        ((int32_t *)p->block_counts.data)[n] = 2;
        ((int32_t *)p->block_indices.data)[2 * n + 1] = 1;
    }
    p->out = dense(WAN_ATTN_F32, 4, 2, 70, 4, 16);
    p->lse = dense(WAN_ATTN_F32, 3, 2, 4, 70, 0);
    p->window_size_left = p->window_size_right = -1;
    p->num_threads = 2;
    if (wan_attn_workspace_size(p, &size, NULL) != WAN_ATTN_OK)
        abort();
    c.outputs[0] = give_memory(&p->out, UNTOUCHED);
    c.outputs[1] = give_memory(&p->lse, UNTOUCHED);
    c.outputs[2] = make_buffer(size + 64, 64, 0, UNTOUCHED);
    p->workspace = c.outputs[2]->at;
    p->workspace_size = size;
    return c;
}

/* Ways to break a tensor's description. FLOATS, LENGTHS, RESULTS, LISTS: of those alone; COUNTS and
 * INDICES of one. */
#define TENSOR_FAULTS(X)                                                                           \
    DESCRIPTION_FAULTS(X)                                                                          \
    X(dtype_lengths, FLOATS, t->dtype = WAN_ATTN_I64)                                              \
    X(dtype_float, LENGTHS, t->dtype = WAN_ATTN_F32)                                               \
    X(dtype_half, RESULTS, t->dtype = WAN_ATTN_F16)                                                \
    X(last_stride_2, FLOATS, t->stride[3] = 2)                                                     \
    X(last_stride_0, FLOATS, t->stride[3] = 0)                                                     \
    X(last_stride_negative, FLOATS, t->stride[3] = -1)                                             \
    X(elements_are_one, RESULTS, t->stride[d < 3 && d < t->ndim ? d : 0] = 0)                      \
    X(elements_overlap, RESULTS, t->stride[d < 3 && d < t->ndim ? d : 0] -= 1)                     \
    X(length_negative, LENGTHS, ((int32_t *)t->data)[d % 2] = -1)                                  \
    X(length_beyond, LENGTHS, ((int32_t *)t->data)[d % 2] = 101)                                   \
    X(length_huge, LENGTHS, ((int32_t *)t->data)[d % 2] = INT32_MAX)                               \
    X(list_i64, LISTS, t->dtype = WAN_ATTN_I64)                                                    \
    X(list_float, LISTS, t->dtype = WAN_ATTN_F32)                                                  \
    X(list_absent, LISTS, t->data = NULL, t->ndim = 0)                                             \
    X(count_negative, COUNTS, ((int32_t *)t->data)[5 * d] = -1)                                    \
    X(count_beyond, COUNTS, ((int32_t *)t->data)[5 * d] = 3)                                       \
    X(count_huge, COUNTS, ((int32_t *)t->data)[5 * d] = INT32_MAX)                                 \
    X(index_negative, INDICES, ((int32_t *)t->data)[10 * d] = -1)                                  \
    X(index_twice, INDICES, ((int32_t *)t->data)[10 * d] = 1)                                      \
    X(index_beyond, INDICES, ((int32_t *)t->data)[10 * d + 1] = 2)                                 \
    X(index_huge, INDICES, ((int32_t *)t->data)[10 * d + 1] = INT32_MAX)

/* Ways to break the rest: X(name, the word that the message must have, code). */
#define OTHER_FAULTS(X)                                                                            \
    X(struct_size_0, "struct_size", p->struct_size = 0)                                            \
    X(struct_size_less, "struct_size", p->struct_size -= 8)                                        \
    X(struct_size_more, "struct_size", p->struct_size += 8)                                        \
    X(struct_size_beyond, "struct_size", p->struct_size = UINT32_MAX)                              \
    X(kernel_below, "kernel", p->kernel = -2)                                                      \
    X(kernel_min, "kernel", p->kernel = INT32_MIN)                                                 \
    X(kernel_beyond, "kernel", p->kernel = wan_attn_kernel_count())                                \
    X(kernel_max, "kernel", p->kernel = INT32_MAX)                                                 \
    X(scale_nan, "scale", p->has_softmax_scale = 1, p->softmax_scale = NAN)                        \
    X(scale_inf, "scale", p->has_softmax_scale = -1, p->softmax_scale = INFINITY)                  \
    X(scale_minus_inf, "scale", p->has_softmax_scale = 1, p->softmax_scale = -INFINITY)            \
    X(precision_below, "precision", p->precision = -1)                                             \
    X(precision_beyond, "precision", p->precision = 2)                                             \
    X(threshold_nan, "skip_threshold", p->skip_threshold = NAN)                                    \
    X(threshold_below, "skip_threshold", p->skip_threshold = -1e-9)                                \
    X(threshold_beyond, "skip_threshold", p->skip_threshold = 1.0 + 1e-9)                          \
    X(guard_size_0, "guard_size", p->guard = p->workspace, p->guard_size = 0)                      \
    X(guard_misaligned, "guard", p->guard = beyond(p->workspace, 2), p->guard_size = 16)           \
    X(window_left, "window_left", p->window_size_left = -2)                                        \
    X(window_left_min, "window_left", p->window_size_left = INT64_MIN)                             \
    X(window_right, "window_right", p->window_size_right = -2)                                     \
    X(window_right_min, "window_right", p->window_size_right = INT64_MIN)                          \
    X(workspace_null, "workspace", p->workspace = NULL)                                            \
    X(workspace_less, "workspace", p->workspace_size -= 1)                                         \
    X(workspace_none, "workspace", p->workspace_size = 0)                                          \
    X(workspace_misaligned_1, "workspace", p->workspace = beyond(p->workspace, 1))                 \
    X(workspace_misaligned_32, "workspace", p->workspace = beyond(p->workspace, 32))               \
    X(out_is_query, "out", p->out.data = p->q.data)                                                \
    X(out_is_key, "out", p->out = p->q, p->out.data = p->k.data)                                   \
    X(out_is_a_row_of_query, "out", p->out.data = beyond(p->q.data, 4 * (uint64_t)p->q.stride[1])) \
    X(lse_is_out, "lse", p->lse.data = p->out.data)                                                \
    X(lse_is_in_query, "lse", p->lse.data = beyond(p->q.data, 64))                                 \
    X(workspace_is_out, "workspace", p->workspace = p->out.data)                                   \
    X(workspace_is_value, "workspace", p->workspace = p->v.data)

typedef enum whose { ALL, FLOATS, LENGTHS, RESULTS, LISTS, COUNTS, INDICES } whose;

typedef wan_attn_params fault_params;

enum { TENSORS = 9, OUT = 3, LSE = 4, K_LENS = 6, BLOCK_COUNTS = 7, BLOCK_INDICES = 8 };

static const char *const TENSOR_NAMES[TENSORS] = {
    "query", "key", "value", "out", "lse", "q_lens", "k_lens", "block_counts", "block_indices"};

static wan_attn_tensor *tensor_at(wan_attn_params *p, int which) {
    wan_attn_tensor *const tensors[TENSORS] = {&p->q,
                                               &p->k,
                                               &p->v,
                                               &p->out,
                                               &p->lse,
                                               &p->seqused_q,
                                               &p->seqused_k,
                                               &p->block_counts,
                                               &p->block_indices};
    return tensors[which];
}

/* lse is of no kind but its own: it has 3 dimensions. The last size of block_indices may be any. */
static inline int takes(whose of, int which, int64_t d) {
    if (which == BLOCK_INDICES && d == 3)
        return 0;
    return of == ALL || (of == FLOATS && which < LSE) ||
           (of == LENGTHS && which > LSE && which <= K_LENS) ||
           (of == RESULTS && (which == OUT || which == LSE)) || (of == LISTS && which > K_LENS) ||
           (of == COUNTS && which == BLOCK_COUNTS) || (of == INDICES && which == BLOCK_INDICES);
}

#define TAKES(of, which) takes(of, which, d)
#include "faults.h"

#endif /* WAN_ATTN_TESTS_BROKEN_CALL_H */
