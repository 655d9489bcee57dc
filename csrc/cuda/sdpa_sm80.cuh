/* SPDX-License-Identifier: Apache-2.0
 * sdpa_sm80.cuh - exact attention for every GPU from sm_80 on: mma.sync m16n8k16, cp.async,
 * ldmatrix; f16 or bf16 operands, f32 sums. Rows sm75 are the same with what Turing has instead:
 * two m16n8k8, copies that are waited for, f16 products only (bf16 tensors: see Numerics). Rows qk8
 * are the same with scores of 8 bits (QK_INT8, tile/scores_int8.cuh), and are not exact.
 *
 * Implements: FlashAttention-2 (Dao, arXiv 2307.08691, algorithm 1). Differs from it: K has two
 * buffers, so that the next tile is on its way all the time; Q stays in registers where a warp has
 * 16 rows; rescaling O is skipped when no maximum grew (FlashAttention-4's idea, here without its
 * threshold, hence exact); outputs leave as whole sectors straight from registers.
 *
 *                    n, from the last tile to the first
 *              +-----------+ BLOCK_N keys
 *              |   K(n)^T  |                 S = Q K^T           mma, S stays in registers
 *              +-----------+                 P = exp2(S c - m c) registers; packed, it is the
 *     +------+ +-----------+ +------+                            A operand of the next mma
 *     |  Q   | |  S -> P   | |  O   |        O = O + P V         mma, O stays in registers
 *     +------+ +-----------+ +------+
 *     BLOCK_M rows; warp w has rows [w, w + 1) * 16 * M_TILES; no two warps share a row
 *
 * Who does what: all warps are alike. A thread copies the same rows and chunks of every tile
 * (swizzle.cuh); a warp multiplies its own rows with whole tiles.
 * Pipeline, STAGES = 2:
 *     barrier 1: K(n) has landed; all are done with V(n + 1) and K(n + 1)
 *         start V(n), start K(n - 1)        under way while S(n) and its softmax are computed
 *     barrier 2: V(n) has landed            K(n - 1) stays under way through P V
 * STAGES = 1: K(n - 1) starts after barrier 2, when all are done with K(n).
 * Tiles run backwards, so that the ragged one comes first; it and those that a mask cuts have
 * their own copy of the loop body, and the clean tiles between carry no trace of them.
 * Budget, d128: 16 rows a warp: O 64 + S 32 + Q 32 registers of at most 255; 32 rows: O 128 + S
 * 64, Q in shared memory. Shared memory: args.h. No spills: tests/test_cuda_static.py.
 * Limits: head_dim a multiple of 16, up to 256; alignment as in args.h; seqlen below 2^29, offsets
 * are 64 bits wide. A NaN or infinity in V reaches every row of a tile that a mask cuts, also rows
 * that do not see it (0 * NaN; README.md says why), but never from behind the real lengths.
 * Scores (in base 2) from 2^25 on leave f16 weights no room for what their maximum is rounded by: a
 * row may overflow, from 2^29 on it may also be 0. Sums of V that is not scaled may overflow where
 * |V| times the keys is beyond float32. A row whose maximum is below -2^14 may lack more than what
 * a skip_threshold's certificate says, by what P_SHIFT less that maximum is rounded by.
 * Numerics: scores, weights and sums in f32; P is rounded to the operands' dtype, its row sum is
 * not; exp2.approx.ftz; each tile's weights, and its P V on all cards but WIDE ones, are summed
 * from zero. With PV_SUM_F16 (rows pv16, for GeForce, where that product then runs twice as fast)
 * P and V are f16 and 32 keys at a time are summed in f16: eleven bits of P instead of bf16's
 * eight outweigh those roundings. V comes scaled (args.h), so that no sum of finite numbers can
 * overflow; NaN and infinities pass through.
 * bf16 on Turing: f16 has three bits more than bf16 and a far smaller range, so that every operand
 * comes with a power of two: K and V one a head (args.h), Q one a row, found as it is loaded, P
 * 2^P_SHIFT. The products then are those of the bf16 numbers; what is smaller than 2^-32 of its
 * head's or row's largest (of P: than 2^-27) loses bits. out is rounded to bf16 by integers.
 * Measured: no GPU was at hand. What the instruction counts allow: benchmarks/static_model.py.
 */
#include "cuda/args.h"
#include "cuda/ptx/ptx.cuh"

