/* SPDX-License-Identifier: Apache-2.0
 * driver.c - a stand-in for the CUDA driver library, for tests on machines without one. Devices,
 * names and failures are what the test says; each call is a line of the log; a launch goes to the
 * test's own function, which may run it on the emulated GPU (tests/emu).
 *
 * Strict where the real one is undefined or lazy: no context, an unbalanced pop, a library that was
 * unloaded or a kernel that was not brought to the device before its launch is an error here.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { MAX_DEVICES = 4, MAX_DEPTH = 8, MAX_KERNELS = 256, LOG_BYTES = 1 << 16 };
enum { INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201 };
enum { INVALID_HANDLE = 400, NOT_FOUND = 500 };
enum { PRIMARY = 0x1000, GREEN = 0x2000, ORDINAL = 0xff }; /* contexts: these plus a device */
enum { MAX_DYNAMIC_SMEM = 8, SMEM_CARVEOUT = 9 };

typedef int32_t (*launch_fn)(const char *name, const void *args, const unsigned *grid_block_smem,
                             const void *stream);

typedef struct device {
    int major, minor, sms;
    char name[64];
} device;

typedef struct library {
    char image[64]; /* what the test's machine code says after "ELF" */
    int is_loaded;
} library;

typedef struct kernel {
    char name[64];
    library *from;
    int is_there[MAX_DEVICES], max_smem[MAX_DEVICES], carveout[MAX_DEVICES];
} kernel;

static device devices[MAX_DEVICES];
static int device_count;
static library libraries[MAX_KERNELS];
static kernel kernels[MAX_KERNELS];
static int library_count, kernel_count;
static _Thread_local int contexts[MAX_DEPTH], depth;
static _Thread_local int capture_mode; /* 0: global, as every thread begins */
static char failing[64];               /* the function whose next calls fail */
static int failing_error, failing_after;
static launch_fn on_launch;
static char log_text[LOG_BYTES];
static size_t log_used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void say(const char *format, ...) {
    va_list args;
    va_start(args, format);
    pthread_mutex_lock(&lock);
    int n = vsnprintf(log_text + log_used, LOG_BYTES - log_used, format, args);
    va_end(args);
    if (n > 0 && log_used + (size_t)n < LOG_BYTES)
        log_used += (size_t)n;
    pthread_mutex_unlock(&lock);
}

/* What the test calls. */
void mock_add_device(int major, int minor, int sms, const char *name) {
    device *d = &devices[device_count++];
    d->major = major, d->minor = minor, d->sms = sms;
    snprintf(d->name, sizeof(d->name), "%s", name);
}
void mock_fail(const char *name, int error, int after) {
    snprintf(failing, sizeof(failing), "%s", name);
    failing_error = error, failing_after = after;
}
void mock_on_launch(launch_fn fn) { on_launch = fn; }
int mock_depth(void) { return depth; }
/* This thread's context becomes a green one of the device, as torch makes it. */
void mock_enter_green(int number) { contexts[depth++] = GREEN + number; }
void mock_leave(void) { depth--; }
const char *mock_log(void) { return log_text; }
void mock_clear_log(void) { log_used = 0, log_text[0] = 0; }

static int fails(const char *name) {
    pthread_mutex_lock(&lock);
    int error = strcmp(name, failing) == 0 && failing_after-- <= 0 ? failing_error : 0;
    pthread_mutex_unlock(&lock);
    if (error)
        say("%s fails with %d\n", name, error);
    return error;
}
#define FAIL_IF_ASKED(name)                                                                        \
    do {                                                                                           \
        int its_error = fails(name);                                                               \
        if (its_error)                                                                             \
            return its_error;                                                                      \
    } while (0)

int cuInit(unsigned flags) {
    FAIL_IF_ASKED("cuInit");
    say("cuInit\n");
    return flags ? INVALID_VALUE : 0;
}

int cuDriverGetVersion(int *version) {
    *version = 12080;
    return fails("cuDriverGetVersion");
}

int cuDeviceGetCount(int *count) {
    *count = device_count;
    return fails("cuDeviceGetCount");
}

int cuDeviceGet(int *handle, int ordinal) {
    if (ordinal < 0 || ordinal >= device_count)
        return INVALID_DEVICE;
    *handle = 100 + ordinal; /* not the ordinal: handles are the driver's own business */
    return fails("cuDeviceGet");
}

int cuDeviceGetName(char *name, int size, int handle) {
    snprintf(name, (size_t)size, "%s", devices[handle - 100].name);
    return fails("cuDeviceGetName");
}

int cuDeviceGetAttribute(int *value, int attribute, int handle) {
    const device *d = &devices[handle - 100];
    *value = attribute == 75 ? d->major : attribute == 76 ? d->minor : attribute == 16 ? d->sms : 0;
    return fails("cuDeviceGetAttribute");
}

