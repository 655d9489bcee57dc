/* SPDX-License-Identifier: Apache-2.0
 * rope_any.cuh - rms_norm_rope (wan_attn.h) of any call: every head_dim, alignment, dtype and
 * number of heads, also tables with angles of their own for each head. Slower than rope.cuh: it
 * reads x twice, the second time mostly from the caches, and a pair at a time.
 *
 * A block has one token, a warp one head after the other, a lane every 32nd pair of columns. Each
 * thread writes what it alone has read, after the last time that it reads it: out may be x.
 * Numerics: as in rope.cuh.
 */
#include "cuda/tile/rope_token.cuh"

enum { NUM_WARPS = NUM_THREADS / 32 };

DEVICE float from_b16(u32 bits, int dtype) {
    if (dtype == IS_BFLOAT16)
        return float_from_bits(bits << 16);
    float low, high;
    unpack_f16(&low, &high, bits);
    return low;
}

DEVICE u32 to_b16(float x, int dtype) {
    return (dtype == IS_F16 ? pack_f16(x, 0.0f) : pack_bf16(x, 0.0f)) & 0xffffu;
}

/* Element `at` of x. */
DEVICE float load_x(const wan_attn_cuda_rope_args &args, i64 at) {
    const char *from = (const char *)args.x.data;
    if (args.x_dtype == IS_F32)
        return float_from_bits(load_own_b32(from + at * 4));
    return from_b16(load_own_b16(from + at * 2), args.x_dtype);
}

DEVICE float load_weight(const wan_attn_cuda_rope_args &args, i64 at) {
    const char *from = (const char *)args.weight;
    if (args.weight_dtype == IS_F32)
        return load_global_f32(from + at * 4);
    return from_b16(load_global_b16(from + at * 2), args.weight_dtype);
}

DEVICE void store_out(const wan_attn_cuda_rope_args &args, i64 at, float x) {
    char *to = (char *)args.out.data;
    if (args.out_dtype == IS_F32)
        store_global_f32(to + at * 4, x);
    else
        store_global_b16(to + at * 2, to_b16(x, args.out_dtype));
}

/* To x's dtype and back, if it is wanted. */
DEVICE float rounded_to_x(const wan_attn_cuda_rope_args &args, float x, int is_wanted) {
    return is_wanted && args.x_dtype != IS_F32 ? from_b16(to_b16(x, args.x_dtype), args.x_dtype)
                                               : x;
}

/* This lane's part of the sum of the squares of the head at `from`. */
DEVICE float squares_of_head(const wan_attn_cuda_rope_args &args, i64 from) {
    float sum = 0.0f;
    for (int d = thread_index() % 32; d < args.head_dim; d += 32) {
        float x = load_x(args, from + d);
        sum = fused_multiply_add(x, x, sum);
    }
    return sum;
}

/* Columns 2 * pair and, if there is one more, 2 * pair + 1 of a head, from x to out. */
DEVICE void run_pair(const wan_attn_cuda_rope_args &args, const rope_token &token, int head,
                     int pair, float factor, const angle &by) {
    const int count = 2 * pair + 1 < args.head_dim ? 2 : 1;
    i64 from = offset_of(args.x, token) + head * args.x.head_stride + 2 * pair;
    i64 to = offset_of(args.out, token) + head * args.out.head_stride + 2 * pair;
    float y[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < 2; n++) {
        if (n >= count)
            continue;
        y[n] = load_x(args, from + n);
        if (args.has_norm)
            y[n] = rounded_to_x(args, y[n] * factor, args.rounds_n);
        if (args.weight) {
            float weight = load_weight(args, (i64)head * args.weight_head_stride + 2 * pair + n);
            y[n] = rounded_to_x(args, y[n] * weight, args.rounds_y);
        }
    }
    if (token.is_rotated && args.out_dtype == IS_F32)
        rotate_exactly(y, by);
    else if (token.is_rotated)
        rotate(y, by);
#pragma unroll
    for (int n = 0; n < 2; n++)
        if (n < count)
            store_out(args, to + n, y[n]);
}

/* One head; the lanes of the warp stay together where they read shared memory. */
DEVICE void run_head(const wan_attn_cuda_rope_args &args, const rope_token &token, int head,
                     float factor) {
    const int num_pairs = (args.head_dim + 1) / 2;
    for (int first = 0; first < num_pairs; first += 32) {
        int pair = first + thread_index() % 32;
        bool is_there = pair < num_pairs;
        pair = is_there ? pair : num_pairs - 1;
        angle by = {{1.0f, 0.0f}, {0.0f, 0.0f}};
        if (token.is_rotated)
            by = args.table.head_stride != 0 ? find_angle(args, token, head, (u32)pair)
                                             : staged_angle((u32)pair);
        if (is_there)
            run_pair(args, token, head, pair, factor, by);
    }
}

WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, 1, wan_attn_cuda_rope_args, args) {
    const rope_token token = token_of(args);
    const int warp = thread_index() / 32;
    const i64 from = offset_of(args.x, token);
    float factor = 1.0f;
    stage_angles(args, token);
    if (args.has_norm && !args.is_per_head) {
        float sum = 0.0f;
        for (int head = warp; head < args.num_heads; head += NUM_WARPS)
            sum += squares_of_head(args, from + head * args.x.head_stride);
        stage_sum(lanes_sum(sum, 32));
    }
    block_barrier();
    if (args.has_norm && !args.is_per_head)
        factor = norm_factor(args, staged_sum(args));
    for (int head = warp; head < args.num_heads; head += NUM_WARPS) {
        if (args.has_norm && args.is_per_head) {
            float sum = squares_of_head(args, from + head * args.x.head_stride);
            const float_pair of_head = {lanes_sum(sum, 32), 0.0f};
            factor = norm_factor(args, of_head);
        }
        run_head(args, token, head, factor);
    }
}