#ifndef QK_INT8 /* rows qk8 set it */
#define QK_INT8 0
#endif
#ifndef LISTED /* rows listed set it */
#define LISTED 0
#endif
#define POOLS (LISTED && !QK_INT8) /* pools_others; rows of 8-bit scores take lists alone */
#define SKIPS POOLS                /* a skip_threshold */
#define NUM_THREADS (32 * NUM_WARPS)
#if IS_BF16 /* of q and out */
#define PACK pack_bf16
#else
#define PACK pack_f16
#endif
#define BF16_AS_F16 (IS_BF16 && !HAS_BF16)
#if IS_BF16 && HAS_BF16 /* of products */
#define MMA mma_m16n8k16_bf16
#else
#define MMA mma_m16n8k16_f16
#endif
/* Weights are made 2^P_SHIFT times as large. Of f16 weights between 0 and 1 those below 2^-25
 * would be lost; there may be many, and all of the result where the largest weights meet a V of 0.
 * P_SHIFT is added to score - maximum within exp2's argument. It is no power of two, so that the
 * largest score's argument is exactly P_SHIFT after rounding. */
#if IS_BF16 && HAS_BF16 && !PV_SUM_F16
#define PACK_P pack_bf16
#define P_SHIFT 0
#else
#define PACK_P pack_f16
#define P_SHIFT (!PV_SUM_F16 ? 13 : QK_INT8 ? 7 : 9)
#endif

#include "cuda/tile/swizzle.cuh"
#if LISTED
#include "cuda/tile/walk_listed.cuh"
#else
#include "cuda/tile/walk_all.cuh"
#endif
#include "cuda/tile/softmax.cuh"
#if LISTED
#include "cuda/tile/means.cuh"
#endif
#include "cuda/tile/output.cuh"
#include "cuda/tile/multiply_pv.cuh"
#if QK_INT8
#include "cuda/tile/scores_int8.cuh"
#else
#include "cuda/tile/scores_16bit.cuh"
#endif

enum {
    V_SMEM = 0, /* offsets in shared memory */
    K_SMEM = TILE_BYTES,
    BOUNDS_SMEM = Q_SMEM + Q_BYTES,
    LOST_SMEM = BOUNDS_SMEM + 16 /* WAN_ATTN_CUDA_SMEM_LOST: SKIPS */
};
static_assert(M_TILES * 16 * NUM_WARPS == BLOCK_M, "every warp has whole 16-row tiles");
static_assert(STAGES == 1 || STAGES == 2, "the pipeline is written for one or two K tiles");
static_assert(LOST_SMEM == SMEM_BYTES_ASKED, "args.h must say what is used");

/* What a warp carries from tile to tile. */
typedef struct warp_rows {
    float o[M_TILES][O_TILES][4];
    float row_max[M_TILES][2], row_sum[M_TILES][2];
} warp_rows;

typedef struct key_tiles {
    k_source k;
    tile_source v;
    /* Of a tile at the start of shared memory: */
    u32 copied_to;      /* this thread's first chunk of V */
    u32 k_read, v_read; /* this lane's row for ldmatrix */
} key_tiles;

/* What only masked tiles need. It waits in shared memory: in registers it would be four more for
 * the whole of the main loop, which has none to spare. */
typedef struct mask_bounds {
    int num_keys, diagonal, clean_end; /* as in block_work */
    u32 first_block;                   /* SKIPS: the head's first, among those of all heads */
} mask_bounds;

DEVICE void store_bounds(const block_work &work, u32 first_block) {
    const u32 words[4] = {(u32)work.num_keys, (u32)work.diagonal, (u32)work.clean_end, first_block};
    if (thread_index() == 0)
        store_shared_b32x4(shared_base() + BOUNDS_SMEM, words);
}

DEVICE mask_bounds load_bounds() {
    u32 words[4];
    load_shared_b32x4(words, shared_base() + BOUNDS_SMEM);
    return {(int)words[0], (int)words[1], (int)words[2], words[3]};
}

#if SKIPS
#include "cuda/tile/lost.cuh"
#else
DEVICE bool skips(const wan_attn_cuda_args &) { return false; }
DEVICE u32 first_block_of(const wan_attn_cuda_args &, const block_place &) { return 0; }
#endif

/* Where a tile of K is in shared memory. */
DEVICE u32 k_stage(int turn) { return K_SMEM + (u32)turn % STAGES * K_TILE_BYTES; }

DEVICE key_tiles find_tiles(const wan_attn_cuda_args &args, const block_place &place,
                            int first_key) {
    key_tiles tiles;
    int head = place.head / args.heads_per_key_head;
    i64 v_at = place.sample * args.v.batch_stride + head * args.v.head_stride;
    tiles.k = find_k(args, place, head, first_key);
    tiles.v = source_of((const char *)args.v.data + v_at * 2, args.v.row_stride, first_key);
    tiles.copied_to = shared_base() + copied_to();
    /* Lane 8i + r brings row r of matrix i. V, transposed: matrices 0 and 1 are 16 keys for 8
     * columns; 2 and 3 the same for the next 8 columns. */
    u32 r = (u32)thread_index() % 8, i = (u32)thread_index() % 32 / 8;
    tiles.k_read = shared_base() + k_read_at(i, r);
    tiles.v_read = shared_base() + swizzled(i % 2 * 8 + r, i / 2);
    return tiles;
}

