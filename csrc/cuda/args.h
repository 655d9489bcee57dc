/* SPDX-License-Identifier: Apache-2.0
 * args.h - what the host passes to an attention kernel: the one parameter of every launch. Plain C
 * for the loader, CUDA C for the kernels and C++ for the emulator; includes nothing, because NVRTC
 * has no system headers.
 *
 * Launch: grid (m_blocks * num_splits * num_heads_q * batch, 1, 1), block (32 * NUM_WARPS, 1, 1),
 * dynamic shared memory and tile constants as in the kernel's TILE line of sdpa_rows.def.
 */
#ifndef WAN_ATTN_CUDA_ARGS_H
#define WAN_ATTN_CUDA_ARGS_H

/* The same size on every platform that CUDA has, Windows included. */
typedef long long wan_attn_i64;

/* One [batch, seqlen, heads, head_dim] operand in device memory. Strides in elements; head_dim has
 * stride 1. What must be aligned, base and strides alike: k and v to 16 bytes, q to two elements,
 * out to four. */
typedef struct wan_attn_cuda_view {
    void *data;
    wan_attn_i64 batch_stride, row_stride, head_stride;
} wan_attn_cuda_view;

/* Real lengths of a padded batch, in device memory, clamped by the kernel to [0, seqlen]. data ==
 * NULL: every sample has the padded length. */
typedef struct wan_attn_cuda_lengths {
    const void *data;
    wan_attn_i64 stride; /* in elements */
    int is_i64;          /* else i32 */
    int unused;
} wan_attn_cuda_lengths;

typedef struct wan_attn_cuda_args {
    wan_attn_cuda_view q;    /* f32 if q_is_f32, else the row's dtype */
    wan_attn_cuda_view k, v; /* the row's dtype; f16 where a scale is asked for below */
    /* Rows qk8: of q and k `data` alone is read, the queries and the keys of args_qk8.h. */
    wan_attn_cuda_view out; /* f32 if out_is_f32, else the row's dtype */
    float *lse;             /* [batch, num_heads_q, seqlen_q], natural log; NULL: not wanted */
    wan_attn_i64 lse_batch_stride, lse_head_stride, lse_row_stride;
    wan_attn_cuda_lengths seqused_q, seqused_k;

    /* [batch, num_heads_k]: what v and k of that head have been divided by to fit f16. Powers of
     * two, from wan_attn_find_scale with these limits:
     *     sums of P V in f16       v_scale: WAN_ATTN_CUDA_LIMIT_SUM_F16    k_scale: NULL
     *     bf16 rows on Turing      both: WAN_ATTN_CUDA_LIMIT_F16; rows qk8 v_scale alone
     *     all others               both: NULL */
    const float *v_scale;
    union {
        const float *k_scale;
        const float *q_rows; /* rows qk8: what goes with the queries; args_qk8.h */
    };

    /* Split over keys: part s works on the key tiles [s, s + 1) * split_tiles of its rows and
     * writes a complete result (out, lse) of those keys, s strides further. One part: num_splits =
     * 1, split_tiles >= all tiles. */
    wan_attn_i64 out_split_stride, lse_split_stride;
    int num_splits, split_tiles;

    int batch, num_heads_q;
    int heads_per_key_head; /* num_heads_q / num_heads_k */
    int seqlen_q, seqlen_k; /* padded lengths, below 2^29 */
    int m_blocks;           /* ceil(seqlen_q / BLOCK_M) */
    /* Keys left and right of the diagonal, at most WAN_ATTN_CUDA_UNBOUNDED. */
    int window_size_left, window_size_right;
    int q_is_f32, out_is_f32;
    /* |softmax_scale| * log2(e). Never 0: the host passes WAN_ATTN_CUDA_SMALLEST_SCALE instead, so
     * that -inf, the score of a hidden key, times the scale stays -inf. */
    float scale_log2e;
    /* 0x80008000 for a negative softmax_scale: its sign is moved into Q, where it is exact. */
    unsigned q_sign;
} wan_attn_cuda_args;

/* pack.cuh. Grids, in warps: measure batch * heads * num_parts, find_scale batch * heads, convert
 * batch * seqlen * heads; in blocks of HELPER's threads, rounded up. For another dtype's sake alone
 * (f32 to bf16, say), or for alignment's, convert with scale == NULL is enough. */
