/* SPDX-License-Identifier: Apache-2.0
 * sdpa_amx.c - attention in bfloat16 with AMX: tdpbf16ps multiplies 16 x 32 by 32 x 16 numbers at
 * once. Everything but the products and what they read is that of AVX512-BF16: sdpa_tile.inc.
 *
 *            32 queries   B0     B1      C = A B for 32 x 32 numbers in four tiles, two tiles of A,
 *                      +------+------+   two of B: each step loads four tiles for four products.
 *   32 keys or      A0 |  C0  |  C1  |
 *   rows of V^T     A1 |  C2  |  C3  |   S^T = K Q^T: A is K as it lies in memory, cut into tiles.
 *                      +------+------+   O^T = V^T P^T: A is V^T, pairs along the keys.
 *
 * Who does what: the tile unit works through products while the vectors of the same thread do the
 * chores of the step before: add its products to O^T, take the maxima of its scores.
 * Budget: 8 of 8 tiles. Panel of 64 queries: S of a block, 48 KiB, is about what L1 holds; longer
 * blocks are slower. head_dim is padded with zeros to a multiple of 32.
 * Numerics: as sdpa_avx512_bf16.c, but a product of tiles sums even and odd terms apart.
 * Calls of up to FEW_ROWS queries: sdpa_few.inc, which has not run with this row yet.
 * Measured: Intel Xeon with AMX, one core, 2026-11-26, 4 heads x 4096 x 4096 x 128: 850 GFLOP/s,
 * 1.35 times torch's AMX path and 22 % of the tile unit's peak.
 * Exponentials and the way from L2 to the tiles bound it, not the products.
 */
#include <float.h>
#include <math.h>

#include "cpu/amx_permission.h"
#include "cpu/blocked.h"
#include "cpu/target.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")

#include "cpu/units_x86.h"
#include "cpu/vector_avx512.h"
#include "cpu/vector_avx512_bf16.h"

#define VECTORS 4
#define STEP 32
#define UNIT 2
#define BLOCK_N 192
#define PREFETCHES (BLOCK_N / STEP * 4)
#define EXP2 exp2_degree5

#include "cpu/sdpa_tile.inc"
#include "cpu/squares.inc"
#include "cpu/sdpa_pack.inc"

/* A tile: 16 rows of 64 bytes. */
enum { TILE_ROWS = 16, TILE_UNITS = 16, TILE = TILE_ROWS * TILE_UNITS };

/* What ldtilecfg reads: all eight tiles whole. */
typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* Compilers do not know what memory the tile instructions read. */
#if defined(__GNUC__)
#define MEMORY_BARRIER() __asm__ volatile("" ::: "memory")
#else
#define MEMORY_BARRIER() _ReadWriteBarrier()
#endif

/* K: [BLOCK_N / 16][depth / 16] tiles, a row for a key, a unit for two of its numbers. */
static void pack_k_tiles(const wan_attn_plan *plan, int64_t b, int64_t head_k,
                         const wan_attn_packed_block *to) {
    const wan_attn_view *k = &plan->p->k;
    int64_t padded = (to->count + STEP - 1) / STEP * STEP;
    for (int64_t n = 0; n < padded; n++) {
        const void *row =
            n < to->count ? wan_attn_row_address(k, b, to->first_key + n, head_k) : NULL;
        float *tile_row =
            to->k + n / TILE_ROWS * TILE_ROWS * plan->depth + n % TILE_ROWS * TILE_UNITS;
        for (int64_t u = 0; u < plan->depth; u += UNIT_LANES)
            store_units(tile_row + u / TILE_UNITS * TILE + u % TILE_UNITS,
                        row ? row_units(row, k->dtype, u, plan->p->head_dim, 1.0f) : zero_units());
    }
}

/* Eight numbers of row n of V from d on, as floats; zeros behind the last key. */
static inline units v_row(const wan_attn_plan *plan, int64_t b, int64_t head_k,
                          const wan_attn_packed_block *to, int64_t n, int64_t d) {
    const wan_attn_view *v = &plan->p->v;
    return n < to->count ? load_floats(wan_attn_row_address(v, b, to->first_key + n, head_k),
                                       v->dtype, d, plan->p->head_dim)
                         : zero_units();
}

