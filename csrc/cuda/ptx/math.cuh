/* SPDX-License-Identifier: Apache-2.0
 * math.cuh - arithmetic that CUDA C has no exact word for.
 */
#ifndef WAN_ATTN_CUDA_PTX_MATH_H
#define WAN_ATTN_CUDA_PTX_MATH_H

DEVICE float float_from_bits(u32 bits) {
    float x;
    asm("mov.b32 %0, %1;" : "=f"(x) : "r"(bits));
    return x;
}

DEVICE u32 bits_from_float(float x) {
    u32 bits;
    asm("mov.b32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

/* The place of the highest bit that is set: 31 to 0; of no bits, -1. */
DEVICE int highest_bit(u32 bits) {
    int place;
    asm("bfind.u32 %0, %1;" : "=r"(place) : "r"(bits));
    return place;
}

/* 2^x within 2 ulp; results below 2^-126 are 0. Without .ftz every call costs three instructions
 * more, to save subnormal weights that no sum can notice. */
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / x within 1 ulp. */
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / sqrt(x), off by 2^-22.4 of it at most; subnormal x count. */
DEVICE float reciprocal_sqrt(float x) {
    float y;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* x + y and x * y, each with its own rounding: no compiler makes one instruction of two. */
DEVICE float rounded_sum(float x, float y) {
    float r;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}

DEVICE float rounded_product(float x, float y) {
    float r;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}

/* x / y, rounded once, subnormal numbers kept; the compiler's flags do not matter. */
DEVICE float rounded_quotient(float x, float y) {
    float r;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}

/* The exact product-sum with one rounding; the compiler's flags do not matter. */
DEVICE float fused_multiply_add(float x, float y, float z) {
    float r;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(x), "f"(y), "f"(z));
    return r;
}

/* The natural logarithm within 1 ulp (the compiler's own function, not lg2.approx: it is needed
 * once a row, and lse is compared with exact ones). */
DEVICE float natural_log(float x) { return logf(x); }

/* The larger one; the other one if one is NaN. */
DEVICE float larger(float x, float y) {
    float r;
    asm("max.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}

#if HAS_BF16
DEVICE u32 cvt_bf16x2(float low, float high) {
    u32 x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
#endif

DEVICE u32 pack_f16(float low, float high) {
    u32 x;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#else
    asm("{ .reg .f16 l, h; cvt.rn.f16.f32 l, %2; cvt.rn.f16.f32 h, %1; mov.b32 %0, {l, h}; }"
        : "=r"(x)
        : "f"(high), "f"(low));
#endif
    return x;
}

/* The two f16 of a packed pair. */
DEVICE void unpack_f16(float *low, float *high, u32 pair) {
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(*low), "=f"(*high)
        : "r"(pair));
}

#endif /* WAN_ATTN_CUDA_PTX_MATH_H */