/* Which copy of the loop body: no row needs a mask, or some do; or, with lists of blocks, a tile of
 * means (means.cuh). */
typedef enum tile_kind { CLEAN, MASKED, MEANS } tile_kind;

DEVICE void weigh(const wan_attn_cuda_args &args, int n, tile_kind kind, const mask_bounds &bounds,
                  const tile_walk &walk, const q_fragments &q, float s[M_TILES][S_TILES][4],
                  warp_rows &rows) {
    float scale[M_TILES][2];
    (void)walk; /* a dense call's says nothing */
    score_scales(scale, args, q);
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int r = 0; r < 2 && kind == MASKED; r++)
            mask_scores(
                s[m], r,
                visible_keys(args, bounds.diagonal + row_in_block(m) + 8 * r, bounds.num_keys),
                n * BLOCK_N + thread_index() % 4 * 2);
#if POOLS
#pragma unroll
        for (int r = 0; r < 2 && kind == MEANS; r++) {
            score_means(args, s[m], m, r, scale[m][r], walk.bits, bounds.num_keys, bounds.diagonal,
                        n);
            scale[m][r] = 1.0f;
        }
        if (kind == MEANS && n == (blocks_of(bounds.num_keys) - 1) / BLOCK_N)
            score_last_mean(s[m], bounds.num_keys);
#endif
        softmax_tile(s[m], rows.o[m], rows.row_max[m], rows.row_sum[m], scale[m], m, skips(args));
    }
}

/* From tile n to `next`, unless there is none. */
DEVICE void turn_sources(key_tiles &tiles, int n, int next) {
    int back = next >= 0 ? n - next : 0;
    go_back(tiles.v, back);
    go_back(tiles.k, back);
}

/* Barrier 2. */
DEVICE void wait_for_v() {
    cp_async_wait<STAGES - 1>();
    block_barrier();
}

/* Tile n: the pipeline of this file's head; n - 1 stands there for the walk's next tile. kind is a
 * constant in each of the copies. */
DEVICE void process_tile(const wan_attn_cuda_args &args, int n, tile_kind kind, tile_walk &walk,
                         const q_fragments &q, key_tiles &tiles, warp_rows &rows) {
    float s[M_TILES][S_TILES][4];
    u32 k_smem = k_stage(turn_of(walk, n)), k_smem_next = k_stage(turn_of(walk, n) + 1);
    bool is_mine = kind == MEANS || is_of_warp(walk, n);
    if (kind == MEANS)
        step_back(walk, n);
    else
        look_ahead(walk, n);
    int next = next_tile(walk, n);

    cp_async_wait<0>();
    block_barrier();
    mask_bounds bounds = {0, 0, 0, 0};
    if (kind != CLEAN)
        bounds = load_bounds();
    key_range v_rows = {0, bounds.num_keys};
#if POOLS
    if (kind == MEANS)
        v_rows = seen_means(args, bounds.num_keys, bounds.diagonal);
#endif
    copy_tile(tiles.copied_to + V_SMEM, tiles.v, kind != CLEAN, v_rows.end - n * BLOCK_N,
              kind == MEANS ? v_rows.begin - n * BLOCK_N : 0);
    cp_async_commit();
    /* Not within the branch: on Turing V's and K's loads then are under way together. */
    if (STAGES == 2)
        turn_sources(tiles, n, next);
    if (STAGES == 2 && next >= 0)
        copy_k(k_smem_next, tiles.copied_to, tiles.k, false, 0);
    if (STAGES == 2)
        cp_async_commit();

    /* A warp that only keeps step has a way of its own: with S alive across the barrier on one way
     * alone, ptxas spills for sm_90. With one m tile a warp it is the other way round, on Turing,
     * and with one buffer of K, whose next tile comes on both ways. */
    if (!is_mine && M_TILES > 1 && STAGES == 2) {
        wait_for_v();
        return;
    }
    if (is_mine)
        multiply_qk(s, q, k_smem, tiles.k_read);
#if SKIPS
    if (is_mine && kind == CLEAN && skips(args))
        is_mine = !leave_out(args, n + (i64)load_bounds().first_block, q, s, rows.row_max);
#endif
    if (is_mine)
        weigh(args, n, kind, bounds, walk, q, s, rows);

    wait_for_v();
    if (STAGES == 1 && next >= 0) {
        turn_sources(tiles, n, next);
        copy_k(k_smem_next, tiles.copied_to, tiles.k, false, 0);
    }
    if (STAGES == 1)
        cp_async_commit();
    if (is_mine)
        multiply_pv(rows.o, s, tiles.v_read + V_SMEM);
}

