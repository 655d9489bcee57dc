/* SPDX-License-Identifier: Apache-2.0
 * driver.c - opens the CUDA driver once, and puts its failures into words. What it keeps: the table
 * of functions, and why there is none.
 */
#include "cuda/host/driver.h"

#include <stdio.h>
#include <string.h>

#include "core/platform.h"
#include "cuda/host/proof.h"

enum { UNTRIED, NOT_STARTED, USABLE, UNUSABLE };
enum { MOST_WAITS = 1023 };

/* Numbers of cuda.h: what the driver may answer. */
enum {
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3, /* to a child of fork, whose parent has used the driver */
    DEINITIALIZED = 4,
    STUB_LIBRARY = 34,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    NO_BINARY_FOR_GPU = 209,
    ECC_UNCORRECTABLE = 214,
    INVALID_PTX = 218,
    NVLINK_UNCORRECTABLE = 220,
    UNSUPPORTED_PTX_VERSION = 222,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_TIMEOUT = 702,
    CONTEXT_IS_DESTROYED = 709,
    ASSERT = 710,
    HARDWARE_STACK_ERROR = 714, /* and the next ones: instructions and addresses */
    LAUNCH_FAILED = 719,
    NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801,
    SYSTEM_DRIVER_MISMATCH = 803,
    COMPAT_NOT_SUPPORTED_ON_DEVICE = 804
};

static wan_attn_lock lock = WAN_ATTN_UNLOCKED;
static int state = UNTRIED;
static wan_attn_cuda_driver driver;
static char why_unusable[200];
static int failed_starts, waits;   /* waits: questions to go before the next start */
static char configured_path[1024]; /* "": the system's */
static wan_attn_image_fn find_image;
static wan_attn_proof_fn find_proof;

static int bind_functions(void *library) {
#define BIND(field, name, parameters)                                                              \
    {                                                                                              \
        wan_attn_address found = wan_attn_find_function(library, name);                            \
        if (!found.value) {                                                                        \
            snprintf(why_unusable, sizeof(why_unusable),                                           \
                     "the driver has no %s: it is older than CUDA 12.0", name);                    \
            return 0;                                                                              \
        }                                                                                          \
        memcpy(&driver.field, &found.value, sizeof(found.value));                                  \
    }
    WAN_ATTN_CUDA_DRIVER_FUNCTIONS(BIND)
#undef BIND
    return 1;
}

const char *wan_attn_cuda_words(const wan_attn_cuda_driver *d, wan_attn_cu_result error,
                                const char **name) {
    const char *text = NULL;
    *name = NULL;
    if (d->error_name(error, name) != 0 || !*name)
        *name = "an unknown error";
    return d->error_string(error, &text) == 0 && text ? text : "no description";
}

/* Whether a start that failed so fails as long as the process lives. */
static int is_final(wan_attn_cu_result error) {
    switch (error) {
    case INVALID_VALUE:
    case NOT_INITIALIZED:
    case DEINITIALIZED:
    case STUB_LIBRARY:
    case NO_DEVICE:
    case INVALID_DEVICE:
    case SYSTEM_DRIVER_MISMATCH:
    case COMPAT_NOT_SUPPORTED_ON_DEVICE: return 1;
    default: return 0;
    }
}

static int start(void) {
    wan_attn_cu_result error = driver.init(0);
    if (error == 0)
        return USABLE;
    const char *name, *text = wan_attn_cuda_words(&driver, error, &name);
    snprintf(why_unusable, sizeof(why_unusable), "the driver does not start: %s (%s)", name, text);
    failed_starts++;
    waits = failed_starts < 10 ? (1 << failed_starts) - 1 : MOST_WAITS;
    return is_final(error) ? UNUSABLE : NOT_STARTED;
}

