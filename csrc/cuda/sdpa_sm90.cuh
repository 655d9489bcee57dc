/* SPDX-License-Identifier: Apache-2.0
 * sdpa_sm90.cuh - exact attention for Hopper (sm_90a): wgmma, TMA, warpgroups with roles; f16 or
 * bf16 operands, f32 sums.
 *
 * Implements: FlashAttention-3 (Shah et al., arXiv 2407.08608; warp specialisation, ping-pong,
 * overlap within a warpgroup). Differs from it: blocks of a cluster share every tile of K and V
 * also for an odd number of blocks, for lengths per sample and under a mask; rescaling O is skipped
 * when no maximum grew, which is exact; blocks are not persistent.
 *
 *                    n, from the last tile to the first
 *              +-----------+ BLOCK_N keys
 *              |   K(n)^T  |                 S = Q K^T           wgmma ss, S in registers
 *              +-----------+                 P = exp2(S c - m c) registers; packed, it is the
 *     +------+ +-----------+ +------+                            A operand of the next wgmma
 *     |  Q   | |  S -> P   | |  O   |        O = O + P V         wgmma rs, O in registers
 *     +------+ +-----------+ +------+
 *     BLOCK_M rows, 64 to each of CONSUMERS warpgroups; a warp has 16
 *
 * Who does what: warpgroup 0 is the producer: one thread brings Q once and K and V into rings of
 * STAGES tiles. The others multiply. In a cluster each block loads half the rows of every tile,
 * to itself and to the other block. A block that has no rows, or sees nothing of a tile, still
 * brings its half and passes the tile on.
 * Pipeline of a consumer, when tile n comes:
 *     wait K(n), wait for the turn
 *     start S(n) = Q K(n)^T                    the tensor cores are busy with these two products
 *     wait V(n+1), start O += P(n+1) V(n+1)    while the softmax below runs; the turn is passed on,
 *     wait S(n), free K(n)                     so that one warpgroup's softmax runs beside the
 *     softmax of S(n), mask first              products of another one (ping-pong); computed()
 *                                              keeps the compiler from doing it after the wait
 *     wait O, free V(n+1)
 *     rescale O if a maximum grew, P(n) = S(n) in 16 bits
 * Barriers: full_k/v[stage], one arrival and the bytes of a tile; empty_k/v[stage], one arrival of
 * each consumer warp of the cluster (a warp's own wgmma_wait is all it knows of). Named: whose turn
 * it is; the four warps of a warpgroup; all consumers.
 * Budget: sdpa_rows.def. d128: 384 threads, 24 registers for the producer, 240 for consumers: S 88
 * + P 44 + O 64; Q 32 KiB, K and V 2 * 44 KiB each. No spills: tests/test_cuda_static_sm90.py.
 * Limits: args_sm90.h. What a NaN in V reaches: as in sdpa_sm80.cuh; rows of V behind the real
 * length are zeroed in shared memory, because 0 * NaN would be NaN.
 * Numerics: as sdpa_sm80.cuh; O is summed in f32 across all tiles by the tensor cores.
 * Measured: no GPU was at hand. What to measure, and what is expected: benchmarks/hopper_plan.md.
 */
#include "cuda/args_sm90.h"
#include "cuda/ptx/ptx_sm90.cuh"

#define NUM_THREADS (128 * (1 + CONSUMERS))
#define LISTED 0
#define JOINED(form, n, type) wgmma_##form##_n##n##_##type
#define WGMMA(form, n, type) JOINED(form, n, type)
#if IS_BF16
#define PACK pack_bf16
#define P_SHIFT 0 /* as in sdpa_sm80.cuh */
#define MULTIPLY_SS WGMMA(ss, BLOCK_N, bf16)
#define MULTIPLY_RS WGMMA(rs, HEAD_DIM, bf16)
#else
#define PACK pack_f16
#define P_SHIFT 13
#define MULTIPLY_SS WGMMA(ss, BLOCK_N, f16)
#define MULTIPLY_RS WGMMA(rs, HEAD_DIM, f16)
#endif

#include "cuda/tile/output.cuh"
#include "cuda/tile/producer.cuh"

enum {
    K_STEPS = HEAD_DIM / 16,
    V_STEPS = BLOCK_N / 16,
    /* Named barriers. */
    TURN = 1,          /* + consumer */
    WARPGROUP = 1 + 3, /* + consumer */
    ALL_CONSUMERS = 1 + 6
};
static_assert(CONSUMERS == 2 || CONSUMERS == 3, "ping-pong takes two");
static_assert(128 * (REGS_PRODUCER + CONSUMERS * REGS_CONSUMER) <= 65536, "registers of an SM");

