/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx512.c - attention with AVX-512 (F, BW, VL, DQ); products in float32 for every dtype. The
 * body: sdpa_tile.inc.
 *
 * Budget: 8 x 3 accumulators + 3 + 1 of 32 registers; 24 FMA for 11 loads. Panel of 48 queries.
 */
#include <float.h>
#include <math.h>

#include "cpu/blocked.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

/* For this file alone, and in the source, so that every build and every tool agrees. MSVC needs no
 * permission. */
#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))),                   \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif

#include "cpu/units_x86.h"
#include "cpu/vector_avx512.h"

#define VECTORS 3
#define ROWS 8
#define STEP ROWS
#define PREFETCHES (BLOCK_N / ROWS)
#define UNIT 1
#define BLOCK_N 128
#define DOT FMA
#define EXP2 exp2_degree5

#include "cpu/sdpa_tile.inc"
#include "cpu/sdpa_pack.inc"
#include "cpu/sdpa_fma.inc"

static const wan_attn_blocking BLOCKING = {.unit = UNIT,
                                           .block_n = BLOCK_N,
                                           .panel = PANEL,
                                           .depth_multiple = 1,
                                           .width_multiple = UNIT_LANES,
                                           .pack = pack_keys,
                                           .compute = compute_tile};

const char *wan_attn_sdpa_avx512_plan(wan_attn_problem *p) {
    return wan_attn_blocked_plan(p, &BLOCKING);
}

wan_attn_status wan_attn_sdpa_avx512(const wan_attn_problem *p, wan_attn_error *err) {
    (void)err;
    wan_attn_blocked_run(p);
    return WAN_ATTN_OK;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif /* x86-64 */
