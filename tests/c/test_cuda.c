/* SPDX-License-Identifier: Apache-2.0
 * test_cuda.c - the CUDA half of the C ABI without Python or a GPU, for the sanitizers: the mock
 * driver of tests/cuda_mock takes the launches and runs nothing. Random calls, failures of the
 * driver, many threads from the first call on.
 *
 *     test_cuda MOCK_DRIVER [calls]    prints one line; 1 and the failing call if anything is wrong
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "system.h"
#include "wan_attn.h"

#define FAIL(...)                                                                                  \
    do {                                                                                           \
        fprintf(stderr, __VA_ARGS__);                                                              \
        fprintf(stderr, "\n");                                                                     \
        return 1;                                                                                  \
    } while (0)

enum { THREADS = 8, CALLS_OF_A_THREAD = 200, ARCHS = 4 };

static const char IMAGE[] = "\177ELF";
static void (*mock_fail)(const char *name, int error, int after);
static int (*mock_depth)(void);
static void (*mock_clear_log)(void);

static int32_t find_image(const char *kernel, int32_t arch, const void **image, size_t *size,
                          char *message, size_t message_size) {
    if (arch == 0 || !kernel[0]) {
        snprintf(message, message_size, "no kernel was asked for");
        return 1;
    }
    *image = IMAGE;
    *size = sizeof(IMAGE);
    return 0;
}

/* One random number after the other; a thread has its own. */
static int64_t pick(uint64_t *state, int64_t below) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (int64_t)(*state % (uint64_t)below);
}

static wan_attn_tensor tensor(uint64_t *random, int32_t dtype, int32_t device, int64_t batch,
                              int64_t seqlen, int64_t heads, int64_t head_dim) {
    wan_attn_tensor t = {NULL, dtype, WAN_ATTN_CUDA, device, 4, {batch, seqlen, heads, head_dim},
                         {0}};
    int64_t gap = pick(random, 3) == 0 ? 1 + pick(random, 9) : 0; /* odd ones are not aligned */
    /* Never read here: an address that looks like one, sometimes between two of its elements. */
    t.data = (void *)(uintptr_t)(0x7f0000000000 + (pick(random, 4)         ? 0
                                                   : dtype == WAN_ATTN_F32 ? 4
                                                                           : 2));
    t.stride[3] = 1;
    t.stride[2] = head_dim + gap;
    t.stride[1] = heads * t.stride[2] + gap;
    t.stride[0] = seqlen * t.stride[1];
    return t;
}

/* The same tensor, dense, somewhere else. */
static wan_attn_tensor dense(wan_attn_tensor like, uintptr_t at) {
    like.data = (void *)at;
    like.stride[2] = like.shape[3];
    like.stride[1] = like.shape[2] * like.stride[2];
    like.stride[0] = like.shape[1] * like.stride[1];
    return like;
}

/* The gradients of a call that has run. */
static int run_gradients(uint64_t *random, wan_attn_params *p, wan_attn_error *err) {
    wan_attn_backward_params a = {.struct_size = sizeof(a), .kernel = -1, .forward = p};
    size_t size = 0;
    wan_attn_tensor lse = {(void *)(uintptr_t)0x790000000000,
                           WAN_ATTN_F32,
                           WAN_ATTN_CUDA,
                           p->q.device_index,
                           3,
                           {p->q.shape[0], p->q.shape[2], p->q.shape[1]},
                           {p->q.shape[1] * p->q.shape[2], p->q.shape[1], 1}};
    p->lse = lse;
    a.dout = dense(p->out, 0x780000000000);
    if (pick(random, 2))
        a.dout = p->q; /* any strides */
    if (pick(random, 2))
        a.dlse = lse, a.dlse.data = (void *)(uintptr_t)0x770000000000;
    a.dq = dense(p->q, 0x7c0000000000);
    a.dk = dense(p->k, 0x7b0000000000);
    a.dv = dense(p->v, 0x7a0000000000);
    wan_attn_status status = wan_attn_backward_select(&a, NULL, &size, err);
    if (status != WAN_ATTN_OK)
        return (int)status;
    p->workspace_size = size;
    return (int)wan_attn_backward(&a, NULL, err);
}

