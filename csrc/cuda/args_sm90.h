/* SPDX-License-Identifier: Apache-2.0
 * args_sm90.h - what the host passes to a kernel of sdpa_sm90.cuh: the call of args.h and the
 * tensor maps that TMA reads. Plain C; how to fill it: README.md, "Launch: sdpa_sm90.cuh".
 */
#ifndef WAN_ATTN_CUDA_ARGS_SM90_H
#define WAN_ATTN_CUDA_ARGS_SM90_H

#include "cuda/args.h"

#ifdef __cplusplus
#define WAN_ATTN_ALIGNED_64 alignas(64)
#else
#define WAN_ATTN_ALIGNED_64 _Alignas(64)
#endif

/* A CUtensorMap, as cuTensorMapEncodeTiled makes it. */
typedef struct wan_attn_cuda_tensor_map {
    WAN_ATTN_ALIGNED_64 unsigned long long opaque[16];
} wan_attn_cuda_tensor_map;

/* By value, as the launch's one parameter: the kernel reads maps where they arrive. */
typedef struct wan_attn_cuda_sm90_args {
    wan_attn_cuda_tensor_map q, k, v;
    wan_attn_cuda_tensor_map out; /* only if call.out can be stored by TMA: stores_by_tma */

    /* As for every kernel, but: q has the row's dtype (q_is_f32 = 0; wan_attn_convert makes it of
     * f32 queries), there is one part (num_splits = 1, split_tiles = 2^29 / BLOCK_N), v_scale is
     * NULL, and m_blocks is rounded up to a multiple of CLUSTER: the surplus block brings its half
     * of the keys to the other one. Of q, k and v only the maps are read. */
    wan_attn_cuda_args call;

    /* out has the row's dtype, base and strides that TMA takes, and its map is made. Else rows
     * leave straight from registers: f32, or 16 bits at any alignment of 8 bytes. */
    int stores_by_tma;
    int unused[15]; /* to a multiple of 64 bytes */
} wan_attn_cuda_sm90_args;

#endif /* WAN_ATTN_CUDA_ARGS_SM90_H */
