/* SPDX-License-Identifier: Apache-2.0
 * vector_avx512.h - the vectors of sdpa_tile.inc as AVX-512 registers (F, BW, VL, DQ). Knows no
 * kernel.
 */
#ifndef WAN_ATTN_CPU_VECTOR_AVX512_H
#define WAN_ATTN_CPU_VECTOR_AVX512_H

#include <immintrin.h>

#define LANES 16
#define VEC __m512
#define MASK __mmask16
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, x) _mm512_storeu_ps(p, x)
#define SET1(x) _mm512_set1_ps(x)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define MAX(a, b) _mm512_max_ps(a, b)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SELECT(mask, a, b) _mm512_mask_blend_ps(mask, b, a)
#define BETWEEN(low, x, high)                                                                      \
    _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(low, x, _CMP_LE_OQ), x, high, _CMP_LT_OQ)

#if defined(__GNUC__)
#define KEEP(x) __asm__("" : "+v"(x))
#else
#define KEEP(x) (void)(x)
#endif

/* 2^n * p, and 0 below the normal numbers: subnormal weights would cost more than they weigh. NaN
 * stays. */
static inline __m512 scale_by_power(__m512 x, __m512 n, __m512 p) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p,
                                  n);
}

static inline __m512 nearest_integer(__m512 x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* 2^x for x <= 0: 2^n times a polynomial in x - n that is exactly 1 at 0; relative error 9e-8. */
static inline __m512 exp2_degree5(__m512 x) {
    __m512 n = nearest_integer(x), f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0x1.5bda56p-10f), _mm512_set1_ps(0x1.3ce8aep-7f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0x1.c6b6d8p-5f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0x1.ebf9c2p-3f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0x1.62e42ap-1f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(1.0f));
    return scale_by_power(x, n, p);
}

#endif /* WAN_ATTN_CPU_VECTOR_AVX512_H */
