/* SPDX-License-Identifier: Apache-2.0
 * ring.cuh - tiles on their way through shared memory: whose turn it is, and how wgmma finds them.
 * Includer sets STAGES.
 */
#ifndef WAN_ATTN_CUDA_TILE_RING_H
#define WAN_ATTN_CUDA_TILE_RING_H

#include "cuda/ptx/ptx_sm90.cuh"

/* Which stage of a ring comes next, and the parity of its round. */
typedef struct ring {
    u32 stage, parity;
} ring;

DEVICE void advance(ring &r) {
    r.stage++;
    if (r.stage == STAGES) {
        r.stage = 0;
        r.parity ^= 1;
    }
}

/* Addresses and strides as the fields of a descriptor take them: PTX manual, "wgmma", matrix
 * descriptor. The mask is needed: in a cluster the rank of the block stands in bits 24 and up of
 * its shared addresses, and would end in the field next to this one. */
DEVICE u64 matrix_field(u32 x) { return (u64)((x & 0x3ffff) >> 4); }

/* The descriptor of an operand in panels: rows of 128 bytes with SWIZZLE_128B, groups of 8 rows
 * 1024 bytes apart. panel_bytes: from 64 columns to the next, where columns are M or N. */
DEVICE u64 matrix_descriptor(u32 at, u32 panel_bytes) {
    return (u64)1 << 62 | matrix_field(1024) << 32 | matrix_field(panel_bytes) << 16 |
           matrix_field(at);
}

#endif /* WAN_ATTN_CUDA_TILE_RING_H */
