/* SPDX-License-Identifier: Apache-2.0
 * qk8.cuh - the passes that make q and k INT8 for rows of 8-bit scores. What they compute, bit by
 * bit: cpu/qk8.h, whose words are used here. K is read twice (mean, integers), Q once, each number
 * by one lane; against an attention over some thousand keys that is little.
 *
 * Four kernels, by PACK_STEP: 1 sums 64 keys, 2 makes of a head's sums its mean, 3 quantises K,
 * 4 quantises Q. One warp works on one block of keys, or on one row; in step 2 a thread has one
 * channel. Nothing is shared between warps. A lane has head_dim / 32 neighbouring channels of a
 * row, so that the first steps of the rotation stay in its registers; the others are shuffles.
 * Numerics: every operation is rounded by itself and in the defined order, so that the integers are
 * those of the CPU's rows. Sums of q * mean, for lse alone, are float32.
 */
#include "cuda/args_qk8.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/work.cuh"

enum { KEYS = WAN_ATTN_CUDA_QK8_KEYS };

/* Below it, a row's largest number makes the row zeros: 2^-100. */
DEVICE float smallest_largest() { return float_from_bits((127u - 100u) << 23); }

/* One of the samples' heads. */
typedef struct head_place {
    int sample, head;
    int used; /* real rows; 0 as well where the grid has a warp too many */
    i64 at;   /* the head's first element */
} head_place;

/* number: over [batch][heads]. */
DEVICE head_place find_head(const wan_attn_cuda_qk8_args &args, int number) {
    head_place place;
    place.sample = number / args.heads;
    place.head = number % args.heads;
    place.used = place.sample < args.batch ? length_at(args.seqused, place.sample, args.seqlen) : 0;
    place.at = place.sample * args.from.batch_stride + place.head * args.from.head_stride;
    return place;
}

/* This lane's channels of a row. */
template <int PER_LANE>
DEVICE void load_row(float x[PER_LANE], const wan_attn_cuda_qk8_args &args, const head_place &place,
                     int row) {
    i64 at = place.at + row * args.from.row_stride + thread_index() % 32 * PER_LANE;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        x[i] = load_element(args.from.data, args.from_dtype, at + i);
}

DEVICE bool is_finite(float x) { return (bits_from_float(x) & 0x7fffffffu) < 0x7f800000u; }

/* Warps run over [batch][heads][tiles]. */
template <int PER_LANE> DEVICE void sum_keys(const wan_attn_cuda_qk8_args &args) {
    int tile = warp_number() % args.tiles;
    head_place place = find_head(args, warp_number() / args.tiles);
    int end = smaller_int((tile + 1) * KEYS, place.used);
    if (tile * KEYS >= end)
        return;
    float sums[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        sums[i] = 0.0f;
#pragma unroll 4
    for (int row = tile * KEYS; row < end; row++) {
        float x[PER_LANE];
        load_row<PER_LANE>(x, args, place, row);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            sums[i] = rounded_sum(sums[i], is_finite(x[i]) ? x[i] : 0.0f);
    }
    float *to = args.sums + (i64)warp_number() * args.head_dim + thread_index() % 32 * PER_LANE;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        store_global_f32(to + i, sums[i]);
}

/* Threads run over [batch][heads][head_dim]. */
DEVICE void find_mean(const wan_attn_cuda_qk8_args &args) {
    int number = block_index() * NUM_THREADS + thread_index();
    int channel = number % args.head_dim, head = number / args.head_dim;
    head_place place = find_head(args, head);
    if (place.sample >= args.batch)
        return;
    const float *sums = args.sums + (i64)head * args.tiles * args.head_dim + channel;
    double sum = 0.0;
#pragma unroll 8
    for (int tile = 0; tile * KEYS < place.used; tile++)
        sum += (double)load_global_f32(sums + (i64)tile * args.head_dim);
    float mean = place.used ? (float)(sum / (double)place.used) : 0.0f;
    store_global_f32(args.mean + (i64)head * args.head_dim + channel,
                     is_finite(mean) ? mean : 0.0f);
}

/* Bit i: channel `first` + i changes its sign. first: a multiple of PER_LANE. */
DEVICE u32 signs_from(int first) {
    u32 word = first < 32   ? 0x6b080cadu
               : first < 64 ? 0x0648dfecu
               : first < 96 ? 0xcd1562feu
                            : 0xfd1bd94eu;
    return word >> first % 32;
}

/* The rotation, of a row that the warp has together. */
template <int PER_LANE> DEVICE void rotate(float x[PER_LANE]) {
    int lane = thread_index() % 32;
    u32 signs = signs_from(lane * PER_LANE);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        x[i] = float_from_bits(bits_from_float(x[i]) ^ (signs >> i & 1u) << 31);
#pragma unroll
    for (int half = 1; half < PER_LANE; half *= 2)
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (i % (2 * half) < half) {
                float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
#pragma unroll
    for (int lane_mask = 1; lane_mask < 32; lane_mask *= 2)
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            float other = shfl_xor(x[i], lane_mask);
            x[i] = lane & lane_mask ? other - x[i] : x[i] + other;
        }
}

/* x, rotated, becomes INT8: a byte each in `packed`. Returns the row's step. */
template <int PER_LANE> DEVICE float quantise(float x[PER_LANE], u32 *packed) {
    rotate<PER_LANE>(x);
    u32 top = 0; /* as bits: they are ordered as magnitudes are, NaN above all */
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        u32 size = bits_from_float(x[i]) & 0x7fffffffu;
        top = size > top ? size : top;
    }
#pragma unroll
    for (int lane_mask = 1; lane_mask < 32; lane_mask *= 2) {
        u32 other = shfl_xor_bits(top, lane_mask);
        top = other > top ? other : top;
    }
    float largest = float_from_bits(top);
    *packed = 0;
    if (!is_finite(largest))
        return float_from_bits(0x7fffffffu); /* NaN */
    if (largest < smallest_largest())
        return 0.0f;
    /* Adding it rounds to an integer, whose two's complement then is in the low bits. */
    const float round = 12582912.0f; /* 2^23 + 2^22 */
    float inverse = rounded_quotient(127.0f, largest);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        float shifted = rounded_sum(rounded_product(x[i], inverse), round);
        *packed |= (bits_from_float(shifted) & 255u) << 8 * i;
    }
    return rounded_quotient(largest, 127.0f);
}