typedef struct wan_attn_cuda_pack_args {
    wan_attn_cuda_view from;
    void *to; /* [batch, seqlen, heads, head_dim], dense, 16-bit */
    wan_attn_cuda_lengths seqused;
    float *largest; /* measure: [batch, heads, num_parts] */
    float *scale;   /* [batch, heads]; made by find_scale, divides in convert; NULL: 1 */
    int batch, seqlen, heads, head_dim; /* head_dim: even */
    int from_dtype;                     /* wan_attn_dtype: f32, f16 or bf16 */
    int to_bf16;                        /* else f16 */
    int num_parts;
    int limit; /* find_scale: the largest finite value becomes less than 2^limit */
} wan_attn_cuda_pack_args;

/* put_lengths.cuh. Grid: one block. Writes lengths[0 .. count) to `to`, for seqused_q, seqused_k or
 * both of a launch behind it in the stream; for more of them, launch it again further on. */
enum { WAN_ATTN_CUDA_MOST_LENGTHS = 256 };
typedef struct wan_attn_cuda_put_lengths_args {
    int *to; /* device memory */
    int count;
    int lengths[WAN_ATTN_CUDA_MOST_LENGTHS];
    int unused;
} wan_attn_cuda_put_lengths_args;

/* merge.cuh. Grid, in warps: batch * seqlen * num_heads. */
typedef struct wan_attn_cuda_merge_args {
    const float *part_out; /* [num_splits, batch, seqlen, num_heads, head_dim] */
    const float *part_lse; /* [num_splits, batch, num_heads, seqlen] */
    wan_attn_cuda_view out;
    float *lse; /* NULL: not wanted */
    wan_attn_i64 lse_batch_stride, lse_head_stride, lse_row_stride;
    int batch, seqlen, num_heads, head_dim;
    int num_splits;
    int out_dtype; /* wan_attn_dtype: f32, f16 or bf16 */
} wan_attn_cuda_merge_args;

/* No window: larger than any key index, and the sum of a few still is an int. */
#define WAN_ATTN_CUDA_UNBOUNDED (1 << 29)
#define WAN_ATTN_CUDA_SMALLEST_SCALE 1.1754944e-38f

/* Bytes of shared memory of a block, by what its line in sdpa_rows.def says. Of sdpa_sm80.cuh: V
 * and STAGES tiles of K, Q if it is not in registers, bounds of the mask; with 8-bit scores (QK8) K
 * in INT8 with its steps, and Q in INT8; beside it, where rows may leave tiles out (LOST), 16 bytes
 * for each four lanes, what their rows have lost. Of sdpa_sm90.cuh: Q, STAGES tiles of K and of V,
 * an mbarrier of 16 bytes for Q and four a stage. Of sdpa_backward.cuh: two operands of the block's
 * own, STAGES tiles of two others, of dk and dv two numbers for each of 64 rows of those, and what
 * the block has to do. tiles.py of wan_attn/cuda reads these lines. */
#define WAN_ATTN_CUDA_SMEM_SM80(head_dim, block_m, block_n, stages, q_in_regs)                     \
    (2 * (head_dim) * ((block_n) * ((stages) + 1) + (block_m) * (1 - (q_in_regs))) + 16)
#define WAN_ATTN_CUDA_SMEM_LOST(num_warps) (128 * (num_warps))
#define WAN_ATTN_CUDA_SMEM_QK8(head_dim, block_m, block_n, stages, q_in_regs)                      \
    ((block_n) * (2 * (head_dim) + (stages) * ((head_dim) + 8)) +                                  \
     (block_m) * (head_dim) * (1 - (q_in_regs)) + 16)
#define WAN_ATTN_CUDA_SMEM_SM90(head_dim, block_n, consumers, stages)                              \
    (2 * (head_dim) * (64 * (consumers) + 2 * (stages) * (block_n)) + 64 * (stages) + 16)
#define WAN_ATTN_CUDA_SMEM_BACKWARD(head_dim, of_keys, block_m, block_n, stages)                   \
    (4 * (head_dim) * ((block_m) + (stages) * (block_n)) + 512 * (of_keys) * (stages) + 32)

/* Limits of find_scale. 32 weights of at most 2^9 (P_SHIFT) times 2^1 stay below f16's 65504,
 * rounding included, and so do 64 of at most 2^7 (rows qk8); 2^15 does so alone, and leaves the
 * largest range below: what is 2^-32 of the largest still has bf16's eight bits. */
#define WAN_ATTN_CUDA_LIMIT_SUM_F16 1
#define WAN_ATTN_CUDA_LIMIT_F16 15

#endif /* WAN_ATTN_CUDA_ARGS_H */
