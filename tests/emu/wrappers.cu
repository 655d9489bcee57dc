// SPDX-License-Identifier: Apache-2.0
// wrappers.cu - each wrapper of csrc/cuda/ptx in a kernel of its own, for golden.ptx.
#include "cuda/ptx/ptx.cuh"

#define KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)

KERNEL(k_thread_index, int *out) { *out = thread_index(); }
KERNEL(k_thread_index_again, int *out) { *out = thread_index_again(); }
KERNEL(k_block_index, int *out) { *out = block_index(); }
KERNEL(k_uniform, int *out, int x) { *out = uniform(x); }
KERNEL(k_largest_of_warp, int *out, int x) { *out = largest_of_warp(x); }
KERNEL(k_highest_bit, int *out, u32 x) { *out = highest_bit(x); }
KERNEL(k_block_barrier) { block_barrier(); }
KERNEL(k_shfl_xor_bits, u32 *out, u32 x) { *out = shfl_xor_bits(x, 2); }
KERNEL(k_shfl_xor, float *out, float x) { *out = shfl_xor(x, 1); }
KERNEL(k_any_lane, int *out, int x) { *out = any_lane(x > 7) ? 3 : 5; }

KERNEL(k_shared_base, u32 *out) { *out = shared_base(); }
KERNEL(k_load_global_i32, int *out, const int *x) { *out = load_global_i32(x); }
KERNEL(k_load_global_i64, i64 *out, const i64 *x) { *out = load_global_i64(x); }
KERNEL(k_load_global_b16, u32 *out, const void *x) { *out = load_global_b16(x); }
KERNEL(k_load_global_b32, u32 *out, const u32 *x) { *out = load_global_b32(x); }
KERNEL(k_load_global_f32, float *out, const float *x) { *out = load_global_f32(x); }
KERNEL(k_load_global_b32x4, u32 *out, const void *x) { load_global_b32x4(out, x); }
KERNEL(k_load_global_f32x2, float *out, const float *x) { load_global_f32x2(out, x); }
KERNEL(k_load_global_f64, double *out, const double *x) { *out = load_global_f64(x); }
KERNEL(k_load_own_b16, u32 *out, const void *x) { *out = load_own_b16(x); }
KERNEL(k_load_own_b32, u32 *out, const void *x) { *out = load_own_b32(x); }
KERNEL(k_load_own_b32x4, u32 *out, const void *x) { load_own_b32x4(out, x); }
KERNEL(k_store_global_b16, void *out, u32 x) { store_global_b16(out, x); }
KERNEL(k_store_global_b32x4, u32 *out, u32 x, u32 y) {
    const u32 words[4] = {x, y, 3, 4};
    store_global_b32x4(out, words);
}
KERNEL(k_store_global_f32, float *out, float x) { store_global_f32(out, x); }
KERNEL(k_store_global_b32, u32 *out, u32 x) { store_global_b32(out, x); }
KERNEL(k_store_global_f32x2, float *out, float x, float y) { store_global_f32x2(out, x, y); }
KERNEL(k_store_global_b32x2, u32 *out, u32 x, u32 y) { store_global_b32x2(out, x, y); }
KERNEL(k_raise_global_u32, void *out, u32 x) { raise_global_u32(out, x); }
KERNEL(k_add_global_u32, u32 *out, u32 *at, u32 x) { *out = add_global_u32(at, x); }
KERNEL(k_load_shared_b32x4, u32 *out, u32 at) { load_shared_b32x4(out, at); }
KERNEL(k_load_shared_b32x4_or_zero, u32 *out, u32 at, int x) {
    load_shared_b32x4_or_zero(out, at, x > 7);
}
KERNEL(k_store_shared_b32x4, u32 at, u32 x, u32 y) {
    const u32 words[4] = {x, y, 3, 4};
    store_shared_b32x4(at, words);
}
KERNEL(k_cp_async_16, u32 to, const void *from) { cp_async_16(to, from); }
KERNEL(k_cp_async_16_or_zero, u32 to, const void *from, int x) {
    cp_async_16_or_zero(to, from, x > 7);
}
KERNEL(k_stepped_back, const char **out, const char *from, i64 bytes) {
    *out = stepped_back(from, bytes);
}
KERNEL(k_cp_async_commit) { cp_async_commit(); }
KERNEL(k_cp_async_wait) { cp_async_wait<1>(); }

KERNEL(k_ldmatrix_x4, u32 *out, u32 at) { ldmatrix_x4(out, at); }
KERNEL(k_ldmatrix_x4_trans, u32 *out, u32 at) { ldmatrix_x4_trans(out, at); }
#if __CUDA_ARCH__ >= 800
KERNEL(k_mma_m16n8k16_bf16, float *d, const u32 *a, u32 b0, u32 b1) {
    mma_m16n8k16_bf16(d, a, b0, b1);
}
KERNEL(k_mma_m16n8k16_f16_sum_f16, u32 *d, const u32 *a, u32 b0, u32 b1) {
    mma_m16n8k16_f16_sum_f16(d, a, b0, b1);
}
KERNEL(k_cvt_bf16x2, u32 *out, float low, float high) { *out = cvt_bf16x2(low, high); }
#endif
KERNEL(k_pack_bf16, u32 *out, float low, float high) { *out = pack_bf16(low, high); }
KERNEL(k_round_to_bf16, u32 *out, float x) { *out = round_to_bf16(x); }
KERNEL(k_mma_m16n8k16_f16, float *d, const u32 *a, u32 b0, u32 b1) {
    mma_m16n8k16_f16(d, a, b0, b1);
}

KERNEL(k_mma_m16n8k32_s8, int *d, const u32 *a, u32 b0, u32 b1) { mma_m16n8k32_s8(d, a, b0, b1); }

KERNEL(k_float_from_bits, float *out, u32 x) { *out = float_from_bits(x); }
KERNEL(k_bits_from_float, u32 *out, float x) { *out = bits_from_float(x); }
KERNEL(k_exp2_approx, float *out, float x) { *out = exp2_approx(x); }
KERNEL(k_reciprocal, float *out, float x) { *out = reciprocal(x); }
KERNEL(k_reciprocal_sqrt, float *out, float x) { *out = reciprocal_sqrt(x); }
KERNEL(k_rounded_sum, float *out, float x, float y) { *out = rounded_sum(x, y); }
KERNEL(k_rounded_product, float *out, float x, float y) { *out = rounded_product(x, y); }
KERNEL(k_rounded_quotient, float *out, float x, float y) { *out = rounded_quotient(x, y); }
KERNEL(k_fused_multiply_add, float *out, float x, float y, float z) {
    *out = fused_multiply_add(x, y, z);
}
KERNEL(k_larger, float *out, float x, float y) { *out = larger(x, y); }
KERNEL(k_unpack_f16, float *low, float *high, u32 pair) { unpack_f16(low, high, pair); }
KERNEL(k_pack_f16, u32 *out, float low, float high) { *out = pack_f16(low, high); }