int cuDevicePrimaryCtxRetain(void **context, int handle) {
    FAIL_IF_ASKED("cuDevicePrimaryCtxRetain");
    say("retain %d\n", handle - 100);
    *context = (void *)(uintptr_t)(PRIMARY + handle - 100);
    return 0;
}

int cuCtxPushCurrent_v2(void *context) {
    FAIL_IF_ASKED("cuCtxPushCurrent_v2");
    if (depth == MAX_DEPTH)
        return INVALID_CONTEXT;
    contexts[depth++] = (int)(uintptr_t)context;
    return 0;
}

int cuCtxPopCurrent_v2(void **context) {
    if (depth == 0)
        return INVALID_CONTEXT;
    *context = (void *)(uintptr_t)contexts[--depth];
    return fails("cuCtxPopCurrent_v2");
}

int cuCtxGetCurrent(void **context) {
    FAIL_IF_ASKED("cuCtxGetCurrent");
    *context = depth ? (void *)(uintptr_t)contexts[depth - 1] : NULL;
    return 0;
}

int cuCtxGetDevice(int *handle) {
    FAIL_IF_ASKED("cuCtxGetDevice");
    if (depth == 0)
        return INVALID_CONTEXT;
    *handle = 100 + (contexts[depth - 1] & ORDINAL);
    return 0;
}

int cuThreadExchangeStreamCaptureMode(int *mode) {
    FAIL_IF_ASKED("cuThreadExchangeStreamCaptureMode");
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return 0;
}

int cuLibraryLoadData(library **made, const char *image, const int *jit_options, void **jit_values,
                      unsigned jit_count, const int *options, void **values, unsigned count) {
    FAIL_IF_ASKED("cuLibraryLoadData");
    if (jit_options || jit_values || jit_count || options || values || count)
        return INVALID_VALUE;
    if (memcmp(image, "\177ELF", 4) != 0)
        return INVALID_IMAGE;
    pthread_mutex_lock(&lock);
    library *l = library_count < MAX_KERNELS ? &libraries[library_count++] : NULL;
    pthread_mutex_unlock(&lock);
    if (!l)
        return NOT_FOUND;
    say("load, capture mode %d\n", capture_mode);
    snprintf(l->image, sizeof(l->image), "%s", image + 4);
    l->is_loaded = 1;
    *made = l;
    return 0;
}

int cuLibraryUnload(library *l) {
    FAIL_IF_ASKED("cuLibraryUnload");
    if (!l->is_loaded)
        return INVALID_HANDLE;
    l->is_loaded = 0;
    say("unload\n");
    return 0;
}

int cuLibraryGetKernel(kernel **made, library *from, const char *name) {
    FAIL_IF_ASKED("cuLibraryGetKernel");
    pthread_mutex_lock(&lock);
    kernel *k = kernel_count < MAX_KERNELS ? &kernels[kernel_count++] : NULL;
    pthread_mutex_unlock(&lock);
    if (!from->is_loaded || !k)
        return NOT_FOUND;
    snprintf(k->name, sizeof(k->name), "%s", name);
    k->from = from;
    for (int n = 0; n < MAX_DEVICES; n++)
        k->max_smem[n] = 48 * 1024;
    *made = k;
    return 0;
}

int cuKernelSetAttribute(int attribute, int value, kernel *k, int handle) {
    FAIL_IF_ASKED("cuKernelSetAttribute");
    if (attribute == SMEM_CARVEOUT)
        k->carveout[handle - 100] = value;
    else if (attribute == MAX_DYNAMIC_SMEM)
        k->max_smem[handle - 100] = value;
    else
        return INVALID_VALUE;
    return 0;
}

int cuKernelGetFunction(void **function, kernel *k) {
    FAIL_IF_ASKED("cuKernelGetFunction");
    if (depth == 0)
        return INVALID_CONTEXT;
    int number = contexts[depth - 1] & ORDINAL;
    say("to device %d, capture mode %d\n", number, capture_mode);
    k->is_there[number] = 1;
    *function = NULL; /* nobody may launch it: it would belong to this context */
    return 0;
}

int cuLaunchKernel(kernel *k, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned smem, void *stream, void **params,
                   void **extra) {
    FAIL_IF_ASKED("cuLaunchKernel");
    if (depth == 0)
        return INVALID_CONTEXT;
    int number = contexts[depth - 1] & ORDINAL;
    if (!k->from->is_loaded || !k->is_there[number])
        return INVALID_HANDLE;
    if (!grid_x || grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || extra ||
        (int)smem > k->max_smem[number])
        return INVALID_VALUE;
    say("launch %s on %s%d, stream %p, grid %u, block %u, smem %u of %d%%\n", k->name,
        contexts[depth - 1] & GREEN ? "green " : "", number, stream, grid_x, block_x, smem,
        k->carveout[number]);
    const unsigned numbers[3] = {grid_x, block_x, smem};
    return on_launch ? on_launch(k->from->image, params[0], numbers, stream) : 0;
}

