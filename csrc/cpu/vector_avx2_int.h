/* SPDX-License-Identifier: Apache-2.0
 * vector_avx2_int.h - integers in the vectors of vector_avx2.h, for sdpa_qk8.inc and
 * sdpa_qk8_values.inc: pairs of int16.
 */
#ifndef WAN_ATTN_CPU_VECTOR_AVX2_INT_H
#define WAN_ATTN_CPU_VECTOR_AVX2_INT_H

/* c += a * b of int16 pairs in each 32-bit lane; the second one has b in memory. They are two
 * instructions that a compiler cannot part: it would copy accumulators, and spill some. */
#if defined(__GNUC__)
#define ADD_PRODUCTS_FROM(c, a, b, where)                                                          \
    {                                                                                              \
        VEC product;                                                                               \
        __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"                                         \
                : "+x"(c), "=&x"(product)                                                          \
                : "x"(a), where(b));                                                               \
    }
#define ADD_PRODUCTS(c, a, b) ADD_PRODUCTS_FROM(c, a, b, "x")
#define ADD_PRODUCTS_AT(c, a, p) ADD_PRODUCTS_FROM(c, a, *(const __m256_u *)(p), "m")
#else
#define ADD_PRODUCTS(c, a, b)                                                                      \
    (c) = ADD_INTS(                                                                                \
        c, _mm256_castsi256_ps(_mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b))))
#define ADD_PRODUCTS_AT(c, a, p) ADD_PRODUCTS(c, a, LOAD(p))
#endif

#define FLOATS(c) _mm256_cvtepi32_ps(_mm256_castps_si256(c))
#define INTEGERS(x) _mm256_castsi256_ps(_mm256_cvtps_epi32(x))
#define ADD_INTS(a, b)                                                                             \
    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)))
#define PAIR_INTS(even, odd)                                                                       \
    _mm256_or_ps(even, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(odd), 16)))

#endif /* WAN_ATTN_CPU_VECTOR_AVX2_INT_H */
