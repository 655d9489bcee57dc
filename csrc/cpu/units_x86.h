/* SPDX-License-Identifier: Apache-2.0
 * units_x86.h - eight numbers at a time between the caller's rows (any dtype, any tail) and vectors
 * of 32-bit lanes, for the x86 rows: what packing and unpacking are made of. Needs AVX2 and F16C.
 * Knows no kernel.
 */
#ifndef WAN_ATTN_CPU_UNITS_X86_H
#define WAN_ATTN_CPU_UNITS_X86_H

#include <immintrin.h>

#include "cpu/half.h"

enum { UNIT_LANES = 8 };

#if defined(__GNUC__) /* gcc drops calls of functions that do nothing but __builtin_prefetch */
#define PREFETCH_READ(p) __asm__ volatile("prefetcht0 %0" ::"m"(*(const char *)(p)))
#define PREFETCH_WRITE(p) __asm__ volatile("prefetchw %0" ::"m"(*(const char *)(p)))
#else
#define PREFETCH_READ(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
#define PREFETCH_WRITE(p) _m_prefetchw((void *)(p))
#endif

typedef __m256 units;

static inline units zero_units(void) { return _mm256_setzero_ps(); }

static inline units load_eight(const void *from, wan_attn_dtype dtype) {
    if (dtype == WAN_ATTN_F32)
        return _mm256_loadu_ps((const float *)from);
    __m128i half = _mm_loadu_si128((const __m128i *)from);
    if (dtype == WAN_ATTN_F16)
        return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* Elements [first, first + 8) of a row of `length` as floats, zeros behind its end, which is not
 * read. */
static inline units load_floats(const void *row, wan_attn_dtype dtype, int64_t first,
                                int64_t length) {
    if (first + 8 <= length)
        return load_eight(wan_attn_element(row, dtype, first), dtype);
    float tail[8] = {0}; /* all of it zero in any dtype */
    if (first < length)
        memcpy(tail, wan_attn_element(row, dtype, first),
               (size_t)(length - first) * (size_t)wan_attn_dtype_size(dtype));
    return load_eight(tail, dtype);
}

static inline __m128i bf16_of_floats(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet_nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    __m256i top = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet_nan), is_nan));
    top = _mm256_srli_epi32(top, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
}

static inline void store_eight(void *to, wan_attn_dtype dtype, __m256 x) {
    if (dtype == WAN_ATTN_F32)
        _mm256_storeu_ps((float *)to, x);
    else if (dtype == WAN_ATTN_F16)
        _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    else
        _mm_storeu_si128((__m128i *)to, bf16_of_floats(x));
}

/* The inverse of load_floats: nothing behind the row's end is written. */
static inline void store_floats(void *row, wan_attn_dtype dtype, int64_t first, int64_t length,
                                units x) {
    if (first + 8 <= length) {
        store_eight(wan_attn_element(row, dtype, first), dtype, x);
    } else if (first < length) {
        float tail[8];
        store_eight(tail, dtype, x);
        memcpy(wan_attn_element(row, dtype, first), tail,
               (size_t)(length - first) * (size_t)wan_attn_dtype_size(dtype));
    }
}

static inline void store_units(float *to, units x) { _mm256_storeu_ps(to, x); }
static inline units load_units(const float *from) { return _mm256_loadu_ps(from); }
static inline units add_units(units a, units b) { return _mm256_add_ps(a, b); }
static inline units multiply_units(units a, units b) { return _mm256_mul_ps(a, b); }
static inline units divide_units(units a, units b) { return _mm256_div_ps(a, b); }
static inline units set_units(float x) { return _mm256_set1_ps(x); }

/* Pairs of bfloat16, for rows whose unit is one. Sixteen neighbours as they lie in memory: */
static inline units load_pairs(const void *from) { return _mm256_loadu_ps((const float *)from); }

/* Sixteen neighbours, rounded from floats. */
static inline units pair_neighbours(units low, units high) {
    __m256i x = _mm256_castsi128_si256(bf16_of_floats(low));
    return _mm256_castsi256_ps(_mm256_inserti128_si256(x, bf16_of_floats(high), 1));
}

/* Lane by lane (even[i], odd[i]), from floats that are bfloat16 numbers. */
static inline units pair_lanes(units even, units odd) {
    __m256i low = _mm256_srli_epi32(_mm256_castps_si256(even), 16);
    return _mm256_castsi256_ps(_mm256_blend_epi16(low, _mm256_castps_si256(odd), 0xaa));
}

/* Lane by lane (even[i], odd[i]), rounded from floats. */
static inline units round_pairs(units even, units odd) {
    __m128i low = bf16_of_floats(even), high = bf16_of_floats(odd);
    __m256i x = _mm256_castsi128_si256(_mm_unpacklo_epi16(low, high));
    return _mm256_castsi256_ps(_mm256_inserti128_si256(x, _mm_unpackhi_epi16(low, high), 1));
}

/* Lane by lane, as int16: (even[i], odd[i]), rounded from floats. */
static inline units pair_integers(units even, units odd) {
    __m256i high = _mm256_slli_epi32(_mm256_cvtps_epi32(odd), 16);
    return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_cvtps_epi32(even), high, 0xaa));
}

static inline units larger_magnitude(units largest, units x) {
    return _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), largest);
}

/* 0 while everything added so far is finite, NaN afterwards. */
static inline units add_taint(units taint, units x) {
    return _mm256_fmadd_ps(x, _mm256_setzero_ps(), taint);
}
static inline int is_tainted(units taint) {
    return _mm256_movemask_ps(_mm256_cmp_ps(taint, taint, _CMP_UNORD_Q)) != 0;
}

/* x[i] lane j <-> x[j] lane i. */
static inline void transpose_units(units x[8]) {
    __m256 pair[8], quad[8];
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    }
}

#endif /* WAN_ATTN_CPU_UNITS_X86_H */