const wan_attn_cuda_driver *wan_attn_cuda_open_driver(char *reason, size_t size) {
    wan_attn_acquire(&lock);
    if (state == UNTRIED) {
        void *library = wan_attn_open_library(configured_path, WAN_ATTN_CUDA_LIBRARY, why_unusable,
                                              sizeof(why_unusable));
        state = library && bind_functions(library) ? start() : UNUSABLE;
    } else if (state == NOT_STARTED && waits-- <= 0) {
        state = start();
    }
    int is_usable = state == USABLE;
    if (!is_usable)
        snprintf(reason, size, "there is no usable NVIDIA driver: %s", why_unusable);
    wan_attn_release(&lock);
    return is_usable ? &driver : NULL;
}

int wan_attn_cuda_is_trouble(wan_attn_cu_result error) {
    return error == OUT_OF_MEMORY || error == ECC_UNCORRECTABLE || error == NVLINK_UNCORRECTABLE ||
           error == ILLEGAL_ADDRESS || error == LAUNCH_TIMEOUT || error == CONTEXT_IS_DESTROYED ||
           error == ASSERT || (error >= HARDWARE_STACK_ERROR && error <= LAUNCH_FAILED);
}

/* Whether this kernel cannot be used, with so much shared memory or at all. */
static int is_about_the_kernel(wan_attn_cu_result error) {
    switch (error) {
    case INVALID_VALUE:
    case INVALID_IMAGE:
    case NO_BINARY_FOR_GPU:
    case INVALID_PTX:
    case UNSUPPORTED_PTX_VERSION:
    case NOT_FOUND:
    case LAUNCH_OUT_OF_RESOURCES:
    case NOT_PERMITTED:
    case NOT_SUPPORTED: return 1;
    default: return 0;
    }
}

wan_attn_status wan_attn_cuda_kernel_failed(const wan_attn_cuda_driver *d, wan_attn_cu_result error,
                                            const char *doing, const char *kernel,
                                            wan_attn_error *err) {
    if (!is_about_the_kernel(error))
        return wan_attn_cuda_fail(d, error, doing, kernel, err);
    const char *name, *text = wan_attn_cuda_words(d, error, &name);
    return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                         "the machine code of %s is not for this device or driver: %s (%s) %s it",
                         kernel, name, text, doing);
}

wan_attn_status wan_attn_cuda_fail(const wan_attn_cuda_driver *d, wan_attn_cu_result error,
                                   const char *doing, const char *what, wan_attn_error *err) {
    const char *name, *text = wan_attn_cuda_words(d, error, &name);
    return wan_attn_fail(err, WAN_ATTN_DEVICE_ERROR, "CUDA driver error %s (%s) %s %s", name, text,
                         doing, what);
}

wan_attn_image_fn wan_attn_cuda_find_image(void) {
    wan_attn_acquire(&lock);
    wan_attn_image_fn found = find_image;
    wan_attn_release(&lock);
    return found;
}

wan_attn_proof_fn wan_attn_cuda_find_proof(void) {
    wan_attn_acquire(&lock);
    wan_attn_proof_fn found = find_proof;
    wan_attn_release(&lock);
    return found;
}

wan_attn_status wan_attn_cuda_configure(const wan_attn_cuda_config *config, wan_attn_error *err) {
    if (!config || config->struct_size != sizeof(*config))
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT,
                             "config.struct_size must be %zu (this library's), got %u",
                             sizeof(*config), config ? (unsigned)config->struct_size : 0u);
    const char *path = config->driver ? config->driver : "";
    if (strlen(path) >= sizeof(configured_path))
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT,
                             "config.driver must be shorter than %zu bytes, got %zu",
                             sizeof(configured_path), strlen(path));
    wan_attn_acquire(&lock);
    int is_late = state != UNTRIED && strcmp(path, configured_path) != 0;
    if (!is_late) {
        snprintf(configured_path, sizeof(configured_path), "%s", path);
        find_image = config->find_image;
        find_proof = config->find_proof;
    }
    wan_attn_release(&lock);
    if (!is_late)
        wan_attn_cuda_forget_proofs();
    if (is_late)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT,
                             "config.driver must be set before the driver is opened, got %s", path);
    return wan_attn_ok(err);
}
