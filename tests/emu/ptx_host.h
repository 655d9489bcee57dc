// SPDX-License-Identifier: Apache-2.0
// ptx_host.h - what lies behind csrc/cuda/ptx/ptx.cuh on the CPU: the same names, doing what the
// PTX manual says about the instruction. Included by kernels; everything with more than a line is
// in instructions.cpp, compiled once for all of them.
#pragma once

#include <cmath>

#include "emu/half.h"
#include "emu/machine.h"

#define DEVICE [[maybe_unused]] static inline
#define WAN_ATTN_KERNEL(name, threads, min_ctas, type, args)                                       \
    extern "C" void name(const type &args);                                                        \
    extern "C" void name(const type &args)

namespace emu {
u32 shuffle(u32 x, int lane_mask, site at);
bool vote_any(bool condition, site at);
int reduce_or(int x, site at);
int reduce_max(int x, site at);
void load_global(void *to, const void *from, int bytes);
void store_global(void *to, const void *from, int bytes);
void load_shared(u32 x[4], u32 at, bool is_zero, site where);
void store_shared(u32 at, const u32 x[4], site where);
void start_copy(u32 to, const void *from, bool is_zero, site at);
void end_group();
void wait_for_copies(int pending);
void load_matrices(u32 x[4], u32 row_address, bool is_transposed, site at);
void multiply(float d[4], const u32 a[4], u32 b0, u32 b1, bool is_bf16, site at);
void multiply_sum_f16(u32 d[2], const u32 a[4], u32 b0, u32 b1, site at);
void multiply_s8(int d[4], const u32 a[4], u32 b0, u32 b1, site at);
u32 change_global(void *at, u32 x, bool is_max);
float rough(float x);
} // namespace emu

DEVICE int thread_index() { return emu::the_machine().thread(); }
DEVICE int thread_index_again() { return thread_index(); }
DEVICE int block_index() { return emu::the_machine().block(); }
DEVICE u32 shared_base() { return emu::the_machine().shared_base(); }
DEVICE u32 own_shared(u32 at, emu::site where) { return emu::the_machine().own_shared(at, where); }
DEVICE void block_barrier(emu::site at = {}) { emu::the_machine().block_barrier(at); }
DEVICE int uniform(int x, emu::site at = {}) { return emu::reduce_or(x, at); }
DEVICE int largest_of_warp(int x, emu::site at = {}) { return emu::reduce_max(x, at); }
DEVICE int highest_bit(u32 bits) { return bits ? 31 - __builtin_clz(bits) : -1; }
DEVICE bool any_lane(bool condition, emu::site at = {}) { return emu::vote_any(condition, at); }
DEVICE u32 shfl_xor_bits(u32 x, int lane_mask, emu::site at = {}) {
    return emu::shuffle(x, lane_mask, at);
}
DEVICE float shfl_xor(float x, int lane_mask, emu::site at = {}) {
    return emu::float_of_bits(emu::shuffle(emu::bits_of_float(x), lane_mask, at));
}

DEVICE int load_global_i32(const void *at) {
    int x;
    emu::load_global(&x, at, 4);
    return x;
}
DEVICE i64 load_global_i64(const void *at) {
    i64 x;
    emu::load_global(&x, at, 8);
    return x;
}
DEVICE u32 load_global_b16(const void *at) {
    unsigned short x;
    emu::load_global(&x, at, 2);
    return x;
}
DEVICE u32 load_global_b32(const void *at) {
    u32 x;
    emu::load_global(&x, at, 4);
    return x;
}
DEVICE float load_global_f32(const void *at) {
    float x;
    emu::load_global(&x, at, 4);
    return x;
}
DEVICE double load_global_f64(const void *at) {
    double x;
    emu::load_global(&x, at, 8);
    return x;
}
DEVICE u32 load_own_b16(const void *at) { return load_global_b16(at); }
DEVICE u32 load_own_b32(const void *at) { return load_global_b32(at); }
DEVICE void load_own_b32x4(u32 x[4], const void *at) { emu::load_global(x, at, 16); }
DEVICE void load_global_f32x2(float x[2], const void *at) { emu::load_global(x, at, 8); }
DEVICE void store_global_b16(void *at, u32 x) {
    const auto half = static_cast<unsigned short>(x);
    emu::store_global(at, &half, 2);
}
DEVICE void store_global_f32(void *at, float x) { emu::store_global(at, &x, 4); }
DEVICE void store_global_b32(void *at, u32 x) { emu::store_global(at, &x, 4); }
DEVICE void store_global_f32x2(void *at, float x, float y) {
    const float pair[2] = {x, y};
    emu::store_global(at, pair, 8);
}
DEVICE void store_global_b32x2(void *at, u32 x, u32 y) {
    const u32 pair[2] = {x, y};
    emu::store_global(at, pair, 8);
}
DEVICE void store_global_b32x4(void *at, const u32 x[4]) { emu::store_global(at, x, 16); }

