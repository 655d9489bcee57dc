/* SPDX-License-Identifier: Apache-2.0
 * rope.cuh - rms_norm_rope of tensors whose heads are whole 16-byte pieces: RMS norm, weight and
 * rotation (wan_attn.h) in one pass over memory.
 *
 * Implements: RMSNorm (arXiv 1910.07467), RoPE (arXiv 2104.09864), an angle for each axis.
 * Who does what: a block has one token and keeps all of it in registers from the load to the store.
 * A thread has 8 columns of every num_groups-th head, up to four:
 *
 *            columns 0..7   8..15  ...                head_dim 128: 16 slots
 *   head 0   thread 0       1      ...  15  |         24 heads: 6 groups, 96 threads
 *        1   thread 16      17     ...      | groups  40 heads: 10 groups, 160 threads
 *       ..                                  |
 *   head num_groups: thread 0 again
 *
 * So it needs the angles of four pairs alone, whatever the number of heads.
 * Flow: x is under way while angles are read, split and staged; one barrier for angles and sums.
 * Budget: one read of x, one write of out, 16 bytes each time; table and weight from the caches.
 * Limits: head_dim a multiple of 8; x, out and weight, base and strides, multiples of 16 bytes;
 * up to 512 threads; the table the same for all heads; for a norm of each head slots are a power of
 * two. Other calls: rope_any.cuh.
 * Numerics: squares are summed in float32, a thread's own, then over the lanes of its warp; the
 * warps' sums, mean and 1 / sqrt in 48 bits. The rotation has a float32's rounding and hardly more
 * for a float32 out; for a 16-bit out it is float32 arithmetic.
 * Measured: never run on a GPU.
 */
#include "cuda/tile/rope_token.cuh"

enum { VECTORS = 4, WIDTH = 8 };

/* This thread's part of the token: these columns of heads group, group + num_groups and so on. */
typedef struct part {
    int slot;
    int group; /* num_heads for threads that fill up the last warp: they have no head */
} part;

DEVICE part part_of(const wan_attn_cuda_rope_args &args) {
    part mine;
    int group = thread_index() * args.slot_factor >> 16;
    mine.slot = thread_index() - group * args.slots;
    mine.group = group < args.num_groups ? group : args.num_heads;
    return mine;
}

/* Whether there is a head for the thread's vector k. */
DEVICE bool has_head(const wan_attn_cuda_rope_args &args, const part &mine, int k) {
    return mine.group + k * args.num_groups < args.num_heads;
}

/* Bytes from the start of x or out to the thread's first vector. */
DEVICE i64 first_byte(const wan_attn_cuda_view &view, const rope_token &token, const part &mine,
                      int size) {
    return (offset_of(view, token) + mine.group * view.head_stride + mine.slot * WIDTH) * size;
}

/* 8 values of 16 bits. */
DEVICE void unpack(float y[WIDTH], const u32 words[4], int dtype) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
        if (dtype == IS_F16) {
            unpack_f16(&y[2 * n], &y[2 * n + 1], words[n]);
        } else {
            y[2 * n] = float_from_bits(words[n] << 16);
            y[2 * n + 1] = float_from_bits(words[n] & 0xffff0000u);
        }
    }
}

DEVICE void pack(u32 words[4], const float y[WIDTH], int dtype) {
#pragma unroll
    for (int n = 0; n < 4; n++)
        words[n] =
            dtype == IS_F16 ? pack_f16(y[2 * n], y[2 * n + 1]) : pack_bf16(y[2 * n], y[2 * n + 1]);
}

/* To x's dtype and back. */
DEVICE void round_all(float y[VECTORS][WIDTH]) {
#pragma unroll
    for (int k = 0; X_DTYPE != IS_F32 && k < VECTORS; k++) {
        u32 words[4];
        pack(words, y[k], X_DTYPE);
        unpack(y[k], words, X_DTYPE);
    }
}

/* x of the token; zeros where there is no head. */
DEVICE void load_all(const wan_attn_cuda_rope_args &args, const rope_token &token, const part &mine,
                     float y[VECTORS][WIDTH]) {
    const int size = X_DTYPE == IS_F32 ? 4 : 2;
    const i64 step = args.num_groups * args.x.head_stride * size;
    const char *at = (const char *)args.x.data + first_byte(args.x, token, mine, size);
    u32 words[VECTORS][WIDTH];
#pragma unroll
    for (int k = 0; k < VECTORS; k++, at += step) {
#pragma unroll
        for (int n = 0; n < WIDTH; n++)
            words[k][n] = 0;
        if (has_head(args, mine, k)) {
            load_own_b32x4(words[k], at);
            if (X_DTYPE == IS_F32)
                load_own_b32x4(words[k] + 4, at + 16);
        }
    }
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
#pragma unroll
        for (int n = 0; X_DTYPE == IS_F32 && n < WIDTH; n++)
            y[k][n] = float_from_bits(words[k][n]);
        if (X_DTYPE != IS_F32)
            unpack(y[k], words[k], X_DTYPE);
    }
}

