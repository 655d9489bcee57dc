/* SPDX-License-Identifier: Apache-2.0
 * rope_x86.h - what rope_token.inc asks of x86 beside units_x86.h, but for the rotation. Needs
 * AVX2, FMA and F16C. Knows no kernel.
 */
#ifndef WAN_ATTN_CPU_ROPE_X86_H
#define WAN_ATTN_CPU_ROPE_X86_H

#include "cpu/units_x86.h"

static inline units square_add(units sum, units x) { return _mm256_fmadd_ps(x, x, sum); }

static inline units round_units(units x, wan_attn_dtype dtype) {
    if (dtype == WAN_ATTN_F32)
        return x;
    if (dtype == WAN_ATTN_F16)
        return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    __m256i half = _mm256_cvtepu16_epi32(bf16_of_floats(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(half, 16));
}

#endif /* WAN_ATTN_CPU_ROPE_X86_H */
