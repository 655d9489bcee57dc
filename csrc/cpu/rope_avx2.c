/* SPDX-License-Identifier: Apache-2.0
 * rope_avx2.c - rms_norm_rope with AVX2, FMA and F16C. The body: rope_token.inc.
 *
 * Numerics: float64 products and sums are separate instructions, because a fused one would round
 * once less than the contract says. Measured: 13.6 to 18.3 times stock's steps (docs/measured.md).
 */
#include "core/util.h"
#include "cpu/rope.h"
#include "cpu/target.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

TARGET_BEGIN("avx2,fma,f16c")

#include "cpu/rope_x86.h"

/* Two pairs: (a, b, ...) times (cos, sin, ...). */
static inline __m128 rotate_pairs(__m128 y, const double *angles) {
    __m256d wide = _mm256_cvtps_pd(y), angle = _mm256_loadu_pd(angles);
    __m256d cosines = _mm256_movedup_pd(angle), sines = _mm256_permute_pd(angle, 0xf);
    __m256d swapped = _mm256_permute_pd(wide, 0x5);
    return _mm256_cvtpd_ps(
        _mm256_addsub_pd(_mm256_mul_pd(wide, cosines), _mm256_mul_pd(swapped, sines)));
}

static inline units rotate_units(units y, const double *angles) {
    return _mm256_set_m128(rotate_pairs(_mm256_extractf128_ps(y, 1), angles + 4),
                           rotate_pairs(_mm256_castps256_ps128(y), angles));
}

#define ROW rms_norm_rope_avx2
#include "cpu/rope_token.inc"
TARGET_END

#endif /* x86-64 */
