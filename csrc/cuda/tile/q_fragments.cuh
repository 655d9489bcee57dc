/* SPDX-License-Identifier: Apache-2.0
 * q_fragments.cuh - the A operands of Q for the rows of a warp, in registers or in shared memory.
 * Includer has K_STEPS, and Q_SMEM, where they begin in shared memory.
 */
#ifndef WAN_ATTN_CUDA_TILE_Q_FRAGMENTS_H
#define WAN_ATTN_CUDA_TILE_Q_FRAGMENTS_H

/* Registers, or a place for them that is filled on demand: a fragment lies there as its lanes hold
 * it, and lanes read only what they wrote. */
typedef struct q_fragments {
    u32 in_regs[Q_IN_REGS ? M_TILES : 1][Q_IN_REGS ? K_STEPS : 1][4];
    u32 smem; /* this lane's 16 bytes of fragment 0 */
    /* Of the rows' scores in base 2; bf16 and f16 that are not scaled have args.scale_log2e. */
    float scale[M_TILES][2];
} q_fragments;

/* The first of the lane's two rows in an m tile, counted from the block's first row. */
DEVICE int row_in_block(int m_tile) {
    int warp = thread_index() / 32, g = thread_index() % 32 / 4;
    return (warp * M_TILES + m_tile) * 16 + g;
}

DEVICE u32 find_q_smem() {
    return shared_base() + Q_SMEM + (u32)(thread_index() / 32) * (M_TILES * K_STEPS * 512) +
           (u32)(thread_index() % 32) * 16;
}

DEVICE void put_fragment(q_fragments &q, int m, int step, const u32 a[4]) {
#pragma unroll
    for (int i = 0; i < 4 && Q_IN_REGS; i++)
        q.in_regs[m][step][i] = a[i];
    if (!Q_IN_REGS)
        store_shared_b32x4(q.smem + (u32)(m * K_STEPS + step) * 512, a);
}

/* Those of one step, of every m tile. */
DEVICE void take_fragments(u32 a[M_TILES][4], const q_fragments &q, int step) {
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
        if (!Q_IN_REGS)
            load_shared_b32x4(a[m], q.smem + (u32)(m * K_STEPS + step) * 512);
#pragma unroll
        for (int i = 0; i < 4 && Q_IN_REGS; i++)
            a[m][i] = q.in_regs[m][step][i];
    }
}

#endif /* WAN_ATTN_CUDA_TILE_Q_FRAGMENTS_H */
