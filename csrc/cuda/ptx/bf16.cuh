/* SPDX-License-Identifier: Apache-2.0
 * bf16.cuh - rounding to bf16, also for Turing, whose instructions know no bf16. Plain arithmetic:
 * GPU and emulator have the same text.
 */
#ifndef WAN_ATTN_CUDA_PTX_BF16_H
#define WAN_ATTN_CUDA_PTX_BF16_H

/* To nearest, ties to even; NaN becomes the one that cvt makes. */
DEVICE u32 round_to_bf16(float x) {
    u32 bits = bits_from_float(x);
    bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return is_nan ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

/* Two floats rounded to nearest, `low` in the low half. */
DEVICE u32 pack_bf16(float low, float high) {
#if HAS_BF16
    return cvt_bf16x2(low, high);
#else
    return round_to_bf16(low) | round_to_bf16(high) << 16;
#endif
}

#endif /* WAN_ATTN_CUDA_PTX_BF16_H */
