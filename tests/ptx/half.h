/* SPDX-License-Identifier: Apache-2.0
 * half.h - f16 and bf16: exact to float, and rounded to nearest even from double.
 */
#ifndef WAN_ATTN_TESTS_PTX_HALF_H
#define WAN_ATTN_TESTS_PTX_HALF_H

#include <cmath>
#include <cstring>

#include "machine.h"

inline float float_of(u32 bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline u32 bits_of(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float from_bf16(u32 x) { return float_of(x << 16); }

/* Branches on nothing: normal numbers by moving the exponent, subnormal ones by a subtraction. */
inline float from_f16(u32 x) {
    u32 sign = (x & 0x8000u) << 16, rest = (x & 0x7fffu) << 13;
    u32 exponent = rest & 0x0f800000u;
    u32 normal = rest + ((127u - 15u) << 23);
    u32 special = rest + ((255u - 31u) << 23);
    u32 subnormal = bits_of(float_of(rest + (113u << 23)) - float_of(113u << 23));
    u32 y = exponent == 0x0f800000u ? special : exponent == 0 ? subnormal : normal;
    return float_of(y | sign);
}

/* "cvt", .rn: nearest, ties to even; NaN becomes 0x7fff. */
inline u32 to_bf16(float x) {
    u32 bits = bits_of(x);
    bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return is_nan ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline u32 to_f16(double x) {
    if (std::isnan(x))
        return 0x7fffu;
    u32 sign = std::signbit(x) ? 0x8000u : 0;
    double size = std::fabs(x);
    if (size == 0)
        return sign;
    int exponent;
    std::frexp(size, &exponent); /* size < 2^exponent */
    int unit = exponent - 11 < -24 ? -24 : exponent - 11;
    double units = std::nearbyint(std::ldexp(size, -unit)); /* at most 2^11 */
    double rounded = std::ldexp(units, unit);
    if (rounded >= 65520.0)
        return sign | 0x7c00u;
    if (rounded < 0x1p-14)
        return sign | (u32)std::ldexp(rounded, 24);
    std::frexp(rounded, &exponent);
    u32 fraction = (u32)std::ldexp(rounded, 11 - exponent); /* 2^10 <= fraction < 2^11 */
    return sign | ((u32)(exponent + 14) << 10) | (fraction & 0x3ffu);
}

#endif /* WAN_ATTN_TESTS_PTX_HALF_H */
