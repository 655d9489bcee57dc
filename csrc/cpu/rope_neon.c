/* SPDX-License-Identifier: Apache-2.0
 * rope_neon.c - rms_norm_rope with the vectors that every 64-bit Arm has. The body: rope_token.inc.
 *
 * Numerics: float64 products and sums are separate instructions, because a fused one would round
 * once less than the contract says. Measured: nothing yet.
 */
#include "core/util.h"
#include "cpu/rope.h"

#if defined(__aarch64__) || defined(_M_ARM64)

#include <arm_neon.h>

#include "cpu/units_neon.h"

static inline units square_add(units sum, units x) { return vfmaq_f32(sum, x, x); }

static inline units round_units(units x, wan_attn_dtype dtype) {
    if (dtype == WAN_ATTN_F32)
        return x;
    if (dtype == WAN_ATTN_F16)
        return vcvt_f32_f16(vcvt_f16_f32(x));
    return vreinterpretq_f32_u32(vshll_n_u16(bf16_of_floats(x), 16));
}

/* One pair: (a, b) times (cos, sin). */
static inline float64x2_t rotate_pair(float64x2_t y, const double *angles) {
    const uint64x2_t MINUS_FIRST = vcombine_u64(vcreate_u64(1ull << 63), vcreate_u64(0));
    float64x2_t product = vmulq_f64(y, vdupq_n_f64(angles[0]));
    float64x2_t other = vmulq_f64(vextq_f64(y, y, 1), vdupq_n_f64(angles[1]));
    other = vreinterpretq_f64_u64(veorq_u64(vreinterpretq_u64_f64(other), MINUS_FIRST));
    return vaddq_f64(product, other);
}

static inline units rotate_units(units y, const double *angles) {
    float64x2_t low = rotate_pair(vcvt_f64_f32(vget_low_f32(y)), angles);
    float64x2_t high = rotate_pair(vcvt_high_f64_f32(y), angles + 2);
    return vcvt_high_f32_f64(vcvt_f32_f64(low), high);
}

#define ROW rms_norm_rope_neon
#include "cpu/rope_token.inc"

#endif /* 64-bit Arm */