/* What a consumer carries from tile to tile. */
typedef struct consumer {
    int number; /* 0 .. CONSUMERS - 1 */
    ring k, v;
    u64 q_matrix, k_matrix, v_matrix; /* descriptors of Q, K stage 0, V stage 0 */
    float o[O_TILES][4];
    u32 p[V_STEPS][4];
    float row_max[2], row_sum[2];
} consumer;

/* This warp has done with a tile: tells the producers of all blocks. */
DEVICE void release(u32 empty) {
    u32 lane = (u32)thread_index() % 32;
    if (CLUSTER > 1) {
        if (lane < CLUSTER)
            mbarrier_arrive_at(empty, lane);
    } else if (lane == 0) {
        mbarrier_arrive(empty);
    }
}

/* S = Q K(n)^T: starts it. */
DEVICE void start_qk(const consumer &c, float s[S_TILES][4]) {
    wgmma_fence();
    u64 k = c.k_matrix + c.k.stage * (KV_BYTES >> 4);
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        u64 q_step = (u64)(step / 4 * Q_PANEL + step % 4 * 32) >> 4;
        u64 k_step = (u64)(step / 4 * KV_PANEL + step % 4 * 32) >> 4;
        MULTIPLY_SS(s, c.q_matrix + q_step, k + k_step, step > 0);
    }
    wgmma_commit();
}

/* O += P V: starts it. */
DEVICE void start_pv(consumer &c) {
    wgmma_fence();
    u64 v = c.v_matrix + c.v.stage * (KV_BYTES >> 4);
#pragma unroll
    for (int step = 0; step < V_STEPS; step++)
        MULTIPLY_RS(c.o, c.p[step], v + (u64)(step * 2048 >> 4));
    wgmma_commit();
}

DEVICE void hold_tiles(float (*x)[4], int count) {
#pragma unroll
    for (int i = 0; i < 4 * count; i++)
        hold(x[i / 4][i % 4]);
}

DEVICE void wait_for_turn(const consumer &c) { named_barrier_sync(TURN + c.number, 256); }

DEVICE void pass_turn(const consumer &c) {
    named_barrier_arrive(TURN + (c.number + 1) % CONSUMERS, 256);
}

/* The first of the lane's two rows, counted from the block's first row. */
DEVICE int row_in_block(const consumer &c) {
    return c.number * 64 + thread_index() % 128 / 32 * 16 + thread_index() % 32 / 4;
}

DEVICE void mask_tile(const wan_attn_cuda_args &args, const block_work &work, const consumer &c,
                      int n, float s[S_TILES][4]) {
#pragma unroll
    for (int r = 0; r < 2; r++)
        mask_scores(s, r,
                    visible_keys(args, work.diagonal + row_in_block(c) + 8 * r, work.num_keys),
                    n * BLOCK_N + thread_index() % 4 * 2);
}

/* Scores become weights and add to row_sum. factor: by which what has been summed up before has to
 * be multiplied, row_sum being so already. Returns whether any in the warp is not 1. */
DEVICE bool weigh(consumer &c, float s[S_TILES][4], float factor[2], float scale_log2e) {
    const float new_max[2] = {grown_max(s, 0, c.row_max[0], scale_log2e),
                              grown_max(s, 1, c.row_max[1], scale_log2e)};
    bool has_grown = any_lane(new_max[0] > c.row_max[0] || new_max[1] > c.row_max[1]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float shift = P_SHIFT - new_max[r], sum = 0.0f;
        factor[r] = exp2_approx(c.row_max[r] - new_max[r]);
        c.row_max[r] = new_max[r];
#pragma unroll
        for (int j = 0; j < S_TILES; j++) {
            float *weight = &s[j][2 * r];
            weight[0] = exp2_approx(fused_multiply_add(weight[0], scale_log2e, shift));
            weight[1] = exp2_approx(fused_multiply_add(weight[1], scale_log2e, shift));
            sum = j == 0 ? weight[0] + weight[1] : sum + (weight[0] + weight[1]);
        }
        c.row_sum[r] = fused_multiply_add(c.row_sum[r], factor[r], sum);
    }
    return has_grown;
}

DEVICE void rescale(consumer &c, const float factor[2]) {
#pragma unroll
    for (int i = 0; i < O_TILES * 4; i++)
        c.o[i / 4][i % 4] *= factor[i % 4 / 2];
}

/* S tiles 2i and 2i + 1 are the A operand of 16 keys. */
DEVICE void pack_weights(consumer &c, const float s[S_TILES][4]) {
#pragma unroll
    for (int i = 0; i < V_STEPS * 4; i++) {
        const float *pair = &s[2 * (i / 4) + i % 4 / 2][2 * (i % 2)];
        c.p[i / 4][i % 4] = PACK(pair[0], pair[1]);
    }
}

