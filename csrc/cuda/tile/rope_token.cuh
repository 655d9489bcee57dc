/* SPDX-License-Identifier: Apache-2.0
 * rope_token.cuh - what the kernels of rms_norm_rope share: which angles a token turns by, the
 * rotation, and the factor of the norm. A block works on one token.
 *
 * The angles go through shared memory: each is read and split into two floats once for all heads.
 * This is the only float64 arithmetic, 8 instructions for a pair of a token; it is free on GeForce,
 * too, because other instructions run beside it.
 */
#ifndef WAN_ATTN_CUDA_TILE_ROPE_TOKEN_H
#define WAN_ATTN_CUDA_TILE_ROPE_TOKEN_H

#include "cuda/args_rope.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/float_pair.cuh"

enum { IS_F32 = 0, IS_F16 = 1, IS_BFLOAT16 = 2 }; /* wan_attn_dtype */
enum { SUMS_AT = 16 * (128 + 16) };               /* in shared memory: the sum of each warp */

typedef struct rope_token {
    int sample, row;
    bool is_rotated;
    i64 frame, line, column; /* elements before the table's row for each axis */
} rope_token;

typedef struct angle {
    float_pair cosine, sine;
} angle;

/* The size of an axis of the sample. */
DEVICE int grid_size(const wan_attn_cuda_rope_args &args, int sample, int axis) {
    if (!args.grid_sizes)
        return args.grids[sample][axis];
    i64 at = sample * args.grid_batch_stride + axis * args.grid_axis_stride;
    i64 size = args.grid_is_i64 ? load_global_i64((const i64 *)args.grid_sizes + at)
                                : load_global_i32((const int *)args.grid_sizes + at);
    return size < 0 ? 0 : size < args.positions ? (int)size : args.positions;
}

/* Where a token of a grid stands in it. */
DEVICE void place_in_grid(const wan_attn_cuda_rope_args &args, rope_token *token) {
    u32 t = (u32)args.seqlen_offset + (u32)token->row; /* below 2^31 */
    u32 frames = (u32)grid_size(args, token->sample, 0);
    u32 height = (u32)grid_size(args, token->sample, 1);
    u32 width = (u32)grid_size(args, token->sample, 2);
    i64 plane = (i64)height * width;
    token->is_rotated = t < frames * plane;
    if (!token->is_rotated)
        return;
    u32 frame = t < plane ? 0 : t / (u32)plane;
    u32 rest = frame ? t - frame * (u32)plane : t;
    u32 line = rest / width;
    token->frame = (i64)frame * args.table.row_stride;
    token->line = (i64)line * args.table.row_stride;
    token->column = (i64)(rest - line * width) * args.table.row_stride;
}

/* This block's token. */
DEVICE rope_token token_of(const wan_attn_cuda_rope_args &args) {
    rope_token token;
    u32 number = (u32)block_index();
    token.sample = (int)(number / (u32)args.seqlen);
    token.row = (int)(number - (u32)token.sample * (u32)args.seqlen);
    token.is_rotated = args.table.data != 0;
    token.frame = token.sample * args.table.batch_stride + token.row * args.table.row_stride;
    token.line = token.column = token.frame;
    if (args.has_grid)
        place_in_grid(args, &token);
    return token;
}

/* Element (0, 0) of the token in x or out. */
DEVICE i64 offset_of(const wan_attn_cuda_view &view, const rope_token &token) {
    return token.sample * view.batch_stride + token.row * view.row_stride;
}

DEVICE float_pair load_angle(const wan_attn_cuda_rope_args &args, i64 at) {
    if (args.table_is_f64)
        return pair_of(load_global_f64((const char *)args.table.data + at * 8));
    float_pair pair = {load_global_f32((const char *)args.table.data + at * 4), 0.0f};
    return pair;
}

/* cos and sin of a pair of the token. */
DEVICE angle find_angle(const wan_attn_cuda_rope_args &args, const rope_token &token, int head,
                        u32 pair) {
    u32 line_pairs = (u32)args.head_dim / 6, frame_pairs = (u32)args.head_dim / 2 - 2 * line_pairs;
    i64 row = pair < frame_pairs                ? token.frame
              : pair < frame_pairs + line_pairs ? token.line
                                                : token.column;
    i64 at = row + head * args.table.head_stride + 2 * pair;
    angle found;
    found.cosine = load_angle(args, at);
    found.sine = load_angle(args, at + 1);
    return found;
}

