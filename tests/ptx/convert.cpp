/* SPDX-License-Identifier: Apache-2.0
 * convert.cpp - PTX ISA, "cvt", and the approximations "ex2", "rcp" and "rsqrt".
 */
#include <cmath>

#include "half.h"

namespace {

/* From a slot of words to one of words. */
template <u32 f(u32)> void words(Warp &w, const Ins &, const int *o, u32 mask) {
    u32 *d = w.at<u32>(o[0]);
    const u32 *a = w.at<u32>(o[1]);
    lanes(mask, [&](int l) { d[l] = f(a[l]); });
    w.define(o[0], mask, w.defined[o[1]]);
}

template <u64 f(u32)> void widen(Warp &w, const Ins &, const int *o, u32 mask) {
    u64 *d = w.at<u64>(o[0]), result[LANES];
    const u32 *a = w.at<u32>(o[1]);
    lanes(mask, [&](int l) { result[l] = f(a[l]); });
    lanes(mask, [&](int l) { d[l] = result[l]; });
    w.define(o[0], mask, w.defined[o[1]]);
}

void low_word(Warp &w, const Ins &, const int *o, u32 mask) {
    u32 *d = w.at<u32>(o[0]), result[LANES];
    const u64 *a = w.at<u64>(o[1]);
    lanes(mask, [&](int l) { result[l] = (u32)a[l]; });
    lanes(mask, [&](int l) { d[l] = result[l]; });
    w.define(o[0], mask, w.defined[o[1]]);
}

/* From a register that is wider than the type it is read as: what is above counts for nothing. */
template <typename low> void s64_from(Warp &w, const Ins &, const int *o, u32 mask) {
    u64 *d = w.at<u64>(o[0]);
    const u64 *a = w.at<u64>(o[1]);
    lanes(mask, [&](int l) { d[l] = (u64)(i64)(low)a[l]; });
    w.define(o[0], mask, w.defined[o[1]]);
}

/* "d, a, b": a becomes the upper half of d, b the lower one. */
template <u32 f(float)> void pair_of(Warp &w, const Ins &, const int *o, u32 mask) {
    u32 *d = w.at<u32>(o[0]);
    const float *a = w.at<float>(o[1]), *b = w.at<float>(o[2]);
    lanes(mask, [&](int l) { d[l] = f(a[l]) << 16 | f(b[l]); });
    w.define(o[0], mask, w.defined[o[1]] & w.defined[o[2]]);
}

u64 from_s32(u32 x) { return (u64)(i64)(int)x; }
u64 from_u32(u32 x) { return x; }
u64 low_half_64(u32 x) { return x & 0xffffu; }
u64 s64_from_s8(u32 x) { return (u64)(i64)(int8_t)x; }
u32 low_half(u32 x) { return x & 0xffffu; }
u32 from_s16(u32 x) { return (u32)(int)(int16_t)x; }
u32 from_s8(u32 x) { return (u32)(int)(int8_t)x; }
u32 s16_from_s8(u32 x) { return (u16)(int16_t)(int8_t)x; }
u32 float_from_s32(u32 x) { return bits_of((float)(int)x); }
u32 float_from_f16(u32 x) { return bits_of(from_f16(x & 0xffffu)); }
u32 f16_from_float(u32 x) { return to_f16(float_of(x)); }
u32 f16_of(float x) { return to_f16(x); }
u32 bf16_of(float x) { return to_bf16(x); }

/* .ftz: a subnormal becomes a zero of its sign. */
float flushed(float x) {
    return (bits_of(x) & 0x7f800000u) == 0 ? float_of(bits_of(x) & 0x80000000u) : x;
}

/* A result that is wrong by up to so many units in the last place, as the manual allows. */
float blurred(Machine &m, float x) {
    int error = m.knobs.ex2_error;
    u32 bits = bits_of(x), exponent = bits >> 23 & 255;
    if (error == 0 || exponent < 2 || exponent > 252 || (bits & 0x7fffffu) == 0)
        return x;
    /* By the value alone: the same call gives the same bits. */
    u32 hash = (bits * 2654435761u ^ (u32)m.knobs.seed) >> 7;
    return float_of(bits + hash % (2 * (u32)error + 1) - (u32)error);
}

template <float f(float)> void approximation(Warp &w, const Ins &, const int *o, u32 mask) {
    float *d = w.at<float>(o[0]);
    const float *a = w.at<float>(o[1]);
    lanes(mask, [&](int l) { d[l] = flushed(f(flushed(a[l]))); });
    if (w.machine->knobs.ex2_error)
        for (u32 rest = mask; rest; rest &= rest - 1) {
            int l = __builtin_ctz(rest);
            d[l] = blurred(*w.machine, d[l]);
        }
    w.define(o[0], mask, w.defined[o[1]]);
}

/* Without .ftz. */
template <float f(float)> void kept_approximation(Warp &w, const Ins &, const int *o, u32 mask) {
    float *d = w.at<float>(o[0]);
    const float *a = w.at<float>(o[1]);
    lanes(mask, [&](int l) { d[l] = blurred(*w.machine, f(a[l])); });
    w.define(o[0], mask, w.defined[o[1]]);
}

float inverse(float x) { return 1.0f / x; }
float inverse_root(float x) { return 1.0f / std::sqrt(x); }

void double_from_s32(Warp &w, const Ins &, const int *o, u32 mask) {
    double *d = w.at<double>(o[0]), result[LANES];
    const u32 *a = w.at<u32>(o[1]);
    lanes(mask, [&](int l) { result[l] = (double)(int)a[l]; });
    lanes(mask, [&](int l) { d[l] = result[l]; });
    w.define(o[0], mask, w.defined[o[1]]);
}

/* "cvt" between the two sizes of floats. */
void double_from_float(Warp &w, const Ins &, const int *o, u32 mask) {
    double *d = w.at<double>(o[0]), result[LANES];
    const float *a = w.at<float>(o[1]);
    lanes(mask, [&](int l) { result[l] = a[l]; });
    lanes(mask, [&](int l) { d[l] = result[l]; });
    w.define(o[0], mask, w.defined[o[1]]);
}

void float_from_double(Warp &w, const Ins &, const int *o, u32 mask) {
    float *d = w.at<float>(o[0]), result[LANES];
    const double *a = w.at<double>(o[1]);
    lanes(mask, [&](int l) { result[l] = (float)a[l]; });
    lanes(mask, [&](int l) { d[l] = result[l]; });
    w.define(o[0], mask, w.defined[o[1]]);
}

/* 2^x within a fraction of a unit: by a table-free polynomial in double, which the compiler can
 * make of vector instructions. */
float power_of_two(float x) {
    if (!(x > -127.0f)) /* below is flushed; NaN stays */
        return x != x ? float_of(0x7fffffffu) : 0.0f;
    if (x >= 128.0f)
        return float_of(0x7f800000u);
    double whole = (double)(int)(x + 128.5f) - 128.0, f = (x - whole) * 0.693147180559945309417;
    double y =
        1 + f * (1 + f * (1.0 / 2 +
                          f * (1.0 / 6 +
                               f * (1.0 / 24 +
                                    f * (1.0 / 120 + f * (1.0 / 720 + f * (1.0 / 5040 +
                                                                           f * (1.0 / 40320))))))));
    u64 bits = (u64)((i64)whole + 1023) << 52;
    double scale;
    std::memcpy(&scale, &bits, 8);
    return (float)(y * scale);
}

} // namespace