/* Rows `begin` and further of the V tile that comes next become 0. All consumers. */
DEVICE void zero_v_tail(const consumer &c, int begin) {
    mbarrier_wait(barrier_at(FULL_V, c.v.stage), c.v.parity);
    u32 tile = shared_base() + V_SMEM + c.v.stage * KV_BYTES;
    const u32 zeros[4] = {0, 0, 0, 0};
    int thread = thread_index() - 128;
    for (int i = thread; i < BLOCK_N * 8; i += 128 * CONSUMERS)
        for (int panel = 0; panel < PANELS; panel++)
            if (i / 8 >= begin)
                store_shared_b32x4(tile + (u32)(panel * KV_PANEL + i * 16), zeros);
    fence_async_proxy();
    named_barrier_sync(ALL_CONSUMERS, 128 * CONSUMERS);
}

/* A negative softmax_scale: its sign goes into Q, each warpgroup to its own rows. */
DEVICE void flip_q(const consumer &c, u32 sign) {
    u32 rows = shared_base() + Q_SMEM + (u32)(c.number * 64 * 128);
    for (int i = thread_index() % 128; i < 64 * 8; i += 128)
        for (int panel = 0; panel < PANELS; panel++) {
            u32 x[4], at = rows + (u32)(panel * Q_PANEL + i * 16);
            load_shared_b32x4(x, at);
            for (int word = 0; word < 4; word++)
                x[word] ^= sign;
            store_shared_b32x4(at, x);
        }
    fence_async_proxy();
    named_barrier_sync(WARPGROUP + c.number, 128);
}

/* Tiles that only the other block sees. A warp's release is an arrival of one lane: all must have
 * seen the phase before it, or the next but one could come while a lane still looks for this one.
 * (Elsewhere products bring the lanes together.) */
DEVICE void skip_tiles(consumer &c, int count) {
    for (int i = 0; i < count; i++) {
        mbarrier_wait(barrier_at(FULL_K, c.k.stage), c.k.parity);
        warp_barrier();
        release(barrier_at(EMPTY_K, c.k.stage));
        mbarrier_wait(barrier_at(FULL_V, c.v.stage), c.v.parity);
        warp_barrier();
        release(barrier_at(EMPTY_V, c.v.stage));
        advance(c.k);
        advance(c.v);
    }
}

/* The tile that comes first, always masked: S, weights, and V without what is behind its end. */
DEVICE void first_tile(const sm90_args &args, const assignment &a, consumer &c) {
    float s[S_TILES][4], factor[2];
    int n = a.work.num_tiles - 1;
    mbarrier_wait(barrier_at(FULL_Q, 0), 0);
    if (args.call.q_sign)
        flip_q(c, args.call.q_sign);
    mbarrier_wait(barrier_at(FULL_K, c.k.stage), c.k.parity);
    start_qk(c, s);
    wgmma_wait<0>();
    hold_tiles(s, S_TILES);
    release(barrier_at(EMPTY_K, c.k.stage));
    advance(c.k);
    mask_tile(args.call, a.work, c, n, s);
    weigh(c, s, factor, args.call.scale_log2e);
    pack_weights(c, s);
    int tail = a.work.num_keys - n * BLOCK_N;
    if (tail < BLOCK_N)
        zero_v_tail(c, tail);
}

/* Tile n and V of the one before: the pipeline of this file's head. is_masked is a constant in each
 * of its two copies. */
DEVICE void process_tile(const sm90_args &args, const block_work &work, consumer &c, int n,
                         bool is_masked) {
    float s[S_TILES][4], factor[2];
    mbarrier_wait(barrier_at(FULL_K, c.k.stage), c.k.parity);
    wait_for_turn(c);
    start_qk(c, s);
    mbarrier_wait(barrier_at(FULL_V, c.v.stage), c.v.parity);
    start_pv(c);
    if (n > 0 || c.number < CONSUMERS - 1) /* no warp waits for the first turn after tile 0 */
        pass_turn(c);
    wgmma_wait<1>();
    hold_tiles(s, S_TILES);
    release(barrier_at(EMPTY_K, c.k.stage));
    if (is_masked)
        mask_tile(args.call, work, c, n, s);
    bool has_grown = weigh(c, s, factor, args.call.scale_log2e);
    hold_tiles(s, S_TILES);
    computed(c.row_sum[0], c.row_sum[1], shared_base());
    wgmma_wait<0>();
    hold_tiles(c.o, O_TILES);
    hold_tiles(s, S_TILES);
    release(barrier_at(EMPTY_V, c.v.stage));
    if (has_grown)
        rescale(c, factor);
    pack_weights(c, s);
    advance(c.k);
    advance(c.v);
}