/* V^T: [width / 16][BLOCK_N / 32] tiles, a row for a row of V^T, a unit for two neighbour keys. */
static void pack_v_tiles(const wan_attn_plan *plan, int64_t b, int64_t head_k,
                         const wan_attn_packed_block *to) {
    units taint = zero_units();
    int64_t padded = (to->count + STEP - 1) / STEP * STEP;
    for (int64_t n = 0; n < padded; n += 2 * UNIT_LANES)
        for (int64_t d = 0; d < plan->width; d += UNIT_LANES) {
            units x[UNIT_LANES];
            for (int64_t i = 0; i < UNIT_LANES; i++) {
                units even = v_row(plan, b, head_k, to, n + 2 * i, d);
                units odd = v_row(plan, b, head_k, to, n + 2 * i + 1, d);
                taint = add_taint(add_taint(taint, even), odd);
                x[i] = pair_lanes(even, odd);
            }
            transpose_units(x);
            float *tile = to->v + (d / TILE_ROWS * (BLOCK_N / 32) + n / 32) * TILE;
            for (int64_t i = 0; i < UNIT_LANES; i++)
                store_units(tile + (d % TILE_ROWS + i) * TILE_UNITS + n % 32 / 2, x[i]);
        }
    *to->has_nonfinite_v = (uint8_t)is_tainted(taint);
}

static void pack_key_tiles(const wan_attn_plan *plan, int64_t b, int64_t head_k,
                           const wan_attn_packed_block *to) {
    pack_k_tiles(plan, b, head_k, to);
    pack_v_tiles(plan, b, head_k, to);
}

/* What vectors do while the tile unit multiplies: both wait little for each other, if the code of
 * both is close together. Only one of the two is given, or none.
 * O^T += the products of the previous step, or the maxima of the previous scores. */
typedef struct chores {
    const float *sum, *alpha; /* [32][32]; [32]                           */
    float *o;                 /* [32][PANEL], 32 of its columns           */
    int is_fresh;             /* o is not there yet                       */
    const float *s;           /* [rows][PANEL]                            */
    float *top;               /* [PANEL]                                  */
    int64_t rows;             /* still to be done                         */
} chores;

static inline void do_chores(chores *c, int64_t most) {
    int64_t rows = c->rows < most ? c->rows : most;
    c->rows -= rows;
    if (c->sum) {
        VEC alpha0 = LOAD(c->alpha), alpha1 = LOAD(c->alpha + LANES);
        for (int64_t i = 0; i < rows; i++, c->sum += 32, c->o += PANEL) {
            VEC sum0 = LOAD(c->sum), sum1 = LOAD(c->sum + LANES);
            STORE(c->o, c->is_fresh ? sum0 : FMA(LOAD(c->o), alpha0, sum0));
            STORE(c->o + LANES, c->is_fresh ? sum1 : FMA(LOAD(c->o + LANES), alpha1, sum1));
        }
    } else if (c->s) {
        VEC top[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            top[v] = LOAD(c->top + v * LANES);
        for (int64_t i = 0; i < rows; i++, c->s += PANEL)
            for (int v = 0; v < VECTORS; v++)
                top[v] = MAX(LOAD(c->s + v * LANES), top[v]);
        for (int v = 0; v < VECTORS; v++)
            STORE(c->top + v * LANES, top[v]);
    }
}

/* c[32][c_stride] = sum over tiles of a0, a1 times b. Tiles of a0 and of a1 lie one behind another;
 * b advances by 16 rows. After each tile, `rows` rows of the chores are done. */
static inline void multiply_tiles(const float *a0, const float *a1, const float *b, int64_t tiles,
                                  float *c, int64_t c_stride, chores *work, int64_t rows) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < tiles; t++, a0 += TILE, a1 += TILE, b += TILE_ROWS * PANEL) {
        _tile_loadd(4, a0, 64);
        _tile_loadd(6, b, PANEL * 4);
        _tile_loadd(7, b + 16, PANEL * 4);
        _tile_loadd(5, a1, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        do_chores(work, rows);
    }
    _tile_stored(0, c, c_stride * 4);
    _tile_stored(1, c + 16, c_stride * 4);
    _tile_stored(2, c + 16 * c_stride, c_stride * 4);
    _tile_stored(3, c + 16 * c_stride + 16, c_stride * 4);
    MEMORY_BARRIER();
}

