/* SPDX-License-Identifier: Apache-2.0
 * programs.c - the list of CUDA programs, and for each device the kernels that are loaded for it.
 */
#include "cuda/host/programs.h"

#include <stdio.h>
#include <string.h>

#include "core/platform.h"
#include "cuda/args_rope.h"

enum { CLASS_TURING, CLASS_WIDE, CLASS_SLIM };
enum { USE_ANY, USE_MASKED };

typedef struct gpu {
    int32_t arch;
    int gpu_class;
    wan_attn_cuda_body body;
} gpu;

static const gpu GPUS[] = {
#define GPU(arch, gpu_class, body) {arch, CLASS_##gpu_class, WAN_ATTN_CUDA_##body},
#include "cuda/sdpa_rows.def"
};

/* ROW_HEAD_DIM_<row>. */
enum {
#define ROW(...) HEAD_DIM_OF(__VA_ARGS__)
#define BACKWARD_ROW(...) HEAD_DIM_OF(__VA_ARGS__)
#define HEAD_DIM_OF(row, arch_min, arch_max, lossy, lists, text, dtypes, size)                     \
    ROW_HEAD_DIM_##row = (size),
#include "cuda/sdpa_rows.def"
};

/* What all tiles of sdpa_sm80.cuh have. */
#define MMA_TILE(name, class, bm, bn, num_warps, smem, pv16)                                       \
    .row = #name, .suffix = "", .body = WAN_ATTN_CUDA_SM80, .gpu_class = CLASS_##class,            \
    .num_threads = 32 * (num_warps), .smem_bytes = (smem), .block_m = (bm), .block_n = (bn),       \
    .cluster = 1, .pv_sum_f16 = (pv16), .has_f16_alone = CLASS_##class == CLASS_TURING

