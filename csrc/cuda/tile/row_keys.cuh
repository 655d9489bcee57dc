/* SPDX-License-Identifier: Apache-2.0
 * row_keys.cuh - how many keys a query row sees: none and one are cases of their own in a gradient.
 */
#ifndef WAN_ATTN_CUDA_TILE_ROW_KEYS_H
#define WAN_ATTN_CUDA_TILE_ROW_KEYS_H

#include "cuda/tile/work.cuh"

/* Of a real row, if it has window_left and window_right keys beside the diagonal. */
DEVICE int count_keys(int row, int used_q, int used_k, int window_left, int window_right) {
    int diagonal = row + used_k - used_q;
    return smaller_int(diagonal + window_right + 1, used_k) - larger_int(diagonal - window_left, 0);
}

#endif /* WAN_ATTN_CUDA_TILE_ROW_KEYS_H */