/* The maxima are brought up to date one step late; the last step's are left to the caller. */
static int64_t block_scores(const wan_attn_plan *plan, const wan_attn_packed_block *keys,
                            const panel *x, block_range r, float *s, float *top) {
    const int64_t tiles = plan->depth / TILE_UNITS;
    const int64_t rows = (STEP + tiles * (PANEL / 32) - 1) / (tiles * (PANEL / 32));
    MEMORY_BARRIER();
    for (int64_t n = r.first; n < r.last; n += STEP) {
        const float *a = keys->k + n * plan->depth;
        chores maxima = {.top = top};
        if (n > r.first)
            maxima.s = s + (n - STEP) * PANEL, maxima.rows = STEP;
        for (int i = 0; i < PREFETCHES / (BLOCK_N / STEP); i++)
            prefetch_row(x->ahead);
        for (int64_t m = 0; m < PANEL; m += 32)
            multiply_tiles(a, a + TILE_ROWS * plan->depth, x->q_t + m, tiles, s + n * PANEL + m,
                           PANEL, &maxima, rows);
    }
    int64_t steps = (r.last - r.first + STEP - 1) / STEP;
    return r.first + (steps > 1 ? steps - 1 : 0) * STEP;
}

static void block_values(const wan_attn_plan *plan, const wan_attn_packed_block *keys,
                         const panel *x, block_range r, float *p) {
    const int64_t first = r.first / 32, tiles = (r.last + 31) / 32 - first;
    const int64_t rows = (32 + tiles - 1) / tiles;
    float sums[2][32 * 32];
    chores last = {0};
    int turn = 0;
    for (int64_t row = (r.last + 1) / 2; row < (first + tiles) * 16; row++)
        memset(p + row * PANEL, 0,
               PANEL * sizeof(float)); /* weights of the keys that only fill up */
    MEMORY_BARRIER();
    for (int64_t m = 0; m < PANEL; m += 32)
        for (int64_t d = 0; d < plan->width; d += 32, turn = !turn) {
            const float *a = keys->v + (d / TILE_ROWS * (BLOCK_N / 32) + first) * TILE;
            multiply_tiles(a, a + BLOCK_N / 32 * TILE, p + first * 16 * PANEL + m, tiles,
                           sums[turn], 32, &last, rows);
            last = (chores){.sum = sums[turn],
                            .alpha = x->alpha + m,
                            .o = x->o_t + d * PANEL + m,
                            .is_fresh = x->is_fresh,
                            .rows = 32};
        }
    do_chores(&last, last.rows);
}

typedef void compute_fn(const wan_attn_plan *plan, const wan_attn_tile *tile,
                        const wan_attn_tile *next, float *scratch);

static inline void with_tiles(compute_fn *compute, const wan_attn_plan *plan,
                              const wan_attn_tile *tile, const wan_attn_tile *next,
                              float *scratch) {
    tile_config config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = TILE_UNITS * 4;
        config.rows[t] = TILE_ROWS;
    }
    _tile_loadconfig(&config);
    compute(plan, tile, next, scratch);
    _tile_release(); /* or the system saves 8 KiB more at every switch of threads */
}

static void compute_tile_with_tiles(const wan_attn_plan *plan, const wan_attn_tile *tile,
                                    const wan_attn_tile *next, float *scratch) {
    with_tiles(compute_tile, plan, tile, next, scratch);
}

static compute_fn compute_listed; /* sdpa_lists.inc */

static void compute_listed_with_tiles(const wan_attn_plan *plan, const wan_attn_tile *tile,
                                      const wan_attn_tile *next, float *scratch) {
    with_tiles(compute_listed, plan, tile, next, scratch);
}

#define FEW_ROWS (PANEL / 4) /* an estimate: its float32 products are slower than this row's */
#define ROW sdpa_amx
#define REFUSAL wan_attn_amx_refusal()
#define PACK pack_key_tiles
#define COMPUTE compute_tile_with_tiles
#define COMPUTE_LISTED compute_listed_with_tiles
#define DEPTH_MULTIPLE TILE_UNITS
#define WIDTH_MULTIPLE 32
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
