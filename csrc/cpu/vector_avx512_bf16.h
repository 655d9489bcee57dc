/* SPDX-License-Identifier: Apache-2.0
 * vector_avx512_bf16.h - what rows with pairs of bfloat16 add to vector_avx512.h: needs
 * AVX512-BF16.
 */
#ifndef WAN_ATTN_CPU_VECTOR_AVX512_BF16_H
#define WAN_ATTN_CPU_VECTOR_AVX512_BF16_H

#include <immintrin.h>

/* Lane by lane (even[i], odd[i]), rounded. */
static inline __m512 BF16_PAIRS(__m512 even, __m512 odd) {
    const __m512i ORDER =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(ORDER, halves));
}

/* c + a * b, lane by lane of pairs. */
static inline __m512 DOT_PAIRS(__m512 a, __m512 b, __m512 c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}

#endif /* WAN_ATTN_CPU_VECTOR_AVX512_BF16_H */
