/* SPDX-License-Identifier: Apache-2.0
 * row_keys.cuh - how many keys a query row sees: none and one are cases of their own in a gradient.
 */
#ifndef WAN_ATTN_CUDA_TILE_ROW_KEYS_H
#define WAN_ATTN_CUDA_TILE_ROW_KEYS_H

#include "cuda/tile/work.cuh"

/* Of a real row, under a window of such sizes. */
DEVICE int count_keys(int row, int used_q, int used_k, int window_size_left,
                      int window_size_right) {
    int diagonal = row + used_k - used_q;
    return smaller_int(diagonal + window_size_right + 1, used_k) -
           larger_int(diagonal - window_size_left, 0);
}

#endif /* WAN_ATTN_CUDA_TILE_ROW_KEYS_H */
