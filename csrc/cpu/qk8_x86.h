/* SPDX-License-Identifier: Apache-2.0
 * qk8_x86.h - wan_attn_qk8_quantise with AVX2: the same bits, as int16. Knows no kernel.
 */
#ifndef WAN_ATTN_CPU_QK8_X86_H
#define WAN_ATTN_CPU_QK8_X86_H

#include <immintrin.h>
#include <math.h>

#include "cpu/half.h"
#include "cpu/qk8.h"

/* x[8], negated where the eight lowest bits say so. */
static inline __m256 negated(__m256 x, uint32_t bits) {
    __m256i to_the_top = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    __m256i moved = _mm256_sllv_epi32(_mm256_set1_epi32((int32_t)bits), to_the_top);
    return _mm256_xor_ps(x, _mm256_and_ps(_mm256_castsi256_ps(moved), _mm256_set1_ps(-0.0f)));
}

/* Pairs (a, b) of lanes that change places in `swapped` become (a + b, a - b), which is a + (-b);
 * bit l of `second`: lane l is b of its pair. */
static inline __m256 butterfly(__m256 x, __m256 swapped, uint32_t second) {
    return _mm256_add_ps(swapped, negated(x, second));
}

/* The steps of half = 1, 2 and 4. */
static inline __m256 rotated_lanes(__m256 x) {
    x = butterfly(x, _mm256_permute_ps(x, 0xb1), 0xaa);
    x = butterfly(x, _mm256_permute_ps(x, 0x4e), 0xcc);
    return butterfly(x, _mm256_permute2f128_ps(x, x, 0x01), 0xf0);
}

/* x[depth], zeros from head_dim on, depth a multiple of 8: rotated in place; its largest
 * magnitude, as bits: they are ordered as magnitudes are, NaN above all. */
static inline uint32_t rotate_eights(float *x, int64_t depth) {
    for (int64_t d = 0; d < depth; d += 8) {
        __m256 of_lanes = negated(_mm256_loadu_ps(x + d), wan_attn_qk8_signs(d));
        _mm256_storeu_ps(x + d, rotated_lanes(of_lanes));
    }
    for (int64_t half = 8; half < depth; half *= 2)
        for (int64_t first = 0; first < depth; first += 2 * half)
            for (int64_t d = first; d < first + half; d += 8) {
                __m256 a = _mm256_loadu_ps(x + d), b = _mm256_loadu_ps(x + d + half);
                _mm256_storeu_ps(x + d, _mm256_add_ps(a, b));
                _mm256_storeu_ps(x + d + half, _mm256_sub_ps(a, b));
            }
    __m256i top = _mm256_setzero_si256(), magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t d = 0; d < depth; d += 8) {
        __m256i bits = _mm256_loadu_si256((const __m256i *)(x + d));
        top = _mm256_max_epi32(top, _mm256_and_si256(bits, magnitude));
    }
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(half);
}

/* x[head_dim] -> to[depth rounded up to a pair]; returns the row's step. x is overwritten and has
 * room for depth numbers. */
static inline float quantise_row(float *x, int64_t head_dim, int16_t *to) {
    const int64_t depth = wan_attn_qk8_depth(head_dim);
    if (depth < 8) {
        int8_t integers[8] = {0};
        float step = wan_attn_qk8_quantise(x, head_dim, integers);
        for (int64_t d = 0; d < 8; d++)
            to[d] = integers[d]; /* NOLINT(bugprone-signed-char-misuse,cert-str34-c): a number */
        return step;
    }
    memset(x + head_dim, 0, (size_t)(depth - head_dim) * sizeof(float));
    float step, inverse = wan_attn_qk8_inverse(rotate_eights(x, depth), &step);
    if (inverse == 0.0f) {
        memset(to, 0, (size_t)depth * sizeof(int16_t));
        return step;
    }
    for (int64_t d = 0; d < depth; d += 8) { /* to nearest even, as every conversion here */
        __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + d), _mm256_set1_ps(inverse));
        __m256i integers = _mm256_cvtps_epi32(scaled);
        _mm_storeu_si128((__m128i *)(to + d),
                         _mm_packs_epi32(_mm256_castsi256_si128(integers),
                                         _mm256_extracti128_si256(integers, 1)));
    }
    return step;
}

#endif /* WAN_ATTN_CPU_QK8_X86_H */