/* This lane's integers. */
template <int PER_LANE> DEVICE void store_integers(void *to, u32 packed) {
    if (PER_LANE == 4)
        store_global_b32(to, packed);
    else
        store_global_b16(to, packed);
}

/* Warps run over [batch][heads][tiles][KEYS]. */
template <int PER_LANE> DEVICE void quantise_k(const wan_attn_cuda_qk8_args &args) {
    int key = warp_number() % KEYS, tile = warp_number() / KEYS % args.tiles;
    int number = warp_number() / KEYS / args.tiles, row = tile * KEYS + key;
    head_place place = find_head(args, number);
    if (tile * KEYS >= place.used)
        return;
    float step = 0.0f;
    u32 packed = 0;
    if (row < place.used) {
        const float *mean =
            args.mean + (i64)number * args.head_dim + thread_index() % 32 * PER_LANE;
        float x[PER_LANE];
        load_row<PER_LANE>(x, args, place, row);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            x[i] -= load_global_f32(mean + i);
        step = quantise<PER_LANE>(x, &packed);
    }
    char *to = (char *)args.to +
               ((i64)number * args.tiles + tile) * WAN_ATTN_CUDA_QK8_TILE_BYTES(32 * PER_LANE);
    int byte = thread_index() % 32 * PER_LANE, head_dim = 32 * PER_LANE;
    int chunk = WAN_ATTN_CUDA_QK8_CHUNK(head_dim, key, byte / 16);
    store_integers<PER_LANE>(to + key * head_dim + chunk * 16 + byte % 16, packed);
    if (thread_index() % 32 == 0)
        store_global_f32(to + KEYS * head_dim + WAN_ATTN_CUDA_QK8_PLACE(key) * 4, step);
}

/* scale * <q, mean> of this row; scaled first, so that no sum overflows that lse has room for. */
template <int PER_LANE>
DEVICE float product_with_mean(const wan_attn_cuda_qk8_args &args, const head_place &place,
                               const float q[PER_LANE]) {
    int heads_k = args.heads / args.heads_per_key_head;
    i64 head = (i64)place.sample * heads_k + place.head / args.heads_per_key_head;
    const float *mean = args.mean + head * args.head_dim + thread_index() % 32 * PER_LANE;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        sum = fused_multiply_add(args.scale * q[i], load_global_f32(mean + i), sum);
#pragma unroll
    for (int lane_mask = 1; lane_mask < 32; lane_mask *= 2)
        sum += shfl_xor(sum, lane_mask);
    return sum;
}

/* Warps run over [batch][heads][seqlen]. */
template <int PER_LANE> DEVICE void quantise_q(const wan_attn_cuda_qk8_args &args) {
    int row = warp_number() % args.seqlen;
    head_place place = find_head(args, warp_number() / args.seqlen);
    if (row >= place.used)
        return;
    float x[PER_LANE];
    load_row<PER_LANE>(x, args, place, row);
    float of_mean = args.scale != 0.0f ? product_with_mean<PER_LANE>(args, place, x) : 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        x[i] = args.is_negated ? -x[i] : x[i];
    u32 packed;
    float step = quantise<PER_LANE>(x, &packed);
    i64 byte = (i64)warp_number() * (32 * PER_LANE) + thread_index() % 32 * PER_LANE;
    store_integers<PER_LANE>((char *)args.to + byte, packed);
    /* Never 0, which times -inf, the score of a hidden key, is NaN; and finite, because 0 times
     * infinity is. NaN stays. */
    float factor = step * args.factor;
    if (factor < WAN_ATTN_CUDA_SMALLEST_SCALE)
        factor = WAN_ATTN_CUDA_SMALLEST_SCALE;
    const float largest = 1.7014118e38f; /* 2^127 */
    if (factor > largest)
        factor = largest;
    if (thread_index() % 32 == 0)
        store_global_f32x2(args.rows + 2 * (i64)warp_number(), factor, of_mean);
}

#if PACK_STEP == 1
#define RUN sum_keys
#elif PACK_STEP == 3
#define RUN quantise_k
#elif PACK_STEP == 4
#define RUN quantise_q
#endif

WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, 1, wan_attn_cuda_qk8_args, args) {
#if PACK_STEP == 2
    find_mean(args);
#else
    if (args.head_dim == 64)
        RUN<2>(args);
    else
        RUN<4>(args);
#endif
}
