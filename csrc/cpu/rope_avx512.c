/* SPDX-License-Identifier: Apache-2.0
 * rope_avx512.c - rms_norm_rope with AVX-512 (F, BW, VL, DQ). The body: rope_token.inc.
 *
 * Numerics: float64 products and sums are separate instructions, because a fused one would round
 * once less than the contract says. Measured: 1.1 times rope_avx2 (AMD EPYC, docs/measured.md).
 */
#include "core/util.h"
#include "cpu/rope.h"
#include "cpu/target.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

#include "cpu/rope_x86.h"

/* Four pairs: (a, b, ...) times (cos, sin, ...). */
static inline units rotate_units(units y, const double *angles) {
    __m512d wide = _mm512_cvtps_pd(y), angle = _mm512_loadu_pd(angles);
    __m512d cosines = _mm512_movedup_pd(angle), sines = _mm512_permute_pd(angle, 0xff);
    __m512d product = _mm512_mul_pd(wide, cosines);
    __m512d other = _mm512_mul_pd(_mm512_permute_pd(wide, 0x55), sines);
    __m512d sum = _mm512_mask_sub_pd(_mm512_add_pd(product, other), 0x55, product, other);
    return _mm512_cvtpd_ps(sum);
}

#define ROW rms_norm_rope_avx512
#include "cpu/rope_token.inc"
TARGET_END

#endif /* x86-64 */
