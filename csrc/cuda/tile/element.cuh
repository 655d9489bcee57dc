/* SPDX-License-Identifier: Apache-2.0
 * element.cuh - one number of a tensor of any dtype, for passes in which each warp does a piece of
 * work by itself. Includer sets NUM_THREADS.
 */
#ifndef WAN_ATTN_CUDA_TILE_ELEMENT_H
#define WAN_ATTN_CUDA_TILE_ELEMENT_H

#include "cuda/ptx/ptx.cuh"

enum { IS_F32 = 0, IS_F16 = 1, IS_BFLOAT16 = 2 }; /* wan_attn_dtype */

/* This warp's number in the grid. */
DEVICE int warp_number() { return block_index() * (NUM_THREADS / 32) + thread_index() / 32; }

/* Element `at` of the tensor, as float. */
DEVICE float load_element(const void *data, int dtype, i64 at) {
    if (dtype == IS_F32)
        return load_global_f32((const float *)data + at);
    u32 bits = load_global_b16((const char *)data + at * 2);
    if (dtype == IS_BFLOAT16)
        return float_from_bits(bits << 16);
    float low, high;
    unpack_f16(&low, &high, bits);
    return low;
}

#endif /* WAN_ATTN_CUDA_TILE_ELEMENT_H */
