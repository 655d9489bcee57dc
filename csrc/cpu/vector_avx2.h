/* SPDX-License-Identifier: Apache-2.0
 * vector_avx2.h - the vectors of sdpa_tile.inc as AVX2 registers (with FMA). Knows no kernel.
 */
#ifndef WAN_ATTN_CPU_VECTOR_AVX2_H
#define WAN_ATTN_CPU_VECTOR_AVX2_H

#include <immintrin.h>

#define LANES 8
#define VEC __m256
#define MASK __m256
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, x) _mm256_storeu_ps(p, x)
#define SET1(x) _mm256_set1_ps(x)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUB(a, b) _mm256_sub_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define MAX(a, b) _mm256_max_ps(a, b)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SELECT(mask, a, b) _mm256_blendv_ps(b, a, mask)
#define BETWEEN(low, x, high)                                                                      \
    _mm256_and_ps(_mm256_cmp_ps(low, x, _CMP_LE_OQ), _mm256_cmp_ps(x, high, _CMP_LT_OQ))

#if defined(__GNUC__)
#define KEEP(x) __asm__("" : "+x"(x))
#else
#define KEEP(x) (void)(x)
#endif

/* 2^x for x <= 0: 2^n times a polynomial in x - n that is exactly 1 at 0; relative error 9e-8.
 * Adding 1.5 * 2^23 + 127 rounds x to the integer n and leaves n + 127, the exponent of 2^n, in the
 * low bits. Below the normal numbers the result is 0. NaN stays NaN: p is, whatever its bits make
 * of 2^n. */
static inline __m256 exp2_degree5(__m256 x) {
    const __m256 ROUND = _mm256_set1_ps(0x1.8p23f + 127.0f);
    __m256 shifted = _mm256_add_ps(x, ROUND);
    __m256 f = _mm256_sub_ps(x, _mm256_sub_ps(shifted, ROUND));
    __m256 p = _mm256_fmadd_ps(f, _mm256_set1_ps(0x1.5bda56p-10f), _mm256_set1_ps(0x1.3ce8aep-7f));
    p = _mm256_fmadd_ps(f, p, _mm256_set1_ps(0x1.c6b6d8p-5f));
    p = _mm256_fmadd_ps(f, p, _mm256_set1_ps(0x1.ebf9c2p-3f));
    p = _mm256_fmadd_ps(f, p, _mm256_set1_ps(0x1.62e42ap-1f));
    p = _mm256_fmadd_ps(f, p, _mm256_set1_ps(1.0f));
    __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(power));
    return _mm256_and_ps(p, _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
}

#endif /* WAN_ATTN_CPU_VECTOR_AVX2_H */
