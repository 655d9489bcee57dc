/* SPDX-License-Identifier: Apache-2.0
 * programs.h - sdpa_rows.def for the host: which tile a row has for a call, and the programs
 * loaded. Knows nothing else of a call.
 */
#ifndef WAN_ATTN_CUDA_HOST_PROGRAMS_H
#define WAN_ATTN_CUDA_HOST_PROGRAMS_H

#include "cuda/args.h"
#include "cuda/host/device.h"

/* The file that a tile's kernel is made of, and so how it is launched. */
typedef enum wan_attn_cuda_body {
    WAN_ATTN_CUDA_SM80, /* sdpa_sm80.cuh */
    WAN_ATTN_CUDA_SM90  /* sdpa_sm90.cuh */
} wan_attn_cuda_body;

typedef struct wan_attn_cuda_tile {
    const char *row, *suffix; /* suffix: tells the tiles of a row apart, where it has several */
    wan_attn_cuda_body body;
    int gpu_class; /* SM80: the class of GPU that it is for */
    unsigned num_threads, smem_bytes;
    int block_m, block_n;
    int cluster;              /* blocks that share tiles; 1: each for itself */
    int is_for_masks, from_q; /* which calls it is for */
    int pv_sum_f16;
    int has_f16_alone; /* the products: bf16 operands must come as f16 */
    int qk_int8;       /* q and k come as args_qk8.h has them */
    int is_listed;     /* it is launched as args_lists.h has it */
} wan_attn_cuda_tile;

/* One of the two kernels of a row of gradients. */
typedef struct wan_attn_cuda_backward_tile {
    const char *row, *kernel;
    int gpu_class;
    int of_keys; /* dk and dv; else dq */
    unsigned num_threads, smem_bytes;
    int block_m; /* keys, or query rows, whose gradient a block makes */
} wan_attn_cuda_backward_tile;

/* The helper passes, named as in sdpa_rows.def. */
typedef enum wan_attn_cuda_helper {
#define HELPER(name, body, threads, step) HELPER_##name,
#include "cuda/sdpa_rows.def"
    WAN_ATTN_CUDA_HELPERS
} wan_attn_cuda_helper;

/* The kernels of rms_norm_rope, named as there. */
typedef enum wan_attn_cuda_rope_kernel {
#define ROPE_KERNEL(name, body, threads, dtype) ROPE_KERNEL_##name,
#include "cuda/sdpa_rows.def"
    WAN_ATTN_CUDA_ROPE_KERNELS
} wan_attn_cuda_rope_kernel;

/* A kernel that can be launched. Its symbol is `name`, with the dtype before the last underscore if
 * there is one; its machine code is asked for by the symbol and `suffix`. */
typedef struct wan_attn_cuda_program {
    int number; /* of this program, among all */
    const char *name, *dtype, *suffix;
    unsigned num_threads, smem_bytes;
    int wants_caches; /* rather than the whole of an SM's shared memory */
} wan_attn_cuda_program;

/* A program's symbol, or what its machine code is asked for by. */
typedef struct wan_attn_cuda_name {
    char text[80];
} wan_attn_cuda_name;

/* The tile of this row for GPUs of compute capability arch / 10, or NULL: it has none. A GPU newer
 * than the list is taken for the newest one that is older. is_masked, seqlen_q: what the call is;
 * some rows have several tiles. */
const wan_attn_cuda_tile *wan_attn_cuda_tile_of(const char *row, int32_t arch, int is_masked,
                                                int64_t seqlen_q);

/* Whether the row is the exact one for cards that sum f32 at half rate. */
int wan_attn_cuda_is_for_half_rate(const char *row);

/* Whether machine code for Hopper alone runs on a GPU of this compute capability. */
int wan_attn_cuda_is_hopper(int32_t arch);

/* dtype: the row's, f16 or bf16. */
wan_attn_cuda_program wan_attn_cuda_tile_program(const wan_attn_cuda_tile *tile,
                                                 wan_attn_dtype dtype);
/* The tile of such a row, as wan_attn_cuda_tile_of. */
const wan_attn_cuda_backward_tile *wan_attn_cuda_backward_tile_of(const char *row, int32_t arch,
                                                                  int of_keys);
wan_attn_cuda_program wan_attn_cuda_backward_program(const wan_attn_cuda_backward_tile *tile,
                                                     wan_attn_dtype dtype);
wan_attn_cuda_program wan_attn_cuda_helper_program(wan_attn_cuda_helper helper);
/* Its num_threads are the most that a launch may have. */
wan_attn_cuda_program wan_attn_cuda_rope_program(wan_attn_cuda_rope_kernel kernel);

wan_attn_cuda_name wan_attn_cuda_symbol_of(const wan_attn_cuda_program *program);

/* The program's kernel for the device, on which this thread must be working; loaded at its first
 * use. UNSUPPORTED: there is no machine code for this device, so that something else may run the
 * call. */
wan_attn_status wan_attn_cuda_kernel(const wan_attn_cuda_driver *driver, int32_t device_index,
                                     const wan_attn_cuda_program *program,
                                     wan_attn_cu_kernel *kernel, wan_attn_error *err);

#endif /* WAN_ATTN_CUDA_HOST_PROGRAMS_H */