/* Blocks of keys may be left out, and a guard wants to know, as well one without lost_mass. */
static void leave_out(uint64_t *random, wan_attn_params *p) {
    p->skip_threshold = 0.05;
    if (pick(random, 3) == 0)
        return;
    p->guard = (void *)(uintptr_t)0x760000000000;
    p->guard_size = pick(random, 2) ? (uint32_t)sizeof(wan_attn_guard)
                                    : (uint32_t)offsetof(wan_attn_guard, lost_mass);
}

static int run_one(uint64_t *random, wan_attn_error *err) {
    static const int64_t HEAD_DIMS[] = {64, 80, 96, 128, 256, 72};
    static const int64_t LENGTHS[] = {0, 1, 63, 64, 257, 4096, 4097, 75600};
    int leaves_out = pick(random, 4) == 0; /* which is for two head_dims alone */
    int64_t lens[4], batch = 1 + pick(random, 4);
    int64_t head_dim = leaves_out ? 64 << pick(random, 2) : HEAD_DIMS[pick(random, 6)];
    int64_t seqlen_q = LENGTHS[pick(random, 8)], seqlen_k = LENGTHS[pick(random, 8)];
    int64_t heads_k = 1 + pick(random, 3), heads_q = heads_k * (1 + pick(random, 2));
    int32_t device = (int32_t)pick(random, ARCHS),
            dtype = pick(random, 2) ? WAN_ATTN_F16 : WAN_ATTN_BF16;
    int32_t q_dtype = pick(random, 3) ? dtype : WAN_ATTN_F32;
    wan_attn_params p;
    memset(&p, 0, sizeof(p));
    p.struct_size = sizeof(p);
    p.kernel = -1;
    p.q = tensor(random, q_dtype, device, batch, seqlen_q, heads_q, head_dim);
    p.k = tensor(random, q_dtype, device, batch, seqlen_k, heads_k, head_dim);
    p.v = tensor(random, dtype, device, batch, seqlen_k, heads_k, head_dim);
    p.out = p.q;
    p.out.data = (void *)(uintptr_t)0x7e0000000000;
    p.out.stride[2] = head_dim, p.out.stride[1] = heads_q * head_dim;
    p.out.stride[0] = seqlen_q * p.out.stride[1];
    if (pick(random, 2)) {
        for (int b = 0; b < batch; b++)
            lens[b] = pick(random, seqlen_k + 1);
        wan_attn_tensor on_cpu = {lens, WAN_ATTN_I64, WAN_ATTN_CPU, 0, 1, {batch}, {1}};
        p.seqused_k = on_cpu;
    }
    p.is_causal = (int32_t)pick(random, 2);
    p.window_size_left = p.window_size_right = -1;
    if (leaves_out)
        leave_out(random, &p);
    wan_attn_call call = {.struct_size = sizeof(call)};
    wan_attn_status status = wan_attn_prepare(&p, &call, err);
    if (status != WAN_ATTN_OK)
        return (int)status;
    p.workspace = (void *)(uintptr_t)0x7d0000000000;
    p.workspace_size = call.workspace_size;
    status = pick(random, 2) ? wan_attn_run(&p, &call, err) : wan_attn_forward(&p, err);
    p.skip_threshold = 0.0; /* gradients are dense, and tell no guard */
    p.guard = NULL;
    p.guard_size = 0;
    return status == WAN_ATTN_OK && pick(random, 2) ? run_gradients(random, &p, err) : (int)status;
}

static void *run_many(void *seed) {
    uint64_t random = *(uint64_t *)seed;
    wan_attn_error err;
    for (int n = 0; n < CALLS_OF_A_THREAD; n++) {
        int status = run_one(&random, &err);
        if (status != WAN_ATTN_OK && status != WAN_ATTN_UNSUPPORTED) {
            fprintf(stderr, "a thread's call: %d %s\n", status, err.message);
            return seed;
        }
    }
    return NULL;
}