DEVICE void process_tiles(const sm90_args &args, const assignment &a, consumer &c) {
    skip_tiles(c, a.skipped_before);
    first_tile(args, a, c);
    int n = a.work.num_tiles - 2;
    if (n >= 0 && c.number == CONSUMERS - 1)
        pass_turn(c); /* the first consumer begins */
    bool is_clean = n >= a.work.clean_begin && n < a.work.clean_end;
    while (n >= 0) {
        if (is_clean) {
            do {
                process_tile(args, a.work, c, n, false);
                n--;
            } while (n >= a.work.clean_begin);
            is_clean = false;
        } else {
            process_tile(args, a.work, c, n, true);
            n--;
            is_clean = n >= a.work.clean_begin && n < a.work.clean_end;
        }
    }
    mbarrier_wait(barrier_at(FULL_V, c.v.stage), c.v.parity);
    start_pv(c);
    wgmma_wait<0>();
    hold_tiles(c.o, O_TILES);
    release(barrier_at(EMPTY_V, c.v.stage));
    advance(c.v);
    skip_tiles(c, a.skipped_after);
}

/* The warpgroup's 64 rows through its part of Q's memory. */
DEVICE void store_by_tma(const sm90_args &args, const block_place &place, const consumer &c,
                         int used_q) {
    int row = place.row_begin + row_in_block(c);
    row_end end[2];
#pragma unroll
    for (int r = 0; r < 2; r++, row += 8)
        end[r] = finish_row(args.call, place, row, row < args.call.seqlen_q, used_q, c.row_max[r],
                            c.row_sum[r]);

    /* Lane 8i + x brings row x of matrix i: 0 and 1 are 16 rows of 8 columns, 2 and 3 of the next
     * 8 columns. All warps must have done with Q. */
    named_barrier_sync(WARPGROUP + c.number, 128);
    int lane = thread_index() % 32, warp = thread_index() % 128 / 32;
    u32 line = (u32)(warp * 16 + lane / 8 % 2 * 8 + lane % 8);
    u32 panel_at = shared_base() + Q_SMEM + (u32)(c.number * 64 * 128);
#pragma unroll
    for (int j = 0; j < O_TILES; j += 2) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *pair = &c.o[j + i / 2][2 * (i % 2)];
            float f = end[i % 2].factor;
            x[i] = end[i % 2].sees_none ? 0 : PACK(pair[0] * f, pair[1] * f);
        }
        u32 chunk = (u32)(j % 8 + lane / 16);
        stmatrix_x4(panel_at + (u32)(j / 8 * Q_PANEL) + line * 128 + (chunk ^ line % 8) * 16, x);
    }
    fence_async_proxy();
    named_barrier_sync(WARPGROUP + c.number, 128);
    if (thread_index() % 128 == 0) {
        for (int panel = 0; panel < PANELS; panel++)
            tma_store(&args.out, panel_at + (u32)panel * Q_PANEL, panel * 64,
                      place.row_begin + c.number * 64, place.head, place.sample);
        tma_store_commit();
        tma_store_wait_read();
    }
}

DEVICE void consume(const sm90_args &args, const assignment &a) {
    consumer c;
    c.number = uniform(thread_index() / 128 - 1);
    c.k = {0, 0};
    c.v = {0, 0};
    c.q_matrix = matrix_descriptor(shared_base() + Q_SMEM + (u32)(c.number * 64 * 128), 16);
    c.k_matrix = matrix_descriptor(shared_base() + K_SMEM, 16);
    c.v_matrix = matrix_descriptor(shared_base() + V_SMEM, KV_PANEL);
#pragma unroll
    for (int i = 0; i < O_TILES * 4; i++)
        c.o[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        c.row_max[r] = lowest();
        c.row_sum[r] = 0.0f;
    }
    if (a.work.num_tiles > 0)
        process_tiles(args, a, c);
    else
        skip_tiles(c, a.num_loaded);

    block_place place = find_place(args.call, BLOCK_M);
    int used_q = used_rows(args.call, place);
    if (place.row_begin + c.number * 64 >= args.call.seqlen_q)
        return;
    if (args.stores_by_tma)
        store_by_tma(args, place, c, used_q);
    else
        store_rows(args.call, place, place.row_begin + row_in_block(c), used_q, 1.0f, c.o,
                   c.row_max, c.row_sum);
}

/* All threads of the block, in a cluster of all blocks: barriers have been initialised. */
DEVICE void meet() {
    if (CLUSTER > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        block_barrier();
    }
}

WAN_ATTN_CLUSTER_KERNEL(KERNEL_NAME, NUM_THREADS, CLUSTER, wan_attn_cuda_sm90_args, args) {
    init_barriers(args);
    assignment a = find_assignment(args.call, BLOCK_M, BLOCK_N);
    meet();
    if (thread_index() < 128) {
        give_registers<REGS_PRODUCER>();
        if (thread_index() == 0)
            produce(args, a);
    } else {
        take_registers<REGS_CONSUMER>();
        consume(args, a);
    }
}
