/* SPDX-License-Identifier: Apache-2.0
 * sdpa_backward.cuh - the gradient of exact attention for every GPU from sm_80 on: mma.sync
 * m16n8k16, cp.async, ldmatrix; f16 or bf16 operands, f32 sums. Rows sm75 are the same with what
 * Turing has instead, for f16 alone. Two kernels: dk and dv (OF_KEYS), and dq.
 *
 * Implements: FlashAttention-2's backward pass (Dao, arXiv 2307.08691, algorithm 2). Differs from
 * it: dq has a kernel of its own instead of being added to by the blocks of all keys. S and dP are
 * computed twice, seven products instead of five; for that no atomics, no f32 copy of dq, and the
 * same bits every time. And dS is scaled where it is f16 (backward_scale.cuh).
 *
 *                        n, from the last tile to the first
 *                   +-----------+ BLOCK_N others
 *                   | Y1(n)^T   |                        S = X1 Y1^T     P = exp2(S c - lse)
 *                   | Y2(n)^T   |                       dP = X2 Y2^T    dS = P (dP - delta)
 *     +----+----+   +-----------+   +-------+-------+
 *     | X1 | X2 |   |  P, dS    |   |  G1   |  G2   |   G1 += dS Y1     G2 += P Y2
 *     +----+----+   +-----------+   +-------+-------+
 *     BLOCK_M of its own; warp w has [w, w + 1) * 16 * M_TILES
 *
 *                own       others           X1  X2   Y1  Y2   G1  G2
 *     OF_KEYS    keys      query rows       K   V    Q   dO   dK  dV    of all heads of K and V
 *     else       rows      keys             Q   dO   K   V    dQ
 *
 * Own rows of P and dS are rows of the A operand whichever way, so that weights never leave their
 * registers: S^T is what tensor cores make of K and Q.
 * Who does what: all warps are alike. A thread copies the same rows and chunks of every tile
 * (swizzle.cuh); a warp multiplies its own with whole tiles. X stays in shared memory.
 * Pipeline: one barrier a tile, at which Y(n) has landed and all are done with Y(n + 1). STAGES =
 * 2: Y(n - 1) then starts, into that place, and is on its way through all of tile n. STAGES = 1: it
 * starts behind a second barrier, at the end.
 * Tiles run backwards, so that the ragged one comes first; it and those that a mask cuts have
 * their own copy of the loop body.
 * Budget, d128, OF_KEYS: 16 a warp: G 128 + S and dP 32 registers of at most 255. Shared memory:
 * args.h. No spills: tests/test_cuda_static_backward.py.
 * Limits: head_dim 64, 80 or 128; alignment as in args_backward.h; seqlen below 2^29, offsets are
 * 64 bits wide. A NaN or infinity reaches what a tile that a mask cuts has beside it (0 * NaN), but
 * never from rows without keys, from keys that nobody sees, or from behind the real lengths; and
 * these stay 0 whatever is beside them.
 * Numerics: scores, weights and sums in f32; P and dS are rounded to the operands' dtype;
 * exp2.approx.ftz. A tile's products are summed from zero and then added; dk and dv of head_dim 80
 * and 128, which leave no registers for that, are the tensor cores' own sums (multiply_pv.cuh). f16
 * weights are 2^P_SHIFT times as large, as in sdpa_sm80.cuh, and dS with them. A row with one key
 * has the weight 1, but for what lse was rounded by, and dS = dlse.
 * Measured: no GPU was at hand. What the instruction counts allow: benchmarks/backward_model.py.
 */
#include "cuda/args_backward.h"
#include "cuda/ptx/ptx.cuh"

#define NUM_THREADS (32 * NUM_WARPS)
#define PV_SUM_F16 0
#define QK_INT8 0
#define LISTED 0
#if IS_BF16
#define PACK pack_bf16
#define MMA mma_m16n8k16_bf16
#define P_SHIFT 0
#else
#define PACK pack_f16
#define MMA mma_m16n8k16_f16
#define P_SHIFT 13
#endif
#define PACK_P PACK
#define PV_IN_PARTS (!OF_KEYS || HEAD_DIM == 64) /* else G1 and G2 leave no registers for it */

#include "cuda/tile/backward_work.cuh"
#include "cuda/tile/multiply_pv.cuh"
#include "cuda/tile/output.cuh"
#include "cuda/tile/row_keys.cuh"