static int test_threads(void) {
    pthread_t threads[THREADS];
    uint64_t seeds[THREADS];
    int failed = 0;
    for (int t = 0; t < THREADS; t++) {
        seeds[t] = 88172645463325252ull + (uint64_t)t;
        if (pthread_create(&threads[t], NULL, run_many, &seeds[t]) != 0)
            FAIL("no thread");
    }
    for (int t = 0; t < THREADS; t++) {
        void *wrong;
        pthread_join(threads[t], &wrong);
        failed |= wrong != NULL;
    }
    return failed;
}

static int test_failures(uint64_t *random) {
    static const char *const FUNCTIONS[] = {"cuLaunchKernel", "cuCtxPushCurrent_v2"};
    wan_attn_error err;
    for (size_t f = 0; f < sizeof(FUNCTIONS) / sizeof(FUNCTIONS[0]); f++) {
        int seen = 0;
        for (int n = 0; n < 50; n++) {
            mock_fail(FUNCTIONS[f], 700, 0);
            int status = run_one(random, &err);
            if (status == WAN_ATTN_DEVICE_ERROR)
                seen += strstr(err.message, "CUDA_ERROR_ILLEGAL_ADDRESS") != NULL;
            else if (status != WAN_ATTN_OK && status != WAN_ATTN_UNSUPPORTED)
                FAIL("%s: status %d, %s", FUNCTIONS[f], status, err.message);
        }
        mock_fail("", 0, 0);
        if (!seen)
            FAIL("%s: its failure was never seen", FUNCTIONS[f]);
        if (mock_depth() != 0)
            FAIL("%s: a context was left behind", FUNCTIONS[f]);
    }
    return 0;
}

static int find_mock(const char *path) {
    void *mock = open_library(path);
    void (*add_device)(int, int, int, const char *);
    if (!mock)
        FAIL("%s does not load", path);
    *(void **)&add_device = find_function(mock, "mock_add_device");
    *(void **)&mock_fail = find_function(mock, "mock_fail");
    *(void **)&mock_depth = find_function(mock, "mock_depth");
    *(void **)&mock_clear_log = find_function(mock, "mock_clear_log");
    if (!add_device || !mock_fail || !mock_depth || !mock_clear_log)
        FAIL("%s is no mock driver", path);
    add_device(7, 5, 68, "NVIDIA GeForce RTX 2080 Ti");
    add_device(8, 0, 108, "NVIDIA A100");
    add_device(8, 9, 128, "NVIDIA GeForce RTX 4090");
    add_device(9, 0, 132, "NVIDIA H200");
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 2)
        FAIL("usage: test_cuda MOCK_DRIVER [calls]");
    uint64_t random = 2463534242ull;
    wan_attn_error err;
    int calls = argc > 2 ? (int)strtol(argv[2], NULL, 10) : 300, taken = 0;
    wan_attn_cuda_config config = {sizeof(config), argv[1], find_image, NULL};
    if (find_mock(argv[1]) || wan_attn_cuda_configure(&config, &err) != WAN_ATTN_OK)
        FAIL("the mock driver cannot be used");
    if (test_threads())
        return 1;
    for (int n = 0; n < calls; n++) {
        mock_clear_log();
        int status = run_one(&random, &err);
        if (status != WAN_ATTN_OK && status != WAN_ATTN_UNSUPPORTED)
            FAIL("call %d: %d %s", n, status, err.message);
        taken += status == WAN_ATTN_OK;
    }
    if (taken < calls / 2)
        FAIL("only %d of %d calls were taken; the last reason: %s", taken, calls, err.message);
    if (test_failures(&random))
        return 1;
    printf("%d of %d random CUDA calls on the mock driver, %d threads, failures: right\n", taken,
           calls, THREADS);
    return 0;
}
