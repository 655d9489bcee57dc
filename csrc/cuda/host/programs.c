/* SPDX-License-Identifier: Apache-2.0
 * programs.c - the list of CUDA programs, and for each device the functions that are loaded there.
 */
#include "cuda/host/programs.h"

#include <string.h>

#include "core/lock.h"

enum { CLASS_TURING, CLASS_WIDE, CLASS_SLIM, CLASS_HOPPER_ALONE };
enum { HOPPER = 90 };
enum { USE_ANY, USE_MASKED, USE_SPARE };

static const struct {
    int32_t arch;
    int gpu_class;
} GPUS[] = {
#define GPU(arch, gpu_class) {arch, CLASS_##gpu_class},
#include "cuda/sdpa_rows.def"
};

/* Turing's tensor cores know f16 alone: what is bf16 has to fit it. */
#define IS_BF16 1
#define IS_F16 0
#define F16_LIMIT(gpu_class, dtype)                                                                \
    (CLASS_##gpu_class == CLASS_TURING && IS_##dtype ? WAN_ATTN_CUDA_LIMIT_F16 : 0)

#define SMEM_SM80(head_dim, block_m, block_n, stages, q_in_regs)                                   \
    (2 * (head_dim) * ((block_n) * ((stages) + 1) + ((q_in_regs) ? 0 : (block_m))) + 16)
#define SMEM_SM90(head_dim, block_n, consumers, stages)                                            \
    (2 * (head_dim) * (64 * (consumers) + 2 * (stages) * (block_n)) + 64 * (stages) + 16)

static const wan_attn_cuda_tile TILES[] = {
/* Rows of sm_90a first, in the order in which a call looks for its tile. */
#define TILE_SM90(row, use, from, dtype, head_dim, bn, consumers, stages, blocks, rp, rc)          \
    {.program = {#row, #row "_n" #bn "_w" #consumers "_s" #stages "_c" #blocks,                    \
                 128 * (1 + (consumers)), SMEM_SM90(head_dim, bn, consumers, stages)},             \
     .gpu_class = USE_##use == USE_SPARE ? -1 : CLASS_HOPPER_ALONE,                                \
     .block_m = 64 * (consumers),                                                                  \
     .block_n = (bn),                                                                              \
     .cluster = (blocks),                                                                          \
     .is_for_masks = USE_##use == USE_MASKED,                                                      \
     .from_q = (from)},
#include "cuda/sdpa_rows.def"
#define TILE(row, class, body, dtype, head_dim, bm, bn, num_warps, stages, q_in_regs, ctas, pv16)  \
    {.program = {#row, #row, 32 * (num_warps), SMEM_SM80(head_dim, bm, bn, stages, q_in_regs)},    \
     .gpu_class = CLASS_##class,                                                                   \
     .block_m = (bm),                                                                              \
     .block_n = (bn),                                                                              \
     .pv_sum_f16 = (pv16),                                                                         \
     .k_limit = F16_LIMIT(class, dtype),                                                           \
     .v_limit = (pv16) ? WAN_ATTN_CUDA_LIMIT_SUM_F16 : F16_LIMIT(class, dtype)},
#include "cuda/sdpa_rows.def"
};

static const wan_attn_cuda_program HELPERS[] = {
#define HELPER(name, body, threads, step) {#name, #name, threads, 0},
#include "cuda/sdpa_rows.def"
};

enum {
    GPU_COUNT = sizeof(GPUS) / sizeof(GPUS[0]),
    TILE_COUNT = sizeof(TILES) / sizeof(TILES[0]),
    PROGRAM_COUNT = TILE_COUNT + WAN_ATTN_CUDA_HELPERS
};

static wan_attn_lock lock = WAN_ATTN_UNLOCKED;
static wan_attn_cu_function functions[WAN_ATTN_CUDA_MAX_DEVICES][PROGRAM_COUNT];

/* The class of tiles of sdpa_sm80.cuh. */
static int class_of(int32_t arch) {
    int newest = -1, gpu_class = -1;
    for (int n = 0; n < GPU_COUNT; n++)
        if (GPUS[n].arch <= arch && GPUS[n].arch > newest) {
            newest = GPUS[n].arch;
            gpu_class = GPUS[n].gpu_class;
        }
    return gpu_class;
}

const wan_attn_cuda_tile *wan_attn_cuda_tile_of(const char *row, int32_t arch, int is_masked,
                                                int64_t seqlen_q) {
    int gpu_class = class_of(arch);
    for (int n = 0; n < TILE_COUNT; n++) {
        const wan_attn_cuda_tile *tile = &TILES[n];
        int is_ours =
            tile->gpu_class == CLASS_HOPPER_ALONE ? arch == HOPPER : tile->gpu_class == gpu_class;
        if (is_ours && (is_masked || !tile->is_for_masks) && seqlen_q >= tile->from_q &&
            strcmp(tile->program.name, row) == 0)
            return tile;
    }
    return NULL;
}

int wan_attn_cuda_sums_f16(const char *row) {
    for (int n = 0; n < TILE_COUNT; n++)
        if (strcmp(TILES[n].program.name, row) == 0)
            return TILES[n].pv_sum_f16;
    return 0;
}

const wan_attn_cuda_program *wan_attn_cuda_helper_program(wan_attn_cuda_helper helper) {
    return &HELPERS[helper];
}

static int place_of(const wan_attn_cuda_program *program) {
    for (int n = 0; n < TILE_COUNT; n++)
        if (program == &TILES[n].program)
            return n;
    return TILE_COUNT + (int)(program - HELPERS);
}

/* Whether the device cannot run this image, or not with so much shared memory, which says nothing
 * against the device: something else may run the call. */
static int is_about_the_image(wan_attn_cu_result error) {
    return error == WAN_ATTN_CU_INVALID_IMAGE || error == WAN_ATTN_CU_NO_BINARY_FOR_GPU ||
           error == WAN_ATTN_CU_UNSUPPORTED_PTX_VERSION || error == WAN_ATTN_CU_INVALID_VALUE ||
           error == WAN_ATTN_CU_NOT_FOUND;
}

static wan_attn_status failed_to_load(const wan_attn_cuda_driver *d, wan_attn_cu_result error,
                                      const char *name, wan_attn_error *err) {
    if (!is_about_the_image(error))
        return wan_attn_cuda_fail(d, error, "when loading", name, err);
    const char *error_name, *text = wan_attn_cuda_words(d, error, &error_name);
    return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                         "the machine code of %s is not for this device or driver: %s (%s)", name,
                         error_name, text);
}

static wan_attn_status load(const wan_attn_cuda_driver *d, const wan_attn_cuda_program *program,
                            const void *image, wan_attn_cu_function *function,
                            wan_attn_error *err) {
    /* A graph may be under capture, in this thread or in another: loading must stay out of it. */
    int mode = WAN_ATTN_CU_CAPTURE_MODE_RELAXED;
    (void)d->capture_mode(&mode);
    wan_attn_cu_module module; /* lives as long as its context */
    wan_attn_cu_result error = d->module_load(&module, image);
    if (error == 0)
        error = d->module_function(function, module, program->name);
    if (error == 0 && program->smem_bytes > 48 * 1024)
        error = d->function_set(*function, WAN_ATTN_CU_FUNCTION_MAX_DYNAMIC_SMEM,
                                (int)program->smem_bytes);
    (void)d->capture_mode(&mode);
    return error == 0 ? WAN_ATTN_OK : failed_to_load(d, error, program->name, err);
}

static wan_attn_status find_image(int32_t device_index, const char *name, const void **image,
                                  wan_attn_error *err) {
    char reason[900] = "";
    wan_attn_image_fn find = wan_attn_cuda_find_image();
    if (!find)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                             "no source of machine code is configured for %s", name);
    int32_t arch = wan_attn_cuda_arch(device_index, reason, sizeof(reason));
    size_t size = 0;
    *image = NULL;
    if (arch == 0 || find(name, arch, image, &size, reason, sizeof(reason)) != 0 || !*image)
        return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "no machine code for %s: %s", name,
                             reason[0] ? reason : "none was given");
    return WAN_ATTN_OK;
}

wan_attn_status wan_attn_cuda_function(const wan_attn_cuda_driver *d, int32_t device_index,
                                       const wan_attn_cuda_program *program,
                                       wan_attn_cu_function *function, wan_attn_error *err) {
    wan_attn_cu_function *place = &functions[device_index][place_of(program)];
    wan_attn_acquire(&lock);
    *function = *place;
    wan_attn_release(&lock);
    if (*function)
        return WAN_ATTN_OK;
    /* Without the lock: finding may compile, and may need locks of its caller's. Two threads may
     * both come here; the second to load finds the place taken, and its module goes unused. */
    const void *image = NULL;
    wan_attn_status status = find_image(device_index, program->image, &image, err);
    if (status == WAN_ATTN_OK)
        status = load(d, program, image, function, err);
    if (status != WAN_ATTN_OK)
        return status;
    wan_attn_acquire(&lock);
    if (*place)
        *function = *place;
    *place = *function;
    wan_attn_release(&lock);
    return WAN_ATTN_OK;
}
