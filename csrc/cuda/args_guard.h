/* SPDX-License-Identifier: Apache-2.0
 * args_guard.h - what the host passes to the pass that fills a guard (guard.cuh). Plain C, as
 * args.h.
 */
#ifndef WAN_ATTN_CUDA_ARGS_GUARD_H
#define WAN_ATTN_CUDA_ARGS_GUARD_H

#include "cuda/args.h"

#define WAN_ATTN_CUDA_GUARD_ROWS 64 /* that a warp looks at */

/* Grid, in warps: batch * (num_heads_q * blocks of seqlen_q + num_heads_k * blocks of seqlen_k). */
typedef struct wan_attn_cuda_guard_args {
    wan_attn_cuda_view v, out;
    wan_attn_cuda_lengths seqused_k;
    void *guard; /* wan_attn_guard */
    int batch, seqlen_q, seqlen_k, num_heads_q, num_heads_k, head_dim;
    int v_dtype, out_dtype; /* wan_attn_dtype */
} wan_attn_cuda_guard_args;

#endif /* WAN_ATTN_CUDA_ARGS_GUARD_H */