/* A map is opaque to all but the hardware; this one is what it was made from. */
typedef struct tensor_map {
    uint64_t address, strides[3];
    uint32_t size[4], box[4];
    int dtype, swizzle;
} tensor_map;

int cuTensorMapEncodeTiled(tensor_map *map, int dtype, uint32_t rank, void *address,
                           const uint64_t *size, const uint64_t *strides, const uint32_t *box,
                           const uint32_t *element_strides, int interleave, int swizzle,
                           int l2_promotion, int fill) {
    FAIL_IF_ASKED("cuTensorMapEncodeTiled");
    if ((uintptr_t)map % 64 || (uintptr_t)address % 16 || rank != 4 || interleave || fill ||
        l2_promotion < 0 || l2_promotion > 3)
        return INVALID_VALUE;
    map->address = (uintptr_t)address;
    map->dtype = dtype, map->swizzle = swizzle;
    for (int n = 0; n < 4; n++) {
        if (size[n] == 0 || size[n] > UINT32_MAX || !box[n] || box[n] > 256 ||
            element_strides[n] != 1)
            return INVALID_VALUE;
        map->size[n] = (uint32_t)size[n], map->box[n] = box[n];
    }
    for (int n = 0; n < 3; n++) {
        if (strides[n] == 0 || strides[n] % 16 || strides[n] >> 40)
            return INVALID_VALUE;
        map->strides[n] = strides[n];
    }
    /* The manual asks it of all dimensions; of rows no map that is known to work breaks it. */
    return strides[0] < 2 * size[0] ? INVALID_VALUE : 0;
}

/* X(code, name, text): as the real driver says them, for what tests have it answer. */
#define ERRORS(X)                                                                                  \
    X(1, "INVALID_VALUE", "invalid argument")                                                      \
    X(2, "OUT_OF_MEMORY", "out of memory")                                                         \
    X(3, "NOT_INITIALIZED", "initialization error")                                                \
    X(4, "DEINITIALIZED", "driver shutting down")                                                  \
    X(100, "NO_DEVICE", "no CUDA-capable device is detected")                                      \
    X(101, "INVALID_DEVICE", "invalid device ordinal")                                             \
    X(200, "INVALID_IMAGE", "device kernel image is invalid")                                      \
    X(201, "INVALID_CONTEXT", "invalid device context")                                            \
    X(209, "NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device")        \
    X(214, "ECC_UNCORRECTABLE", "uncorrectable ECC error encountered")                             \
    X(218, "INVALID_PTX", "a PTX JIT compilation failed")                                          \
    X(222, "UNSUPPORTED_PTX_VERSION",                                                              \
      "the provided PTX was compiled with an unsupported toolchain.")                              \
    X(304, "OPERATING_SYSTEM", "OS call failed or operation not supported on this OS")             \
    X(400, "INVALID_HANDLE", "invalid resource handle")                                            \
    X(500, "NOT_FOUND", "named symbol not found")                                                  \
    X(700, "ILLEGAL_ADDRESS", "an illegal memory access was encountered")                          \
    X(701, "LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch")                   \
    X(702, "LAUNCH_TIMEOUT", "the launch timed out and was terminated")                            \
    X(709, "CONTEXT_IS_DESTROYED", "context is destroyed")                                         \
    X(710, "ASSERT", "device-side assert triggered")                                               \
    X(716, "MISALIGNED_ADDRESS", "misaligned address")                                             \
    X(719, "LAUNCH_FAILED", "unspecified launch failure")                                          \
    X(800, "NOT_PERMITTED", "operation not permitted")                                             \
    X(801, "NOT_SUPPORTED", "operation not supported")                                             \
    X(802, "SYSTEM_NOT_READY", "system not yet initialized")                                       \
    X(803, "SYSTEM_DRIVER_MISMATCH",                                                               \
      "system has unsupported display driver / cuda driver combination")                           \
    X(900, "STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing")       \
    X(999, "UNKNOWN", "unknown error")

int cuGetErrorName(int error, const char **name) {
    FAIL_IF_ASKED("cuGetErrorName");
#define NAME(code, of, text)                                                                       \
    if (error == (code))                                                                           \
        return *name = "CUDA_ERROR_" of, 0;
    ERRORS(NAME)
    return INVALID_VALUE;
}

int cuGetErrorString(int error, const char **text) {
    FAIL_IF_ASKED("cuGetErrorString");
#define TEXT(code, name, of)                                                                       \
    if (error == (code))                                                                           \
        return *text = (of), 0;
    ERRORS(TEXT)
    return INVALID_VALUE;
}