static const wan_attn_cuda_tile TILES[] = {
#define TILE(name, class, bm, bn, num_warps, stages, q_in_regs, ctas, pv16)                        \
    {MMA_TILE(name, class, bm, bn, num_warps,                                                      \
              WAN_ATTN_CUDA_SMEM_SM80(ROW_HEAD_DIM_##name, bm, bn, stages, q_in_regs), pv16)},
#define TILE_LISTED(name, class, bm, bn, num_warps, stages, q_in_regs, ctas, pv16)                 \
    {MMA_TILE(name, class, bm, bn, num_warps,                                                      \
              WAN_ATTN_CUDA_SMEM_SM80(ROW_HEAD_DIM_##name, bm, bn, stages, q_in_regs) +            \
                  WAN_ATTN_CUDA_SMEM_LOST(num_warps),                                              \
              pv16),                                                                               \
     .is_listed = 1},
#define TILE_QK8(name, class, bm, bn, num_warps, stages, q_in_regs, ctas, pv16)                    \
    {MMA_TILE(name, class, bm, bn, num_warps,                                                      \
              WAN_ATTN_CUDA_SMEM_QK8(ROW_HEAD_DIM_##name, bm, bn, stages, q_in_regs), pv16),       \
     .qk_int8 = 1},
#define TILE_LISTED_QK8(name, class, bm, bn, num_warps, stages, q_in_regs, ctas, pv16)             \
    {MMA_TILE(name, class, bm, bn, num_warps,                                                      \
              WAN_ATTN_CUDA_SMEM_QK8(ROW_HEAD_DIM_##name, bm, bn, stages, q_in_regs), pv16),       \
     .qk_int8 = 1, .is_listed = 1},
#define TILE_SM90(name, use, from, bn, consumers, stages, blocks, regs_producer, regs_consumer)    \
    {.row = #name,                                                                                 \
     .suffix = "_n" #bn "_w" #consumers "_s" #stages "_c" #blocks,                                 \
     .body = WAN_ATTN_CUDA_SM90,                                                                   \
     .num_threads = 128 * (1 + (consumers)),                                                       \
     .smem_bytes = WAN_ATTN_CUDA_SMEM_SM90(ROW_HEAD_DIM_##name, bn, consumers, stages),            \
     .block_m = 64 * (consumers),                                                                  \
     .block_n = (bn),                                                                              \
     .cluster = (blocks),                                                                          \
     .is_for_masks = USE_##use == USE_MASKED,                                                      \
     .from_q = (from)},
#include "cuda/sdpa_rows.def"
};

static const wan_attn_cuda_backward_tile BACKWARD_TILES[] = {
#define TILE_BACKWARD(name, symbol, class, keys, bm, bn, num_warps, stages, ctas)                  \
    {.row = #name,                                                                                 \
     .kernel = #symbol,                                                                            \
     .gpu_class = CLASS_##class,                                                                   \
     .of_keys = (keys),                                                                            \
     .num_threads = 32 * (num_warps),                                                              \
     .smem_bytes = WAN_ATTN_CUDA_SMEM_BACKWARD(ROW_HEAD_DIM_##name, keys, bm, bn, stages),         \
     .block_m = (bm)},
#include "cuda/sdpa_rows.def"
};

static const struct {
    const char *name;
    unsigned num_threads;
} HELPERS[] = {
#define HELPER(name, body, threads, step) {#name, threads},
#include "cuda/sdpa_rows.def"
};

static const struct {
    const char *name;
    unsigned num_threads;
} ROPE_KERNELS[] = {
#define ROPE_KERNEL(name, body, threads, dtype) {#name, threads},
#include "cuda/sdpa_rows.def"
};

enum {
    GPU_COUNT = sizeof(GPUS) / sizeof(GPUS[0]),
    TILE_COUNT = sizeof(TILES) / sizeof(TILES[0]),
    BACKWARD_TILE_COUNT = sizeof(BACKWARD_TILES) / sizeof(BACKWARD_TILES[0]),
    FIRST_BACKWARD = 2 * TILE_COUNT, /* a tile has a program for each dtype */
    FIRST_HELPER = FIRST_BACKWARD + 2 * BACKWARD_TILE_COUNT,
    FIRST_ROPE_KERNEL = FIRST_HELPER + WAN_ATTN_CUDA_HELPERS,
    PROGRAM_COUNT = FIRST_ROPE_KERNEL + WAN_ATTN_CUDA_ROPE_KERNELS
};

static wan_attn_lock lock = WAN_ATTN_UNLOCKED;
static wan_attn_cu_kernel kernels[WAN_ATTN_CUDA_MAX_DEVICES][PROGRAM_COUNT];

/* The newest GPU of the list that is no newer than this one, or NULL. */
static const gpu *gpu_of(int32_t arch) {
    const gpu *found = NULL;
    for (int n = 0; n < GPU_COUNT; n++)
        if (GPUS[n].arch <= arch && (!found || GPUS[n].arch > found->arch))
            found = &GPUS[n];
    return found;
}

/* Whether the tile is for such GPUs. Those of SM90 are for one architecture alone. */
static int is_for(const wan_attn_cuda_tile *tile, const gpu *known, int32_t arch) {
    return tile->body == WAN_ATTN_CUDA_SM90 ? known->body == tile->body && known->arch == arch
                                            : known->gpu_class == tile->gpu_class;
}

const wan_attn_cuda_tile *wan_attn_cuda_tile_of(const char *row, int32_t arch, int is_masked,
                                                int64_t seqlen_q) {
    const gpu *known = gpu_of(arch);
    for (int n = 0; known && n < TILE_COUNT; n++) {
        const wan_attn_cuda_tile *tile = &TILES[n];
        if (is_for(tile, known, arch) && (is_masked || !tile->is_for_masks) &&
            seqlen_q >= tile->from_q && strcmp(tile->row, row) == 0)
            return tile;
    }
    return NULL;
}

const wan_attn_cuda_backward_tile *wan_attn_cuda_backward_tile_of(const char *row, int32_t arch,
                                                                  int of_keys) {
    const gpu *known = gpu_of(arch);
    for (int n = 0; known && n < BACKWARD_TILE_COUNT; n++) {
        const wan_attn_cuda_backward_tile *tile = &BACKWARD_TILES[n];
        if (tile->gpu_class == known->gpu_class && tile->of_keys == of_keys &&
            strcmp(tile->row, row) == 0)
            return tile;
    }
    return NULL;
}

int wan_attn_cuda_is_hopper(int32_t arch) {
    const gpu *known = gpu_of(arch);
    return known && known->body == WAN_ATTN_CUDA_SM90 && known->arch == arch;
}

int wan_attn_cuda_is_for_half_rate(const char *row) {
    for (int n = 0; n < TILE_COUNT; n++)
        if (strcmp(TILES[n].row, row) == 0)
            return TILES[n].pv_sum_f16 && !TILES[n].qk_int8;
    return 0;
}

wan_attn_cuda_program wan_attn_cuda_tile_program(const wan_attn_cuda_tile *tile,
                                                 wan_attn_dtype dtype) {
    int is_bf16 = dtype == WAN_ATTN_BF16;
    wan_attn_cuda_program program = {.number = 2 * (int)(tile - TILES) + is_bf16,
                                     .name = tile->row,
                                     .dtype = is_bf16 ? "bf16" : "f16",
                                     .suffix = tile->suffix,
                                     .num_threads = tile->num_threads,
                                     .smem_bytes = tile->smem_bytes};
    return program;
}

wan_attn_cuda_program wan_attn_cuda_backward_program(const wan_attn_cuda_backward_tile *tile,
                                                     wan_attn_dtype dtype) {
    int is_bf16 = dtype == WAN_ATTN_BF16;
    wan_attn_cuda_program program = {.number = FIRST_BACKWARD + 2 * (int)(tile - BACKWARD_TILES) +
                                               is_bf16,
                                     .name = tile->kernel,
                                     .dtype = is_bf16 ? "bf16" : "f16",
                                     .suffix = "",
                                     .num_threads = tile->num_threads,
                                     .smem_bytes = tile->smem_bytes};
    return program;
}

wan_attn_cuda_program wan_attn_cuda_helper_program(wan_attn_cuda_helper helper) {
    wan_attn_cuda_program program = {.number = FIRST_HELPER + (int)helper,
                                     .name = HELPERS[helper].name,
                                     .suffix = "",
                                     .num_threads = HELPERS[helper].num_threads};
    return program;
}

wan_attn_cuda_program wan_attn_cuda_rope_program(wan_attn_cuda_rope_kernel kernel) {
    wan_attn_cuda_program program = {.number = FIRST_ROPE_KERNEL + (int)kernel,
                                     .name = ROPE_KERNELS[kernel].name,
                                     .suffix = "",
                                     .num_threads = ROPE_KERNELS[kernel].num_threads,
                                     .smem_bytes = WAN_ATTN_CUDA_SMEM_ROPE,
                                     .wants_caches = 1};
    return program;
}

wan_attn_cuda_name wan_attn_cuda_symbol_of(const wan_attn_cuda_program *program) {
    wan_attn_cuda_name symbol;
    const char *head_dim = strrchr(program->name, '_');
    if (program->dtype && head_dim)
        snprintf(symbol.text, sizeof(symbol.text), "%.*s_%s%s", (int)(head_dim - program->name),
                 program->name, program->dtype, head_dim);
    else
        snprintf(symbol.text, sizeof(symbol.text), "%s", program->name);
    return symbol;
}

/* A program's image, loaded for one device, and its kernel. Neither belongs to a context: a launch
 * goes to that of its stream, or to the thread's. */
typedef struct loaded {
    wan_attn_cu_library library;
    wan_attn_cu_kernel kernel;
} loaded;

static wan_attn_cu_result find_kernel(const wan_attn_cuda_driver *d, int32_t device_index,
                                      const wan_attn_cuda_program *program, const char *symbol,
                                      loaded *made) {
    wan_attn_cu_device device = wan_attn_cuda_handle_of(device_index);
    int smem = (int)program->smem_bytes;
    void *function;
    wan_attn_cu_result error = d->library_kernel(&made->kernel, made->library, symbol);
    if (error == 0 && smem > 48 * 1024)
        error = d->kernel_set(WAN_ATTN_CU_KERNEL_MAX_DYNAMIC_SMEM, smem, made->kernel, device);
    if (error == 0 && smem > 0 &&
        !program->wants_caches) /* a wish, in percent: tiles were chosen for the whole of it */
        (void)d->kernel_set(WAN_ATTN_CU_KERNEL_SMEM_CARVEOUT, 100, made->kernel, device);
    /* Asking brings the machine code to the device now, rather than when launching. */
    return error == 0 ? d->kernel_function(&function, made->kernel) : error;
}

/* Loads the image, and makes its kernel ready to be launched. What fails leaves nothing behind. */
static wan_attn_cu_result load_image(const wan_attn_cuda_driver *d, int32_t device_index,
                                     const wan_attn_cuda_program *program, const char *symbol,
                                     const void *image, loaded *made) {
    wan_attn_cu_result error = d->library_load(&made->library, image, NULL, NULL, 0, NULL, NULL, 0);
    if (error != 0)
        return error;
    error = find_kernel(d, device_index, program, symbol, made);
    if (error != 0)
        (void)d->library_unload(made->library); /* the first error is the one to tell */
    return error;
}

static wan_attn_status load(const wan_attn_cuda_driver *d, int32_t device_index,
                            const wan_attn_cuda_program *program, const char *symbol,
                            const void *image, loaded *made, wan_attn_error *err) {
    /* Somebody may be capturing a graph, in this thread or in another: loading is no part of it.
     * The call exchanges the thread's mode and ours, so that a second one puts it back. */
    int mode = WAN_ATTN_CU_CAPTURE_MODE_RELAXED;
    wan_attn_cu_result error = d->capture_mode(&mode);
    if (error != 0)
        return wan_attn_cuda_kernel_failed(d, error, "when loading", symbol, err);
    error = load_image(d, device_index, program, symbol, image, made);
    wan_attn_cu_result not_put_back = d->capture_mode(&mode);
    if (error == 0 && not_put_back != 0) { /* told; that it could not be unloaded says no more */
        (void)d->library_unload(made->library);
        error = not_put_back;
    }
    return error == 0 ? WAN_ATTN_OK
                      : wan_attn_cuda_kernel_failed(d, error, "when loading", symbol, err);
}

static wan_attn_status find_image(int32_t device_index, const char *name, const void **image,
                                  wan_attn_error *err) {
    char reason[900] = "";
    int32_t arch = 0;
    wan_attn_image_fn find = wan_attn_cuda_find_image();
    if (!find)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                             "no source of machine code is configured for %s", name);
    wan_attn_status status = wan_attn_cuda_find_arch(device_index, &arch, err);
    if (status != WAN_ATTN_OK)
        return status;
    size_t size = 0;
    *image = NULL;
    int found = find(name, arch, image, &size, reason, sizeof(reason)) == 0 && *image;
    reason[sizeof(reason) - 1] = '\0'; /* whatever the callback has written */
    if (!found)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "no machine code for %s: %s", name,
                             reason[0] ? reason : "none was given");
    return WAN_ATTN_OK;
}

static wan_attn_status find_and_load(const wan_attn_cuda_driver *d, int32_t device_index,
                                     const wan_attn_cuda_program *program, loaded *made,
                                     wan_attn_error *err) {
    const void *image = NULL;
    wan_attn_cuda_name symbol = wan_attn_cuda_symbol_of(program), asked;
    snprintf(asked.text, sizeof(asked.text), "%s%s", symbol.text, program->suffix);
    wan_attn_status status = find_image(device_index, asked.text, &image, err);
    return status == WAN_ATTN_OK ? load(d, device_index, program, symbol.text, image, made, err)
                                 : status;
}

wan_attn_status wan_attn_cuda_kernel(const wan_attn_cuda_driver *d, int32_t device_index,
                                     const wan_attn_cuda_program *program,
                                     wan_attn_cu_kernel *kernel, wan_attn_error *err) {
    wan_attn_cu_kernel *place = &kernels[device_index][program->number];
    wan_attn_acquire(&lock);
    *kernel = *place;
    wan_attn_release(&lock);
    if (*kernel)
        return WAN_ATTN_OK;
    /* Without the lock: finding may compile, and may need locks of its caller's. Two threads may
     * both come here; the second to load finds the place taken, and unloads what it has. */
    loaded made = {NULL, NULL};
    wan_attn_status status = find_and_load(d, device_index, program, &made, err);
    if (status != WAN_ATTN_OK)
        return status;
    wan_attn_acquire(&lock);
    int is_late = *place != NULL;
    *place = is_late ? *place : made.kernel;
    *kernel = *place;
    wan_attn_release(&lock);
    if (is_late) /* a second copy costs memory, no result */
        (void)d->library_unload(made.library);
    return WAN_ATTN_OK;
}