const std::vector<Op> CONVERT_OPS = {
    {"cvt.s64.s32", "=l r", widen<from_s32>},
    {"cvt.s64.s32", "=l l", s64_from<int32_t>},
    {"cvt.u64.u32", "=l r", widen<from_u32>},
    {"cvt.u64.u16", "=l h", widen<low_half_64>},
    {"cvt.s64.s8", "=l r", widen<s64_from_s8>},
    {"cvt.s64.s8", "=l h", widen<s64_from_s8>},
    {"cvt.s64.s8", "=l l", s64_from<int8_t>},
    {"cvt.u32.u64", "=r l", low_word},
    {"cvt.u32.u16", "=r h", words<low_half>},
    {"cvt.u16.u32", "=h r", words<low_half>},
    {"cvt.s32.s16", "=r h", words<from_s16>},
    {"cvt.s32.s8", "=r r", words<from_s8>},
    {"cvt.s32.s8", "=r h", words<from_s8>},
    {"cvt.s16.s8", "=h h", words<s16_from_s8>},
    {"cvt.s16.s8", "=h r", words<s16_from_s8>},
    {"cvt.s8.s32", "=h r", words<s16_from_s8>},
    {"cvt.s8.s32", "=r r", words<from_s8>},
    {"cvt.rn.f32.s32", "=r r", words<float_from_s32>},
    {"cvt.f32.f16", "=r h", words<float_from_f16>},
    {"cvt.rn.f16.f32", "=h r", words<f16_from_float>},
    {"cvt.rn.f16x2.f32", "=r r r", pair_of<f16_of>},
    {"cvt.rn.bf16x2.f32", "=r r r", pair_of<bf16_of>},
    {"ex2.approx.ftz.f32", "=r r", approximation<power_of_two>},
    {"rcp.approx.ftz.f32", "=r r", approximation<inverse>},
    {"rsqrt.approx.f32", "=r r", kept_approximation<inverse_root>},
    {"cvt.f64.f32", "=l r", double_from_float},
    {"cvt.rn.f64.s32", "=l r", double_from_s32},
    {"cvt.rn.f32.f64", "=r l", float_from_double},
};