DEVICE void clear(warp_rows &rows) {
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int j = 0; j < O_TILES * 4; j++)
            rows.o[m][j / 4][j % 4] = 0.0f;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            rows.row_max[m][r] = lowest();
            rows.row_sum[m][r] = 0.0f;
        }
    }
}

#if POOLS
/* Blocks that are not listed, from the last tile of their means to the first. */
DEVICE void process_means(const wan_attn_cuda_args &args, tile_walk &walk, const q_fragments &q,
                          key_tiles &tiles, warp_rows &rows) {
    block_barrier(); /* if there was no tile so far: bounds */
    int blocks = blocks_of(load_bounds().num_keys), last = (blocks - 1) / BLOCK_N;
    find_means(tiles.k, tiles.v, args, find_place(args, BLOCK_M), last);
    copy_k(k_stage(walk.turn), tiles.copied_to, tiles.k, true, blocks - last * BLOCK_N);
    cp_async_commit();
    for (int m = last; m >= 0; m--) {
        if (m == last || m % GROUP_MEANS == GROUP_MEANS - 1)
            walk.bits = find_bits<32>(args, m / GROUP_MEANS * 1024).own;
        process_tile(args, m, MEANS, walk, q, tiles, rows);
    }
}
#endif

/* From the last tile to the first; clean ones in a loop of their own. */
DEVICE void process_tiles(const wan_attn_cuda_args &args, const block_place &place,
                          block_work &work, warp_rows &rows) {
    tile_walk walk;
    int n = begin_walk(walk, args, work);
    key_tiles tiles = find_tiles(args, place, work.first_key + n * BLOCK_N);
    if (!LISTED || n >= 0)
        copy_k(k_stage(turn_of(walk, n)), tiles.copied_to, tiles.k, true,
               work.num_keys - n * BLOCK_N);
    cp_async_commit();
    q_fragments q;
    load_q(args, place, work.used_q, q);
    store_bounds(work, first_block_of(args, place));
    clear(rows);
#if SKIPS
    begin_lost(rows.row_max, work.used_q - place.row_begin);
#endif
    bool is_clean = n >= work.clean_begin && n < work.clean_end;
    while (n >= 0) {
        if (is_clean) {
            do {
                process_tile(args, n, CLEAN, walk, q, tiles, rows);
                n = next_tile(walk, n);
            } while (n >= work.clean_begin);
            is_clean = false;
        } else {
            process_tile(args, n, MASKED, walk, q, tiles, rows);
            n = next_tile(walk, n);
            is_clean = n >= work.clean_begin && n < load_bounds().clean_end;
        }
        if (LISTED && n < 0) {
            int before = last_tile(n);
            n = resume_walk(walk, args, n);
            go_back(tiles.v, before - n);
            go_back(tiles.k, before - n);
            if (n >= 0)
                copy_k(k_stage(turn_of(walk, n)), tiles.copied_to, tiles.k, false, 0);
            cp_async_commit();
            is_clean = n >= work.clean_begin && n < load_bounds().clean_end;
        }
    }
#if POOLS
    if (listed_of(args).pooled_k)
        process_means(args, walk, q, tiles, rows);
#endif
#if SKIPS
    if (skips(args)) {
        block_place again = find_place(args, BLOCK_M);
        tell_lost(args, rows.row_sum, used_rows(args, again) - again.row_begin);
    }
#endif
}

#if LISTED
WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, MIN_CTAS, wan_attn_cuda_listed_args, listed) {
    const wan_attn_cuda_args &args = listed.call;
#else
WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, MIN_CTAS, wan_attn_cuda_args, args) {
#endif
    block_place place = find_place(args, BLOCK_M);
    block_work work = find_work(args, place, BLOCK_M, BLOCK_N);
    warp_rows rows;
    if (work.num_tiles > 0)
        process_tiles(args, place, work, rows);
    else
        clear(rows);
    place = find_place(args, BLOCK_M);
    int used_q = used_rows(args, place);
    float scale = 1.0f;
    if (PV_SUM_F16 || BF16_AS_F16) {
        int head = place.head / args.heads_per_key_head;
        int num_heads_k = args.num_heads_q / args.heads_per_key_head;
        scale = load_global_f32(args.v_scale + (i64)place.sample * num_heads_k + head);
    }
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
        store_rows(args, place, place.row_begin + row_in_block(m), used_q, scale, rows.o[m],
                   rows.row_max[m], rows.row_sum[m]);
}