enum {
    K_STEPS = HEAD_DIM / 16,
    OWN_BYTES = BLOCK_M * ROW_BYTES,
    X1_SMEM = 0, /* offsets in shared memory */
    X2_SMEM = OWN_BYTES,
    Y_SMEM = 2 * OWN_BYTES, /* STAGES times Y1 and Y2 */
    STAGE_BYTES = 2 * TILE_BYTES,
    NUMBERS_SMEM = Y_SMEM + STAGES * STAGE_BYTES, /* of query rows that pass by */
    NUMBERS_BYTES = OF_KEYS * 64 * 8,
    WORK_SMEM = NUMBERS_SMEM + STAGES * NUMBERS_BYTES,
    SMEM_BYTES_ASKED = WAN_ATTN_CUDA_SMEM_BACKWARD(HEAD_DIM, OF_KEYS, BLOCK_M, BLOCK_N, STAGES)
};
static_assert(M_TILES * 16 * NUM_WARPS == BLOCK_M, "every warp has whole 16-row tiles");
static_assert(BLOCK_M % BLOCK_N == 0, "a block's own are copied as tiles");
static_assert(BLOCK_N <= 64, "a warp copies the numbers of a tile, two rows a lane");
static_assert(STAGES == 1 || STAGES == 2, "the pipeline is written for one or two tiles");
static_assert(WORK_SMEM + 32 == SMEM_BYTES_ASKED, "args.h must say what is used");

/* What a warp carries from tile to tile. */
typedef struct own_sums {
    float g1[M_TILES][O_TILES][4];
    float g2[OF_KEYS ? M_TILES : 1][OF_KEYS ? O_TILES : 1][4];
} own_sums;

/* Of a query row: what its exponents begin with, and what is added to dP. */
typedef struct row_numbers {
    float shift, minus_delta;
} row_numbers;

/* The others of one head on their way, and where a lane finds things. */
typedef struct other_tiles {
    tile_source y1, y2;
    const float *numbers; /* OF_KEYS: this thread's, of two query rows of tile 0 */
    u32 copied_to;        /* this thread's first chunk of a tile at the start of shared memory */
    /* This lane's row for ldmatrix, of a tile there: 16 rows by 16 of head_dim as the A operand of
     * X, or transposed as the B operand of Y in G += P Y; and as the B operand of S = X Y^T. */
    u32 read, read_b;
} other_tiles;

/* A block's constants. */
typedef struct own_numbers {
    float dp_scale, delta_scale; /* to that of dS */
    row_numbers of_rows[OF_KEYS ? 1 : M_TILES][2];
} own_numbers;

DEVICE u32 stage_of(int n) { return (u32)(n % STAGES); }

/* The first of the lane's two rows in an m tile, counted from the block's first. */
DEVICE int row_in_block(int m_tile) {
    return (thread_index() / 32 * M_TILES + m_tile) * 16 + thread_index() % 32 / 4;
}

DEVICE const char *head_of(const wan_attn_cuda_view &view, int sample, int head) {
    return (const char *)view.data + (sample * view.batch_stride + head * view.head_stride) * 2;
}

DEVICE row_numbers numbers_of(float lse, float delta, float delta_scale) {
    return {P_SHIFT - lse, -delta * delta_scale};
}

