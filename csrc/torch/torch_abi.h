/* SPDX-License-Identifier: Apache-2.0
 * torch_abi.h - what shim.c uses of torch's stable C ABI (torch >= 2.9), in declarations of our
 * own: torch's headers are not needed to build. Knows no kernel.
 */
#ifndef WAN_ATTN_TORCH_ABI_H
#define WAN_ATTN_TORCH_ABI_H

#include <stdbool.h>
#include <stdint.h>

#include "wan_attn.h"

/* 0, or the call failed: torch has caught the exception, and its words are lost. */
typedef int32_t torch_status;

/* An at::Tensor on the heap. Its owner gives it to aoti_torch_delete_tensor_object. */
typedef struct torch_tensor_object *torch_tensor;
typedef struct torch_library_object *torch_library;

/* An argument or a result of an operator. A tensor is its handle, and belongs to the function that
 * receives it. An optional is 0 for None, else the address of a value on torch's heap, which
 * belongs to the receiver too. Numbers and bool lie in the low bytes, as they do in memory. */
typedef uint64_t torch_value;
typedef void (*torch_kernel)(torch_value *stack, uint64_t num_inputs, uint64_t num_outputs);

/* Every function that the shim calls: F(result, name, parameters). Python asks for the names and
 * fills the table in their order, so this list is the only one. Those of OPTIONAL may be NULL. */
#define WAN_ATTN_SHIM_REQUIRED(F)                                                                  \
    F(wan_attn_status, wan_attn_prepare,                                                           \
      (const wan_attn_params *, wan_attn_call *, wan_attn_error *))                                \
    F(wan_attn_status, wan_attn_run,                                                               \
      (const wan_attn_params *, const wan_attn_call *, wan_attn_error *))                          \
    F(wan_attn_status, wan_attn_rope_select,                                                       \
      (const wan_attn_rope_params *, int32_t *, wan_attn_error *))                                 \
    F(wan_attn_status, wan_attn_rms_norm_rope,                                                     \
      (const wan_attn_rope_params *, int32_t *, wan_attn_error *))                                 \
    F(torch_status, aoti_torch_library_init_impl,                                                  \
      (const char *space, const char *key, const char *file, uint32_t line, torch_library *))      \
    F(torch_status, aoti_torch_library_impl, (torch_library, const char *op, torch_kernel))        \
    F(void, aoti_torch_check,                                                                      \
      (bool is_true, const char *function, const char *file, uint32_t line, const char *message))  \
    F(torch_status, aoti_torch_is_defined, (torch_tensor, bool *))                                 \
    F(torch_status, aoti_torch_get_data_ptr, (torch_tensor, void **))                              \
    F(torch_status, aoti_torch_get_dtype, (torch_tensor, int32_t *))                               \
    F(torch_status, aoti_torch_get_device_type, (torch_tensor, int32_t *))                         \
    F(torch_status, aoti_torch_get_device_index, (torch_tensor, int32_t *))                        \
    F(torch_status, aoti_torch_get_dim, (torch_tensor, int64_t *))                                 \
    F(torch_status, aoti_torch_get_sizes, (torch_tensor, int64_t **))                              \
    F(torch_status, aoti_torch_get_strides, (torch_tensor, int64_t **))                            \
    F(torch_status, aoti_torch_empty_strided,                                                      \
      (int64_t ndim, const int64_t *sizes, const int64_t *strides, int32_t dtype,                  \
       int32_t device_type, int32_t device_index, torch_tensor *))                                 \
    F(torch_status, aoti_torch_delete_tensor_object, (torch_tensor))                               \
    F(int32_t, aoti_torch_device_type_cpu, (void))                                                 \
    F(int32_t, aoti_torch_device_type_cuda, (void))                                                \
    F(int32_t, aoti_torch_dtype_float64, (void))                                                   \
    F(int32_t, aoti_torch_dtype_float32, (void))                                                   \
    F(int32_t, aoti_torch_dtype_float16, (void))                                                   \
    F(int32_t, aoti_torch_dtype_bfloat16, (void))                                                  \
    F(int32_t, aoti_torch_dtype_int32, (void))                                                     \
    F(int32_t, aoti_torch_dtype_int64, (void))                                                     \
    F(int32_t, aoti_torch_dtype_uint8, (void))                                                     \
    /* torch >= 2.10; before, a stand-in of Python's */                                            \
    F(torch_status, torch_get_num_threads, (uint32_t *))                                           \
    /* torch >= 2.13, which returns a status; before, C++'s operator delete */                     \
    F(void, torch_delete_stable_ivalue, (torch_value *))                                           \
    /* Python's: asks torch for the bytes. 0: there are none, and message has torch's words. */    \
    F(int32_t, why_no_memory,                                                                      \
      (int64_t bytes, int32_t cuda_index, char *message, size_t message_size))

#define WAN_ATTN_SHIM_OPTIONAL(F)                                                                  \
    /* torch >= 2.10, and not in a child of fork */                                                \
    F(int32_t, torch_parallel_for,                                                                 \
      (int64_t begin, int64_t end, int64_t grain, wan_attn_range_fn, void *ctx))                   \
    /* not in a torch without CUDA */                                                              \
    F(torch_status, aoti_torch_get_current_cuda_stream, (int32_t device_index, void **))

/* NOLINTNEXTLINE(bugprone-macro-parentheses): it declares, there is nothing to bind */
#define WAN_ATTN_SHIM_FIELD(result, name, parameters) result(*name) parameters;
typedef struct wan_attn_shim_functions {
    WAN_ATTN_SHIM_REQUIRED(WAN_ATTN_SHIM_FIELD)
    WAN_ATTN_SHIM_OPTIONAL(WAN_ATTN_SHIM_FIELD)
} wan_attn_shim_functions;

#endif /* WAN_ATTN_TORCH_ABI_H */
