/* SPDX-License-Identifier: Apache-2.0
 * programs.h - sdpa_rows.def for the host: which program a row is on which GPU, and that program
 * loaded. Knows nothing of a call.
 */
#ifndef WAN_ATTN_CUDA_HOST_PROGRAMS_H
#define WAN_ATTN_CUDA_HOST_PROGRAMS_H

#include "cuda/args.h"
#include "cuda/host/device.h"

/* A kernel that can be launched. */
typedef struct wan_attn_cuda_program {
    const char *name;  /* of the function in its machine code; a row's own */
    const char *image; /* what that machine code is asked for by */
    unsigned num_threads, smem_bytes;
} wan_attn_cuda_program;

typedef struct wan_attn_cuda_tile {
    wan_attn_cuda_program program;
    int gpu_class;
    int block_m, block_n;
    int cluster; /* 0: a tile of sdpa_sm80.cuh; else of sdpa_sm90.cuh: blocks of a cluster */
    int is_for_masks, from_q;
    int pv_sum_f16;
    /* K and V have to be f16, scaled by the head so that the largest value is below 2^limit; 0: as
     * they are. */
    int k_limit, v_limit;
} wan_attn_cuda_tile;

/* The helper passes, named as in sdpa_rows.def. */
typedef enum wan_attn_cuda_helper {
#define HELPER(name, body, threads, step) HELPER_##name,
#include "cuda/sdpa_rows.def"
    WAN_ATTN_CUDA_HELPERS
} wan_attn_cuda_helper;

/* The tile of this row for GPUs of compute capability arch / 10, or NULL: it has none. A GPU newer
 * than the list is taken for the newest one that is older. is_masked, seqlen_q: what the call is;
 * some rows have several tiles. */
const wan_attn_cuda_tile *wan_attn_cuda_tile_of(const char *row, int32_t arch, int is_masked,
                                                int64_t seqlen_q);

/* Whether the row sums P V in f16; the GPU does not matter. */
int wan_attn_cuda_sums_f16(const char *row);

const wan_attn_cuda_program *wan_attn_cuda_helper_program(wan_attn_cuda_helper helper);

/* The program's function in the device's context, which must be this thread's; loaded at its first
 * use. UNSUPPORTED: there is no machine code for this device, so that something else may run the
 * call. */
wan_attn_status wan_attn_cuda_function(const wan_attn_cuda_driver *driver, int32_t device_index,
                                       const wan_attn_cuda_program *program,
                                       wan_attn_cu_function *function, wan_attn_error *err);

#endif /* WAN_ATTN_CUDA_HOST_PROGRAMS_H */
