/* SPDX-License-Identifier: Apache-2.0
 * vector_neon.h - the vectors of sdpa_tile.inc as NEON registers. Knows no kernel.
 */
#ifndef WAN_ATTN_CPU_VECTOR_NEON_H
#define WAN_ATTN_CPU_VECTOR_NEON_H

#include <arm_neon.h>

#define LANES 4
#define VEC float32x4_t
#define MASK uint32x4_t
#define LOAD(p) vld1q_f32(p)
#define STORE(p, x) vst1q_f32(p, x)
#define SET1(x) vdupq_n_f32(x)
#define ADD(a, b) vaddq_f32(a, b)
#define SUB(a, b) vsubq_f32(a, b)
#define MUL(a, b) vmulq_f32(a, b)
#define MAX(a, b) vmaxnmq_f32(a, b) /* the number, where the other is NaN */
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#define SELECT(mask, a, b) vbslq_f32(mask, a, b)
#define BETWEEN(low, x, high) vandq_u32(vcleq_f32(low, x), vcltq_f32(x, high))

#if defined(__GNUC__)
#define KEEP(x) __asm__("" : "+w"(x))
#else
#define KEEP(x) (void)(x)
#endif

/* 2^x for x <= 0: 2^n times a polynomial in x - n that is exactly 1 at 0; relative error 9e-8.
 * Below the normal numbers the result is 0; NaN stays NaN. */
static inline float32x4_t exp2_degree5(float32x4_t x) {
    float32x4_t n = vrndnq_f32(x), f = vsubq_f32(x, n);
    float32x4_t p = vfmaq_f32(vdupq_n_f32(0x1.3ce8aep-7f), f, vdupq_n_f32(0x1.5bda56p-10f));
    p = vfmaq_f32(vdupq_n_f32(0x1.c6b6d8p-5f), f, p);
    p = vfmaq_f32(vdupq_n_f32(0x1.ebf9c2p-3f), f, p);
    p = vfmaq_f32(vdupq_n_f32(0x1.62e42ap-1f), f, p);
    p = vfmaq_f32(vdupq_n_f32(1.0f), f, p);
    int32x4_t power = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    uint32x4_t bits = vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(p), power));
    return vreinterpretq_f32_u32(vbicq_u32(bits, vcltq_f32(x, vdupq_n_f32(-126.0f))));
}

#endif /* WAN_ATTN_CPU_VECTOR_NEON_H */