/* The sum of the squares of a vector. */
DEVICE float squares(const float y[WIDTH]) {
    float even = y[0] * y[0], odd = y[1] * y[1];
#pragma unroll
    for (int n = 2; n < WIDTH; n += 2) {
        even = fused_multiply_add(y[n], y[n], even);
        odd = fused_multiply_add(y[n + 1], y[n + 1], odd);
    }
    return even + odd;
}

/* x to n: the factor of every vector is in `factor`. */
DEVICE void normalize(const wan_attn_cuda_rope_args &args, const float factor[VECTORS],
                      float y[VECTORS][WIDTH]) {
#pragma unroll
    for (int k = 0; k < VECTORS; k++)
#pragma unroll
        for (int n = 0; n < WIDTH; n++)
            y[k][n] *= factor[k];
    if (args.rounds_n)
        round_all(y);
}

/* n to y. */
DEVICE void weigh(const wan_attn_cuda_rope_args &args, const part &mine, float y[VECTORS][WIDTH]) {
    const int size = args.weight_dtype == IS_F32 ? 4 : 2;
    const int step = args.num_groups * args.weight_head_stride * size;
    const char *at = (const char *)args.weight +
                     (i64)(mine.group * args.weight_head_stride + mine.slot * WIDTH) * size;
#pragma unroll
    for (int k = 0; k < VECTORS; k++, at += step) {
        if (!has_head(args, mine, k))
            continue;
        u32 words[WIDTH];
        float weight[WIDTH];
        load_global_b32x4(words, at);
        if (args.weight_dtype == IS_F32) {
            load_global_b32x4(words + 4, at + 16);
#pragma unroll
            for (int n = 0; n < WIDTH; n++)
                weight[n] = float_from_bits(words[n]);
        } else {
            unpack(weight, words, args.weight_dtype);
        }
#pragma unroll
        for (int n = 0; n < WIDTH; n++)
            y[k][n] *= weight[n];
    }
    if (args.rounds_y)
        round_all(y);
}

/* y turned, and stored. */
DEVICE void rotate_all(const wan_attn_cuda_rope_args &args, const part &mine,
                       float y[VECTORS][WIDTH]) {
#pragma unroll
    for (int n = 0; n < WIDTH / 2; n++) {
        const angle by = staged_angle((u32)mine.slot * (WIDTH / 2) + (u32)n);
        if (args.out_dtype == IS_F32) {
#pragma unroll
            for (int k = 0; k < VECTORS; k++)
                rotate_exactly(&y[k][2 * n], by);
        } else {
#pragma unroll
            for (int k = 0; k < VECTORS; k++)
                rotate(&y[k][2 * n], by);
        }
    }
}

DEVICE void store_all(const wan_attn_cuda_rope_args &args, const rope_token &token,
                      const part &mine, const float y[VECTORS][WIDTH]) {
    const int size = args.out_dtype == IS_F32 ? 4 : 2;
    const i64 step = args.num_groups * args.out.head_stride * size;
    char *at = (char *)args.out.data + first_byte(args.out, token, mine, size);
#pragma unroll
    for (int k = 0; k < VECTORS; k++, at += step) {
        if (!has_head(args, mine, k))
            continue;
        u32 words[WIDTH];
        if (args.out_dtype == IS_F32) {
#pragma unroll
            for (int n = 0; n < WIDTH; n++)
                words[n] = bits_from_float(y[k][n]);
            store_global_b32x4(at + 16, words + 4);
        } else {
            pack(words, y[k], args.out_dtype);
        }
        store_global_b32x4(at, words);
    }
}

WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, 1, wan_attn_cuda_rope_args, args) {
    const rope_token token = token_of(args);
    const part mine = part_of(args);
    float y[VECTORS][WIDTH], sum[VECTORS], factor[VECTORS];
    load_all(args, token, mine, y);
    stage_angles(args, token);
    if (args.has_norm) {
#pragma unroll
        for (int k = 0; k < VECTORS; k++)
            sum[k] = squares(y[k]);
        if (!args.is_per_head)
            stage_sum(lanes_sum((sum[0] + sum[1]) + (sum[2] + sum[3]), 32));
    }
    block_barrier();
    if (args.has_norm) {
        float for_all = args.is_per_head ? 0.0f : norm_factor(args, staged_sum(args));
#pragma unroll
        for (int k = 0; k < VECTORS; k++) {
            factor[k] = for_all;
            if (args.is_per_head) {
                const float_pair of_head = {lanes_sum(sum[k], args.slots), 0.0f};
                factor[k] = norm_factor(args, of_head);
            }
        }
        normalize(args, factor, y);
        if (args.weight)
            weigh(args, mine, y);
    }
    if (token.is_rotated)
        rotate_all(args, mine, y);
    store_all(args, token, mine, y);
}
