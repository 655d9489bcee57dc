/* SPDX-License-Identifier: Apache-2.0
 * driver.c - opens the CUDA driver once, and puts its failures into words. What it keeps: the table
 * of functions, and why there is none.
 */
#include "cuda/host/driver.h"

#include <stdio.h>
#include <string.h>

#include "core/lock.h"

#if defined(_WIN32)
#include <windows.h> /* defines: LoadLibraryExA, GetProcAddress */
#define SYSTEM_DRIVER "nvcuda.dll"
#else
#include <dlfcn.h> /* defines: dlopen, dlsym, dlerror */
#define SYSTEM_DRIVER "libcuda.so.1"
#endif

enum { UNTRIED, USABLE, UNUSABLE };

static wan_attn_lock lock = WAN_ATTN_UNLOCKED;
static int state = UNTRIED;
static wan_attn_cuda_driver driver;
static char why_unusable[200];
static char configured_path[1024]; /* "": the system's */
static wan_attn_image_fn find_image;

/* A function's address as memory, so that it can be put into a field of any function type: ISO C
 * has no cast from void * to a function. */
typedef struct address {
    void *value;
} address;

#if defined(_WIN32)
static void *open_library(const char *path) {
    DWORD where = path[0] ? LOAD_LIBRARY_SEARCH_DEFAULT_DIRS | LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR
                          : LOAD_LIBRARY_SEARCH_SYSTEM32;
    void *library = (void *)LoadLibraryExA(path[0] ? path : SYSTEM_DRIVER, NULL, where);
    if (!library)
        snprintf(why_unusable, sizeof(why_unusable), "%s does not load: Windows error %lu",
                 path[0] ? path : SYSTEM_DRIVER, (unsigned long)GetLastError());
    return library;
}
static address find(void *library, const char *name) {
    address found;
    FARPROC function = GetProcAddress((HMODULE)library, name);
    memcpy(&found.value, &function, sizeof(found.value));
    return found;
}
#else
static void *open_library(const char *path) {
    void *library = dlopen(path[0] ? path : SYSTEM_DRIVER, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *words = dlerror();
        snprintf(why_unusable, sizeof(why_unusable), "%s",
                 words ? words : SYSTEM_DRIVER " does not load");
    }
    return library;
}
static address find(void *library, const char *name) {
    address found = {dlsym(library, name)};
    return found;
}
#endif

static int bind_functions(void *library) {
#define BIND(field, name, parameters)                                                              \
    {                                                                                              \
        address found = find(library, name);                                                       \
        if (!found.value) {                                                                        \
            snprintf(why_unusable, sizeof(why_unusable), "the driver has no %s: it is too old",    \
                     name);                                                                        \
            return 0;                                                                              \
        }                                                                                          \
        memcpy(&driver.field, &found.value, sizeof(found.value));                                  \
    }
    WAN_ATTN_CUDA_DRIVER_FUNCTIONS(BIND)
#undef BIND
    address encode_map = find(library, "cuTensorMapEncodeTiled");
    memcpy(&driver.encode_map, &encode_map.value, sizeof(encode_map.value));
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

static int open_and_init(void) {
    void *library = open_library(configured_path);
    if (!library || !bind_functions(library))
        return 0;
    wan_attn_cu_result error = driver.init(0);
    if (error != 0) {
        const char *name, *text = wan_attn_cuda_words(&driver, error, &name);
        snprintf(why_unusable, sizeof(why_unusable), "the driver does not start: %s (%s)", name,
                 text);
    }
    return error == 0;
}

const wan_attn_cuda_driver *wan_attn_cuda_open_driver(char *reason, size_t size) {
    wan_attn_acquire(&lock);
    if (state == UNTRIED)
        state = open_and_init() ? USABLE : UNUSABLE;
    int is_usable = state == USABLE;
    wan_attn_release(&lock);
    if (!is_usable) /* written before `state` and never again */
        snprintf(reason, size, "there is no usable NVIDIA driver: %s", why_unusable);
    return is_usable ? &driver : NULL;
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
    }
    wan_attn_release(&lock);
    if (is_late)
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT,
                             "config.driver must be set before the driver is opened, got %s", path);
    return wan_attn_ok(err);
}
