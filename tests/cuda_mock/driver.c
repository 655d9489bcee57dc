/* SPDX-License-Identifier: Apache-2.0
 * driver.c - a stand-in for the CUDA driver library, for tests on machines without one. Devices,
 * names and failures are what the test says; each call is a line of the log; a launch goes to the
 * test's own function, which may run it on the emulated GPU (tests/emu).
 *
 * Strict where the real one is undefined: no context, a context of another device, an unbalanced
 * pop or a function of another context is an error here.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { MAX_DEVICES = 4, MAX_DEPTH = 8, MAX_FUNCTIONS = 256, LOG_BYTES = 1 << 16 };
enum { INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201 };
enum { NOT_FOUND = 500, MODULE_BASE = 0x70000 };

typedef int32_t (*launch_fn)(const char *name, const void *args, const unsigned *grid_block_smem,
                             const void *stream);

typedef struct device {
    int major, minor, sms;
    char name[64];
} device;

typedef struct function {
    char name[64], image[64]; /* image: what the test's machine code says after "ELF" */
    int device, max_smem;
} function;

static device devices[MAX_DEVICES];
static int device_count;
static function functions[MAX_FUNCTIONS];
static char modules[MAX_FUNCTIONS][64];
static int function_count, module_count;
static _Thread_local int contexts[MAX_DEPTH], depth; /* device numbers */
static _Thread_local int capture_mode;               /* 0: global, as every thread begins */
static char failing[64];                             /* the function whose next calls fail */
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
        int error = fails(name);                                                                   \
        if (error)                                                                                 \
            return error;                                                                          \
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
    *context = (void *)(uintptr_t)(0x1000 + handle - 100);
    return 0;
}

int cuCtxPushCurrent_v2(void *context) {
    FAIL_IF_ASKED("cuCtxPushCurrent_v2");
    if (depth == MAX_DEPTH)
        return INVALID_CONTEXT;
    contexts[depth++] = (int)((uintptr_t)context - 0x1000);
    return 0;
}

int cuCtxPopCurrent_v2(void **context) {
    if (depth == 0)
        return INVALID_CONTEXT;
    *context = (void *)(uintptr_t)(0x1000 + contexts[--depth]);
    return fails("cuCtxPopCurrent_v2");
}

int cuThreadExchangeStreamCaptureMode(int *mode) {
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return 0;
}

int cuModuleLoadData(void **module, const char *image) {
    FAIL_IF_ASKED("cuModuleLoadData");
    if (depth == 0)
        return INVALID_CONTEXT;
    if (memcmp(image, "\177ELF", 4) != 0)
        return INVALID_IMAGE;
    say("load on %d, capture mode %d\n", contexts[depth - 1], capture_mode);
    pthread_mutex_lock(&lock);
    int number = module_count < MAX_FUNCTIONS ? module_count++ : -1;
    pthread_mutex_unlock(&lock);
    if (number < 0)
        return NOT_FOUND;
    snprintf(modules[number], sizeof(modules[number]), "%s", image + 4);
    *module = (void *)(uintptr_t)(MODULE_BASE + number);
    return 0;
}

int cuModuleGetFunction(void **made, void *module, const char *name) {
    FAIL_IF_ASKED("cuModuleGetFunction");
    pthread_mutex_lock(&lock);
    function *f = function_count < MAX_FUNCTIONS ? &functions[function_count++] : NULL;
    pthread_mutex_unlock(&lock);
    if ((uintptr_t)module < MODULE_BASE || !f)
        return NOT_FOUND;
    snprintf(f->name, sizeof(f->name), "%s", name);
    snprintf(f->image, sizeof(f->image), "%s", modules[(uintptr_t)module - MODULE_BASE]);
    f->device = contexts[depth - 1];
    f->max_smem = 48 * 1024;
    *made = f;
    return 0;
}

int cuFuncSetAttribute(void *handle, int attribute, int value) {
    FAIL_IF_ASKED("cuFuncSetAttribute");
    if (attribute != 8)
        return INVALID_VALUE;
    ((function *)handle)->max_smem = value;
    return 0;
}

int cuLaunchKernel(void *handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned smem,
                   void *stream, void **params, void **extra) {
    FAIL_IF_ASKED("cuLaunchKernel");
    const function *f = handle;
    if (depth == 0 || contexts[depth - 1] != f->device)
        return INVALID_CONTEXT;
    if (!grid_x || grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || extra ||
        (int)smem > f->max_smem)
        return INVALID_VALUE;
    say("launch %s on %d, stream %p, grid %u, block %u, smem %u\n", f->name, f->device, stream,
        grid_x, block_x, smem);
    const unsigned numbers[3] = {grid_x, block_x, smem};
    return on_launch ? on_launch(f->image, params[0], numbers, stream) : 0;
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
    return 0;
}

int cuGetErrorName(int error, const char **name) {
    *name = error == 2     ? "CUDA_ERROR_OUT_OF_MEMORY"
            : error == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
            : error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                           : "CUDA_ERROR_MOCK";
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == 700 ? "an illegal memory access was encountered" : "mock";
    return 0;
}
