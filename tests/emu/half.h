// SPDX-License-Identifier: Apache-2.0
// half.h - 16-bit floats as bits, rounded to nearest even as cvt.rn does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace emu {

inline float float_of_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline std::uint32_t bits_of_float(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float from_bf16(std::uint16_t bits) { return float_of_bits(std::uint32_t{bits} << 16); }

inline std::uint16_t to_bf16(float x) {
    std::uint32_t bits = bits_of_float(x);
    if (x != x)
        return 0x7fff;
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Exact for any value that the format holds: what arithmetic makes of the bits' meaning.
inline float from_f16_slowly(std::uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float x = exponent == 31 ? (fraction ? NAN : INFINITY)
              : exponent     ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                             : std::ldexp(static_cast<float>(fraction), -24);
    return bits & 0x8000 ? -x : x;
}

inline float from_f16(std::uint16_t bits) {
    static const std::vector<float> TABLE = [] {
        std::vector<float> table(65536);
        for (std::uint32_t i = 0; i < 65536; i++)
            table[i] = from_f16_slowly(static_cast<std::uint16_t>(i));
        return table;
    }();
    return TABLE[bits];
}

inline std::uint16_t to_f16(float x) {
    std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    float size = std::fabs(x);
    if (x != x)
        return 0x7fff;
    if (size >= 65520.0f) // half way to what would be the next number
        return sign | 0x7c00;
    int exponent = -13;
    if (size >= 0x1p-14f)
        std::frexp(size, &exponent);
    // 11 bits, or fewer below 2^-14; nearbyint rounds to even.
    auto fraction = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(size, 11 - exponent)));
    return static_cast<std::uint16_t>(
        sign | (fraction + (static_cast<std::uint32_t>(exponent + 13) << 10)));
}

} // namespace emu
