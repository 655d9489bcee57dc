/* SPDX-License-Identifier: Apache-2.0
 * units_neon.h - four numbers at a time between the caller's rows (any dtype, any tail) and vectors
 * of 32-bit lanes, for the Arm row: what packing and unpacking are made of. Knows no kernel.
 */
#ifndef WAN_ATTN_CPU_UNITS_NEON_H
#define WAN_ATTN_CPU_UNITS_NEON_H

#include <arm_neon.h>

#include "cpu/half.h"

enum { UNIT_LANES = 4 };

#if defined(__GNUC__) /* gcc drops calls of functions that do nothing but __builtin_prefetch */
#define PREFETCH_READ(p) __asm__ volatile("prfm pldl2keep, [%0]" ::"r"(p))
#define PREFETCH_WRITE(p) __asm__ volatile("prfm pstl2keep, [%0]" ::"r"(p))
#else
#define PREFETCH_READ(p) __prefetch(p)
#define PREFETCH_WRITE(p) __prefetch(p)
#endif

typedef float32x4_t units;

static inline units zero_units(void) { return vdupq_n_f32(0.0f); }

static inline units load_four(const void *from, wan_attn_dtype dtype) {
    if (dtype == WAN_ATTN_F32)
        return vld1q_f32((const float *)from);
    uint16x4_t half = vld1_u16((const uint16_t *)from);
    if (dtype == WAN_ATTN_F16)
        return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

/* Elements [first, first + 4) of a row of `length` as floats, zeros behind its end, which is not
 * read. */
static inline units load_floats(const void *row, wan_attn_dtype dtype, int64_t first,
                                int64_t length) {
    if (first + 4 <= length)
        return load_four(wan_attn_element(row, dtype, first), dtype);
    float tail[4] = {0}; /* all of it zero in any dtype */
    if (first < length)
        memcpy(tail, wan_attn_element(row, dtype, first),
               (size_t)(length - first) * (size_t)wan_attn_dtype_size(dtype));
    return load_four(tail, dtype);
}

static inline uint16x4_t bf16_of_floats(float32x4_t x) {
    uint32x4_t bits = vreinterpretq_u32_f32(x);
    uint32x4_t is_odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(is_odd, vdupq_n_u32(0x7fff)));
    uint32x4_t quiet_nan = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet_nan), 16);
}

static inline void store_four(void *to, wan_attn_dtype dtype, float32x4_t x) {
    if (dtype == WAN_ATTN_F32)
        vst1q_f32((float *)to, x);
    else if (dtype == WAN_ATTN_F16)
        vst1_u16((uint16_t *)to, vreinterpret_u16_f16(vcvt_f16_f32(x)));
    else
        vst1_u16((uint16_t *)to, bf16_of_floats(x));
}

/* The inverse of load_floats: nothing behind the row's end is written. */
static inline void store_floats(void *row, wan_attn_dtype dtype, int64_t first, int64_t length,
                                units x) {
    if (first + 4 <= length) {
        store_four(wan_attn_element(row, dtype, first), dtype, x);
    } else if (first < length) {
        float tail[4];
        store_four(tail, dtype, x);
        memcpy(wan_attn_element(row, dtype, first), tail,
               (size_t)(length - first) * (size_t)wan_attn_dtype_size(dtype));
    }
}

static inline void store_units(float *to, units x) { vst1q_f32(to, x); }
static inline units load_units(const float *from) { return vld1q_f32(from); }
static inline units add_units(units a, units b) { return vaddq_f32(a, b); }
static inline units multiply_units(units a, units b) { return vmulq_f32(a, b); }
static inline units divide_units(units a, units b) { return vdivq_f32(a, b); }
static inline units set_units(float x) { return vdupq_n_f32(x); }

/* 0 while everything added so far is finite, NaN afterwards. */
static inline units add_taint(units taint, units x) {
    return vfmaq_f32(taint, x, vdupq_n_f32(0.0f));
}
static inline int is_tainted(units taint) { return vminvq_u32(vceqq_f32(taint, taint)) == 0; }

/* x[i] lane j <-> x[j] lane i. */
static inline void transpose_units(units x[4]) {
    float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(x[0], x[1]));
    float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(x[0], x[1]));
    float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(x[2], x[3]));
    float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(x[2], x[3]));
    x[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    x[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    x[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    x[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

#endif /* WAN_ATTN_CPU_UNITS_NEON_H */