/* Where a pair's angle lies in shared memory. A free place behind every eight: neither threads that
 * write neighbours nor threads that read every fourth meet in one bank. */
DEVICE u32 place_of_angle(u32 pair) { return shared_base() + 16 * (pair + pair / 8); }

/* All angles of the token, to shared memory; a barrier must follow. */
DEVICE void stage_angles(const wan_attn_cuda_rope_args &args, const rope_token &token) {
    if (!token.is_rotated || args.table.head_stride != 0)
        return;
#pragma unroll 1
    for (u32 pair = (u32)thread_index(); pair < (u32)args.head_dim / 2;
         pair += (u32)args.num_threads) {
        angle found = find_angle(args, token, 0, pair);
        u32 words[4] = {bits_from_float(found.cosine.high), bits_from_float(found.sine.high),
                        bits_from_float(found.cosine.rest), bits_from_float(found.sine.rest)};
        store_shared_b32x4(place_of_angle(pair), words);
    }
}

DEVICE angle staged_angle(u32 pair) {
    u32 words[4];
    load_shared_b32x4(words, place_of_angle(pair));
    angle found = {{float_from_bits(words[0]), float_from_bits(words[2])},
                   {float_from_bits(words[1]), float_from_bits(words[3])}};
    return found;
}

/* (y[0] + i y[1]) * (cos + i sin), to be rounded to 16 bits: in float32. */
DEVICE void rotate(float y[2], const angle &by) {
    float real = fused_multiply_add(y[0], by.cosine.high, -(y[1] * by.sine.high));
    y[1] = fused_multiply_add(y[0], by.sine.high, y[1] * by.cosine.high);
    y[0] = real;
}

/* The same for float32, rounded as from float64 but for few. */
DEVICE void rotate_exactly(float y[2], const angle &by) {
    const float_pair minus_cosine = {-by.cosine.high, -by.cosine.rest};
    float real = difference_of_products(y[0], by.cosine, y[1], by.sine);
    y[1] = difference_of_products(y[0], by.sine, y[1], minus_cosine);
    y[0] = real;
}

/* The sum over 32 lanes, or over as many neighbours (a power of two). */
DEVICE float lanes_sum(float x, int lanes) {
    for (int lane_mask = 1; lane_mask < lanes; lane_mask *= 2)
        x += shfl_xor(x, lane_mask);
    return x;
}

/* A warp's sum, to shared memory; a barrier must follow. */
DEVICE void stage_sum(float sum) {
    u32 thread = (u32)thread_index();
    if (thread % 32 == 0) {
        const u32 words[4] = {bits_from_float(sum), 0, 0, 0};
        store_shared_b32x4(shared_base() + SUMS_AT + thread / 2, words); /* 16 bytes a warp */
    }
}

/* The sum of all warps. */
DEVICE float_pair staged_sum(const wan_attn_cuda_rope_args &args) {
    float_pair sum = {0.0f, 0.0f};
#pragma unroll 1
    for (u32 thread = 0; thread < (u32)args.num_threads; thread += 32) {
        u32 words[4];
        load_shared_b32x4(words, shared_base() + SUMS_AT + thread / 2);
        const float_pair part = {float_from_bits(words[0]), 0.0f};
        sum = pair_sum(sum, part);
    }
    return sum;
}

/* 1 / sqrt(mean + eps), from the sum of the squares. */
DEVICE float norm_factor(const wan_attn_cuda_rope_args &args, float_pair sum) {
    const float_pair inverse_size = {args.inverse_size[0], args.inverse_size[1]};
    const float_pair eps = {args.eps[0], args.eps[1]};
    return pair_reciprocal_sqrt(pair_sum(pair_product(sum, inverse_size), eps));
}

#endif /* WAN_ATTN_CUDA_TILE_ROPE_TOKEN_H */