DEVICE void raise_global_u32(void *at, u32 x) { emu::change_global(at, x, true); }
DEVICE u32 add_global_u32(void *at, u32 x) { return emu::change_global(at, x, false); }

DEVICE void load_shared_b32x4(u32 x[4], u32 at, emu::site where = {}) {
    emu::load_shared(x, own_shared(at, where), false, where);
}
DEVICE void load_shared_b32x4_or_zero(u32 x[4], u32 at, bool is_zero, emu::site where = {}) {
    emu::load_shared(x, own_shared(at, where), is_zero, where);
}
DEVICE void store_shared_b32x4(u32 at, const u32 x[4], emu::site where = {}) {
    emu::store_shared(own_shared(at, where), x, where);
}
DEVICE void load_global_b32x4(u32 x[4], const void *at) { emu::load_global(x, at, 16); }
DEVICE void cp_async_16_or_zero(u32 to, const void *from, bool is_zero, emu::site at = {}) {
#if EMULATED_ARCH >= 80
    emu::start_copy(own_shared(to, at), from, is_zero, at);
#else
    u32 x[4] = {0, 0, 0, 0};
    if (!is_zero)
        load_global_b32x4(x, from);
    store_shared_b32x4(to, x, at);
#endif
}
DEVICE void cp_async_16(u32 to, const void *from, emu::site at = {}) {
    cp_async_16_or_zero(to, from, false, at);
}
DEVICE const char *stepped_back(const char *from, i64 bytes) { return from - bytes; }
DEVICE void cp_async_commit() { emu::end_group(); }
template <int pending> DEVICE void cp_async_wait() { emu::wait_for_copies(pending); }

DEVICE void ldmatrix_x4(u32 x[4], u32 row_address, emu::site at = {}) {
    emu::load_matrices(x, own_shared(row_address, at), false, at);
}
DEVICE void ldmatrix_x4_trans(u32 x[4], u32 row_address, emu::site at = {}) {
    emu::load_matrices(x, own_shared(row_address, at), true, at);
}
#if HAS_BF16
DEVICE void mma_m16n8k16_bf16(float d[4], const u32 a[4], u32 b0, u32 b1, emu::site at = {}) {
    emu::multiply(d, a, b0, b1, true, at);
}
DEVICE u32 cvt_bf16x2(float low, float high) {
    return emu::to_bf16(low) | static_cast<u32>(emu::to_bf16(high)) << 16;
}
#endif
DEVICE void mma_m16n8k16_f16(float d[4], const u32 a[4], u32 b0, u32 b1, emu::site at = {}) {
#if EMULATED_ARCH >= 80
    emu::multiply(d, a, b0, b1, false, at);
#else
    const u32 left[4] = {a[0], a[1], 0, 0}, right[4] = {a[2], a[3], 0, 0};
    emu::multiply(d, left, b0, 0, false, at);
    emu::multiply(d, right, b1, 0, false, at);
#endif
}

DEVICE void mma_m16n8k16_f16_sum_f16(u32 d[2], const u32 a[4], u32 b0, u32 b1, emu::site at = {}) {
    emu::multiply_sum_f16(d, a, b0, b1, at);
}

DEVICE void mma_m16n8k32_s8(int d[4], const u32 a[4], u32 b0, u32 b1, emu::site at = {}) {
    emu::multiply_s8(d, a, b0, b1, at);
}

DEVICE float float_from_bits(u32 bits) { return emu::float_of_bits(bits); }
DEVICE u32 bits_from_float(float x) { return emu::bits_of_float(x); }
DEVICE float fused_multiply_add(float x, float y, float z) { return std::fma(x, y, z); }
DEVICE float rounded_sum(float x, float y) { return x + y; }
DEVICE float rounded_product(float x, float y) { return x * y; }
DEVICE float rounded_quotient(float x, float y) { return x / y; }
DEVICE float reciprocal_sqrt(float x) { return emu::rough(1.0f / std::sqrt(x)); }
DEVICE float natural_log(float x) { return std::log(x); }
DEVICE float larger(float x, float y) { return std::fmax(x, y); }
DEVICE float exp2_approx(float x) {
    float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : emu::rough(y);
}
DEVICE float reciprocal(float x) { return emu::rough(1.0f / x); }
DEVICE u32 pack_f16(float low, float high) {
    return emu::to_f16(low) | static_cast<u32>(emu::to_f16(high)) << 16;
}
DEVICE void unpack_f16(float *low, float *high, u32 pair) {
    *low = emu::from_f16(static_cast<std::uint16_t>(pair));
    *high = emu::from_f16(static_cast<std::uint16_t>(pair >> 16));
}
