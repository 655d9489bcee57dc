/* SPDX-License-Identifier: Apache-2.0
 * half.h - float16 and bfloat16 to and from float, in integer arithmetic that any C compiler
 * vectorises. IEEE 754: rounds to nearest even, keeps infinities, signed zeros, subnormals and NaN.
 * Knows no kernel.
 */
#ifndef WAN_ATTN_CPU_HALF_H
#define WAN_ATTN_CPU_HALF_H

#include <stdint.h>
#include <string.h>

#include "wan_attn.h"

static inline float wan_attn_float_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

static inline uint32_t wan_attn_bits_of_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    return bits;
}

static inline float wan_attn_float_of_bf16(uint16_t h) {
    return wan_attn_float_of_bits((uint32_t)h << 16);
}

static inline uint16_t wan_attn_bf16_of_float(float f) {
    uint32_t bits = wan_attn_bits_of_float(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40u); /* a quiet NaN: rounding could make it infinite */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float wan_attn_float_of_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    /* Exponent and mantissa in float's places; the exponent is biased by 15. */
    uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    /* Multiplying by 2^112 changes the bias to 127 and normalises subnormals; infinities and NaN
     * need the top exponent. */
    float value = wan_attn_float_of_bits(magnitude) * 0x1p112f;
    uint32_t top = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return wan_attn_float_of_bits(wan_attn_bits_of_float(value) | top | sign);
}

static inline uint16_t wan_attn_f16_of_float(float f) {
    uint32_t bits = wan_attn_bits_of_float(f);
    uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u); /* NaN */
    if (magnitude >= 0x477ff000u)
        return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
    if (magnitude < 0x38800000u) {
        /* Below 2^-14: adding 0.5 puts the float's last bit at 2^-24, a subnormal half's, and
         * rounds to it. */
        uint32_t rounded = wan_attn_bits_of_float(wan_attn_float_of_bits(magnitude) + 0.5f);
        return (uint16_t)(sign | (rounded - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | (rounded - 0x38000000u) >> 13);
}

/* n consecutive elements of any float dtype to float. */
static inline void wan_attn_load_floats(float *to, const void *from, wan_attn_dtype dtype,
                                        int64_t n) {
    const uint16_t *half = (const uint16_t *)from;
    if (dtype == WAN_ATTN_F32)
        memcpy(to, from, (size_t)n * sizeof(float));
    else if (dtype == WAN_ATTN_BF16)
        for (int64_t d = 0; d < n; d++)
            to[d] = wan_attn_float_of_bf16(half[d]);
    else
        for (int64_t d = 0; d < n; d++)
            to[d] = wan_attn_float_of_f16(half[d]);
}

static inline void wan_attn_store_floats(void *to, const float *from, wan_attn_dtype dtype,
                                         int64_t n) {
    uint16_t *half = (uint16_t *)to;
    if (dtype == WAN_ATTN_F32)
        /* NOLINTNEXTLINE(clang-analyzer-unix.cstring.UninitializedRead): n > 0 are written */
        memcpy(to, from, (size_t)n * sizeof(float));
    else if (dtype == WAN_ATTN_BF16)
        for (int64_t d = 0; d < n; d++)
            half[d] = wan_attn_bf16_of_float(from[d]);
    else
        for (int64_t d = 0; d < n; d++)
            half[d] = wan_attn_f16_of_float(from[d]);
}

#endif /* WAN_ATTN_CPU_HALF_H */
