/* SPDX-License-Identifier: Apache-2.0
 * args_backward.h - what the host passes to the kernels of attention's gradient. Plain C, CUDA C
 * and C++, as args.h. The gradient itself: wan_attn_backward of wan_attn.h.
 *
 * The passes, in this order; [f16]: only for products in f16:
 *
 *     wan_attn_backward_rows        out, dout, lse, dlse -> rows, sizes
 *     wan_attn_measure       [f16]  v -> largest
 *     wan_attn_backward_scale[f16]  rows, sizes, largest -> scales, dout_scale
 *     wan_attn_convert              what is no 16-bit operand yet: see wan_attn_cuda_backward_args
 *     TILE_BACKWARD, of_keys 1      dk, dv
 *     TILE_BACKWARD, of_keys 0      dq
 *
 * The last two do not need each other.
 */
#ifndef WAN_ATTN_CUDA_ARGS_BACKWARD_H
#define WAN_ATTN_CUDA_ARGS_BACKWARD_H

#include "cuda/args.h"

/* backward_rows.cuh. Grid, in warps: batch * num_heads_q * seqlen_q, in blocks of HELPER's threads,
 * rounded up. */
typedef struct wan_attn_cuda_backward_rows_args {
    wan_attn_cuda_view out, dout; /* any float dtype, at any alignment */
    const float *lse;             /* as forward left it */
    const float *dlse;            /* NULL: zeros */
    wan_attn_i64 lse_batch_stride, lse_head_stride, lse_row_stride;
    wan_attn_i64 dlse_batch_stride, dlse_head_stride, dlse_row_stride;
    wan_attn_cuda_lengths seqused_q, seqused_k;
    /* [batch, num_heads_q, seqlen_q][4], 16-byte aligned: of the row, and again of the row behind
     * it (behind a head's last: as of one without keys), so that two rows can be copied from any
     * row on. Lse in base 2, and <dout, out> - dlse. Of a row that sees one key: lse and -dlse,
     * because there dout and out have no part in dS. Of one that sees none: infinity and 0. */
    float *rows;
    /* [batch, num_heads_q, seqlen_q]: the sum of all finite |dout|, at most 3.4e38. NULL: products
     * are in bf16. */
    float *sizes;
    int batch, num_heads_q, seqlen_q, seqlen_k, head_dim;
    int window_size_left, window_size_right; /* as in wan_attn_cuda_args */
    int out_dtype, dout_dtype;               /* wan_attn_dtype */
} wan_attn_cuda_backward_rows_args;

/* backward_scale.cuh. Grid, in warps: batch * num_heads_k. */
typedef struct wan_attn_cuda_backward_scale_args {
    const float *rows, *sizes; /* from wan_attn_backward_rows */
    const float *largest;      /* of v, [batch, num_heads_k, num_parts]: from wan_attn_measure */
    wan_attn_cuda_lengths seqused_q;
    /* [batch, num_heads_k][WAN_ATTN_CUDA_BACKWARD_SCALES], 16-byte aligned */
    float *scales;
    /* [batch, num_heads_q], for wan_attn_convert: what dout is divided by on its way to f16. NULL:
     * dout is f16 as it comes, and nothing divides it. */
    float *dout_scale;
    int batch, num_heads_q, heads_per_key_head, seqlen_q, num_parts;
} wan_attn_cuda_backward_scale_args;

/* Powers of two of a key head. What tensor cores make of dP, times [0], less delta, times [1], is
 * what dS is made of; its sums times [2] are the gradient's, and sums of P dout times [3]. */
#define WAN_ATTN_CUDA_BACKWARD_SCALES 4

/* sdpa_backward.cuh. Grid: blocks * heads * batch, heads being num_heads_k for dk and dv, else
 * num_heads_q; block (32 * NUM_WARPS, 1, 1); dynamic shared memory WAN_ATTN_CUDA_SMEM_BACKWARD. */
typedef struct wan_attn_cuda_backward_args {
    /* The row's dtype. Base and strides: multiples of 16 bytes; a stride may be 0. What is not so
     * goes through wan_attn_convert; with a scale, dout alone (above). */
    wan_attn_cuda_view q, k, v, dout;
    /* f32 where it says so below, else the row's dtype. Base and strides: multiples of 8 bytes.
     * A launch of dk and dv does not look at dq, nor one of dq at them. */
    wan_attn_cuda_view dq, dk, dv;
    const float *rows;   /* as above */
    const float *scales; /* as above; NULL: all are 1 */
    wan_attn_cuda_lengths seqused_q, seqused_k;
    int batch, num_heads_q;
    int heads_per_key_head; /* num_heads_q / num_heads_k */
    int seqlen_q, seqlen_k; /* padded lengths, below 2^29 */
    int blocks; /* ceil(seqlen_k / BLOCK_M) for dk and dv, else ceil(seqlen_q / BLOCK_M) */
    int window_size_left, window_size_right; /* as in wan_attn_cuda_args; causal: right is 0 */
    int dq_is_f32, dk_is_f32, dv_is_f32;
    float softmax_scale; /* of any sign; 0 as well */
    float scale_log2e;   /* softmax_scale * log2(e) */
} wan_attn_cuda_backward_args;

#endif /* WAN_ATTN_CUDA_ARGS_BACKWARD_H */