/* S = X Y^T for a warp's own. */
DEVICE void multiply_own(float s[M_TILES][S_TILES][4], u32 x_read, u32 x, u32 y_read, u32 y) {
#pragma unroll
    for (int i = 0; i < M_TILES * S_TILES * 4; i++)
        s[i / (S_TILES * 4)][i / 4 % S_TILES][i % 4] = 0.0f;
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        u32 a[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
            ldmatrix_x4(a[m], advanced(x_read, step) + x + (u32)(m * 16 * ROW_BYTES));
#pragma unroll
        for (int j = 0; j < S_TILES; j += 2) {
            u32 b[4];
            ldmatrix_x4(b, advanced(y_read, step) + y + (u32)(j * 8 * ROW_BYTES));
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                MMA(s[m][j], a[m], b[0], b[1]);
                MMA(s[m][j + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* Starts the copy of tile n; with a tail, of as many rows. */
DEVICE void copy_others(other_tiles &tiles, int n, bool has_tail, int rows) {
    u32 stage = stage_of(n), to = tiles.copied_to + Y_SMEM + stage * STAGE_BYTES;
    copy_tile(to, tiles.y1, has_tail, rows);
    copy_tile(to + TILE_BYTES, tiles.y2, has_tail, rows);
    if (OF_KEYS && thread_index() < 32)
        cp_async_16_or_zero(shared_base() + NUMBERS_SMEM + stage * NUMBERS_BYTES +
                                (u32)thread_index() * 16,
                            tiles.numbers + (i64)n * (4 * BLOCK_N),
                            2 * thread_index() >= (has_tail ? rows : BLOCK_N));
}

/* The numbers of the two query rows that a lane's elements e and e + 1 of S tile j belong to. */
DEVICE void take_numbers(row_numbers numbers[2][2], const own_numbers &own, int m, int j, int n) {
    if (OF_KEYS) {
        u32 words[4];
        load_shared_b32x4(words, shared_base() + NUMBERS_SMEM + stage_of(n) * NUMBERS_BYTES +
                                     (u32)(j * 64 + thread_index() % 4 * 16));
#pragma unroll
        for (int i = 0; i < 4; i++)
            numbers[i / 2][i % 2] =
                numbers_of(float_from_bits(words[i % 2 * 2]), float_from_bits(words[i % 2 * 2 + 1]),
                           own.delta_scale);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            numbers[i / 2][i % 2] = own.of_rows[OF_KEYS ? 0 : m][i / 2];
    }
}

/* Of one element of a masked tile: whether its query row sees this key, and no other. */
typedef struct element_mask {
    bool is_hidden, is_single;
} element_mask;

DEVICE element_mask mask_of(const wan_attn_cuda_backward_args &args, const own_work &work, int row,
                            int column, int n) {
    key_range met = met_by(args, work, row, n);
    int query = work.first + (OF_KEYS ? n * BLOCK_N + column : 0);
    if (!OF_KEYS) /* the key that the row is aligned with, less what keys are more than rows */
        query += work.diagonal + row - (work.used_k - work.used_q);
    return {column < met.begin || column >= met.end,
            count_keys(query, work.used_q, work.used_k, args.window_size_left,
                       args.window_size_right) == 1};
}

/* Scores become weights, and dP becomes dS. */
DEVICE void find_weights(const wan_attn_cuda_backward_args &args, const own_numbers &own, int n,
                         bool is_masked, float s[M_TILES][S_TILES][4],
                         float dp[M_TILES][S_TILES][4]) {
    own_work work = {};
    if (is_masked)
        work = load_work(shared_base() + WORK_SMEM);
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int j = 0; j < S_TILES; j++) {
            row_numbers numbers[2][2];
            take_numbers(numbers, own, m, j, n);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                row_numbers of_row = numbers[i / 2][i % 2];
                float weight =
                    exp2_approx(fused_multiply_add(s[m][j][i], args.scale_log2e, of_row.shift));
                float slope = dp[m][j][i];
                element_mask mask = {false, false};
                if (is_masked)
                    mask = mask_of(args, work, row_in_block(m) + i / 2 * 8,
                                   8 * j + thread_index() % 4 * 2 + i % 2, n);
                if (mask.is_single)
                    slope -= slope; /* NaN stays */
                slope = fused_multiply_add(slope, own.dp_scale, of_row.minus_delta);
                s[m][j][i] = mask.is_hidden ? 0.0f : weight;
                dp[m][j][i] = mask.is_hidden ? 0.0f : weight * slope;
            }
        }
}

/* Tile n: the pipeline of this file's head. is_masked is a constant in each of its two copies. */
DEVICE void process_tile(const wan_attn_cuda_backward_args &args, const own_numbers &own, int n,
                         bool is_masked, other_tiles &tiles, own_sums &sums) {
    u32 x_read = tiles.read + (u32)(thread_index() / 32 * (M_TILES * 16 * ROW_BYTES));
    u32 stage = Y_SMEM + stage_of(n) * STAGE_BYTES;
    u32 y_read = tiles.read + stage, y_read_b = tiles.read_b + stage;
    float s[M_TILES][S_TILES][4], dp[M_TILES][S_TILES][4];

    cp_async_wait<0>();
    block_barrier();
    if (STAGES == 2 && n > 0)
        copy_others(tiles, n - 1, false, 0);
    cp_async_commit();

    multiply_own(s, x_read, X1_SMEM, y_read_b, 0);
    multiply_own(dp, x_read, X2_SMEM, y_read_b, TILE_BYTES);
    find_weights(args, own, n, is_masked, s, dp);
#if OF_KEYS
    multiply_pv(sums.g2, s, y_read, TILE_BYTES);
#endif
    multiply_pv(sums.g1, dp, y_read, 0);

    if (STAGES == 1)
        block_barrier();
    if (STAGES == 1 && n > 0)
        copy_others(tiles, n - 1, false, 0);
    if (STAGES == 1)
        cp_async_commit();
}

/* This lane's and this thread's places in shared memory. */
DEVICE void find_places(other_tiles &tiles) {
    u32 r = (u32)thread_index() % 8, i = (u32)thread_index() % 32 / 8;
    tiles.copied_to = shared_base() + copied_to();
    tiles.read = shared_base() + swizzled(i % 2 * 8 + r, i / 2);
    tiles.read_b = shared_base() + swizzled(i / 2 * 8 + r, i % 2);
}

/* X1 and X2; those behind the real length become 0. */
DEVICE void copy_own(const wan_attn_cuda_backward_args &args, const own_place &place, int used,
                     u32 to) {
    const wan_attn_cuda_view &x1 = OF_KEYS ? args.k : args.q;
    const wan_attn_cuda_view &x2 = OF_KEYS ? args.v : args.dout;
    const int tiles = BLOCK_M / BLOCK_N, last = place.begin + (tiles - 1) * BLOCK_N;
    tile_source from1 = source_of(head_of(x1, place.sample, place.head), x1.row_stride, last);
    tile_source from2 = source_of(head_of(x2, place.sample, place.head), x2.row_stride, last);
    for (int tile = tiles - 1; tile >= 0; tile--) {
        int rows = used - place.begin - tile * BLOCK_N;
        copy_tile(to + X1_SMEM + (u32)(tile * TILE_BYTES), from1, true, rows);
        copy_tile(to + X2_SMEM + (u32)(tile * TILE_BYTES), from2, true, rows);
    }
}

/* Where the last tile of the others comes from, in the i-th of the heads that the block meets. The
 * place is cheap to find again, and not worth registers all through the main loop. */
DEVICE void find_others(const wan_attn_cuda_backward_args &args, const own_work &work, int i,
                        other_tiles &tiles) {
    own_place place = find_own(args);
    int share = args.heads_per_key_head;
    int head = OF_KEYS ? place.head * share + i : place.head / share;
    const wan_attn_cuda_view &y1 = OF_KEYS ? args.q : args.k;
    const wan_attn_cuda_view &y2 = OF_KEYS ? args.dout : args.v;
    int at = work.first + (work.num_tiles - 1) * BLOCK_N;
    tiles.y1 = source_of(head_of(y1, place.sample, head), y1.row_stride, at);
    tiles.y2 = source_of(head_of(y2, place.sample, head), y2.row_stride, at);
    i64 row = ((i64)place.sample * args.num_heads_q + head) * args.seqlen_q + work.first;
    tiles.numbers = args.rows + 4 * (row + 2 * thread_index());
}

/* dq: what is known of the lane's own rows; of those behind the real length: 0. */
DEVICE void load_own_numbers(const wan_attn_cuda_backward_args &args, const own_place &place,
                             int used_q, own_numbers &own) {
    i64 head = ((i64)place.sample * args.num_heads_q + place.head) * args.seqlen_q;
#pragma unroll
    for (int i = 0; i < 2 * M_TILES && !OF_KEYS; i++) {
        int row = place.begin + row_in_block(i / 2) + i % 2 * 8;
        float pair[2] = {0.0f, 0.0f};
        if (row < used_q)
            load_global_f32x2(pair, args.rows + 4 * (head + row));
        own.of_rows[OF_KEYS ? 0 : i / 2][i % 2] = numbers_of(pair[0], pair[1], own.delta_scale);
    }
}

/* From the last tile of a head to the first; clean ones in a loop of their own. */
DEVICE void process_tiles(const wan_attn_cuda_backward_args &args, const own_work &work,
                          const own_numbers &own, other_tiles &tiles, own_sums &sums) {
    int n = work.num_tiles - 1;
    copy_others(tiles, n, true, work.num_others - n * BLOCK_N);
    cp_async_commit();
    int clean_begin = work.clean_begin;
    bool is_clean = n >= clean_begin && n < work.clean_end;
    while (n >= 0) {
        if (is_clean) {
            do {
                process_tile(args, own, n, false, tiles, sums);
                n--;
            } while (n >= clean_begin);
            is_clean = false;
        } else {
            process_tile(args, own, n, true, tiles, sums);
            n--;
            is_clean = n >= clean_begin && n < load_work(shared_base() + WORK_SMEM).clean_end;
        }
    }
}

/* The i-th power of two of the block's key head. */
DEVICE float load_scale(const wan_attn_cuda_backward_args &args, const own_place &place, int i) {
    if (IS_BF16 || !args.scales)
        return 1.0f;
    int share = args.heads_per_key_head;
    int head = OF_KEYS ? place.head : place.head / share;
    i64 number = (i64)place.sample * (args.num_heads_q / share) + head;
    return load_global_f32(args.scales + number * WAN_ATTN_CUDA_BACKWARD_SCALES + i);
}

DEVICE void process_heads(const wan_attn_cuda_backward_args &args, const own_place &place,
                          const own_work &work, own_sums &sums) {
    own_numbers own;
    own.dp_scale = load_scale(args, place, 0);
    own.delta_scale = load_scale(args, place, 1);
    other_tiles tiles;
    find_places(tiles);
    copy_own(args, place, OF_KEYS ? work.used_k : work.used_q, tiles.copied_to);
    load_own_numbers(args, place, work.used_q, own);
    store_work(shared_base() + WORK_SMEM, work);
#pragma unroll 1
    for (int i = 0; i < (OF_KEYS ? args.heads_per_key_head : 1); i++) {
        block_barrier(); /* what there is to do is stored; all are done with the head before */
        own_work again = load_work(shared_base() + WORK_SMEM);
        find_others(args, again, i, tiles);
        process_tiles(args, again, own, tiles, sums);
    }
}

DEVICE void clear(float sums[M_TILES][O_TILES][4]) {
#pragma unroll
    for (int i = 0; i < M_TILES * O_TILES * 4; i++)
        sums[i / (O_TILES * 4)][i / 4 % O_TILES][i % 4] = 0.0f;
}

/* Sums times factor. What meets nobody, padding among it, becomes 0 and not what was summed up: its
 * weights are 0, but they may have met a NaN. */
DEVICE void store_gradient(const wan_attn_cuda_backward_args &args, const wan_attn_cuda_view &to,
                           bool is_f32, const own_place &place, int seqlen, float factor,
                           const float sums[M_TILES][O_TILES][4]) {
    int used_q = length_at(args.seqused_q, place.sample, args.seqlen_q);
    int used_k = length_at(args.seqused_k, place.sample, args.seqlen_k);
    i64 at = place.sample * to.batch_stride + place.head * to.head_stride;
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++) {
        int row = place.begin + row_in_block(i / 2) + i % 2 * 8;
        bool meets_any = meets_others(args, row, used_q, used_k);
        float values[O_TILES][2];
#pragma unroll
        for (int j = 0; j < O_TILES * 2; j++)
            values[j / 2][j % 2] =
                meets_any ? sums[i / 2][j / 2][i % 2 * 2 + j % 2] * factor : 0.0f;
        i64 first = at + row * to.row_stride;
        if (is_f32)
            store_row_f32((char *)to.data + first * 4, values, row < seqlen);
        else
            store_row_16bit((char *)to.data + first * 2, values, row < seqlen);
    }
}

WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, MIN_CTAS, wan_attn_cuda_backward_args, args) {
    own_place place = find_own(args);
    own_work work = find_own_work(args, place);
    own_sums sums;
    clear(sums.g1);
#if OF_KEYS
    clear(sums.g2);
#endif
    if (work.num_tiles > 0)
        process_heads(args, place, work, sums);
    place = find_own(args);
    const float unshifted = 1.0f / (1 << P_SHIFT);
    float factor = args.softmax_scale * load_scale(args, place, 2) * unshifted;
#if OF_KEYS
    store_gradient(args, args.dk, args.dk_is_f32, place, args.seqlen_k, factor, sums.g1);
    store_gradient(args, args.dv, args.dv_is_f32, place, args.seqlen_k,
                   load_scale(args, place, 3) * unshifted, sums.g2);
#else
    store_gradient(args, args.dq, args.dq_is_f32, place, args.seqlen_q, factor, sums.g1);
#endif
}
