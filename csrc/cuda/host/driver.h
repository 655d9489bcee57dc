/* SPDX-License-Identifier: Apache-2.0
 * driver.h - the CUDA driver API as far as it is used here, bound when it is first needed: this
 * library links nothing of CUDA, loads on machines without a driver, and works beside any torch.
 * All of them are in drivers of CUDA 12.0 (525) and newer.
 * Facts about its functions: NVIDIA, "CUDA Driver API" reference. Knows no kernel.
 */
#ifndef WAN_ATTN_CUDA_HOST_DRIVER_H
#define WAN_ATTN_CUDA_HOST_DRIVER_H

#include "core/kernel.h"

/* Windows on x64 has one calling convention, so that CUDAAPI is nothing. */
typedef int wan_attn_cu_result; /* CUresult; 0 is success */
typedef int wan_attn_cu_device; /* CUdevice */
typedef void *wan_attn_cu_context, *wan_attn_cu_library, *wan_attn_cu_kernel, *wan_attn_cu_stream;

/* Numbers of cuda.h. */
enum {
    WAN_ATTN_CU_ATTRIBUTE_NUM_SMS = 16,
    WAN_ATTN_CU_ATTRIBUTE_CAPABILITY_MAJOR = 75,
    WAN_ATTN_CU_ATTRIBUTE_CAPABILITY_MINOR = 76,
    WAN_ATTN_CU_KERNEL_MAX_DYNAMIC_SMEM = 8,
    WAN_ATTN_CU_KERNEL_SMEM_CARVEOUT = 9,
    WAN_ATTN_CU_CAPTURE_MODE_RELAXED = 2,
    WAN_ATTN_CU_MAP_F16 = 6, /* CUtensorMapDataType */
    WAN_ATTN_CU_MAP_BF16 = 9,
    WAN_ATTN_CU_MAP_SWIZZLE_128B = 3,
    WAN_ATTN_CU_MAP_L2_256B = 3
};

/* X(field, exported name, parameters): one line for each function. */
#define WAN_ATTN_CUDA_DRIVER_FUNCTIONS(X)                                                          \
    X(init, "cuInit", (unsigned flags))                                                            \
    X(driver_version, "cuDriverGetVersion", (int *version))                                        \
    X(device_count, "cuDeviceGetCount", (int *count))                                              \
    X(device_get, "cuDeviceGet", (wan_attn_cu_device * device, int ordinal))                       \
    X(device_name, "cuDeviceGetName", (char *name, int size, wan_attn_cu_device device))           \
    X(device_attribute, "cuDeviceGetAttribute",                                                    \
      (int *value, int attribute, wan_attn_cu_device device))                                      \
    X(context_retain, "cuDevicePrimaryCtxRetain",                                                  \
      (wan_attn_cu_context * context, wan_attn_cu_device device))                                  \
    X(context_push, "cuCtxPushCurrent_v2", (wan_attn_cu_context context))                          \
    X(context_pop, "cuCtxPopCurrent_v2", (wan_attn_cu_context * context))                          \
    X(context_current, "cuCtxGetCurrent", (wan_attn_cu_context * context))                         \
    X(context_device, "cuCtxGetDevice", (wan_attn_cu_device * device))                             \
    X(capture_mode, "cuThreadExchangeStreamCaptureMode", (int *mode))                              \
    X(library_load, "cuLibraryLoadData",                                                           \
      (wan_attn_cu_library * library, const void *image, const int *jit_options,                   \
       void **jit_values, unsigned jit_count, const int *options, void **values, unsigned count))  \
    X(library_unload, "cuLibraryUnload", (wan_attn_cu_library library))                            \
    X(library_kernel, "cuLibraryGetKernel",                                                        \
      (wan_attn_cu_kernel * kernel, wan_attn_cu_library library, const char *name))                \
    X(kernel_set, "cuKernelSetAttribute",                                                          \
      (int attribute, int value, wan_attn_cu_kernel kernel, wan_attn_cu_device device))            \
    X(kernel_function, "cuKernelGetFunction", (void **function, wan_attn_cu_kernel kernel))        \
    X(encode_map, "cuTensorMapEncodeTiled",                                                        \
      (void *map, int dtype, uint32_t rank, void *address, const uint64_t *size,                   \
       const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,              \
       int interleave, int swizzle, int l2_promotion, int fill))                                   \
    X(launch, "cuLaunchKernel",                                                                    \
      (wan_attn_cu_kernel kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,               \
       unsigned block_x, unsigned block_y, unsigned block_z, unsigned smem,                        \
       wan_attn_cu_stream stream, void **params, void **extra))                                    \
    X(error_name, "cuGetErrorName", (wan_attn_cu_result error, const char **name))                 \
    X(error_string, "cuGetErrorString", (wan_attn_cu_result error, const char **text))

typedef struct wan_attn_cuda_driver {
/* NOLINTNEXTLINE(bugprone-macro-parentheses): it declares, there is nothing to bind */
#define FIELD(field, name, parameters) wan_attn_cu_result(*field) parameters;
    WAN_ATTN_CUDA_DRIVER_FUNCTIONS(FIELD)
#undef FIELD
} wan_attn_cuda_driver;

/* The driver, opened and initialised at the first call; or NULL, and why it cannot be used. A start
 * that fails for want of memory or the like is tried again by some of the calls that follow, ever
 * fewer. */
const wan_attn_cuda_driver *wan_attn_cuda_open_driver(char *reason, size_t size);

/* The driver's own words for an error, and its name. */
const char *wan_attn_cuda_words(const wan_attn_cuda_driver *driver, wan_attn_cu_result error,
                                const char **name);

/* Whether the error says that the device, its context or its memory is in trouble: nothing else
 * would run there either, or it would hide the cause. */
int wan_attn_cuda_is_trouble(wan_attn_cu_result error);

/* UNSUPPORTED, where the error says that this kernel cannot be used here and nothing against the
 * device: something else may run the call. Otherwise as the next one. */
wan_attn_status wan_attn_cuda_kernel_failed(const wan_attn_cuda_driver *driver,
                                            wan_attn_cu_result error, const char *doing,
                                            const char *kernel, wan_attn_error *err);

/* DEVICE_ERROR: what was being done, and the driver's own words. */
wan_attn_status wan_attn_cuda_fail(const wan_attn_cuda_driver *driver, wan_attn_cu_result error,
                                   const char *doing, const char *what, wan_attn_error *err);

/* The configured source of machine code, or NULL. */
wan_attn_image_fn wan_attn_cuda_find_image(void);

#endif /* WAN_ATTN_CUDA_HOST_DRIVER_H */
