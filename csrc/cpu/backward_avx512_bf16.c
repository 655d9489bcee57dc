/* SPDX-License-Identifier: Apache-2.0
 * backward_avx512_bf16.c - gradients of attention with AVX512-BF16: products of bfloat16 pairs,
 * sums in float32. The body: backward_tile.inc.
 *
 * Budget: as backward_avx512.c, with vdpbf16ps for FMA.
 * Measured, as a multiple of torch's SDPA (AMD EPYC, Zen 5, two threads, CPU time,
 * 2026-11-30, `bench backward`, 4096 x 4 x 128 and 8192 x 4 x 64):
 * 2.34 and 2.21.
 */
#include <float.h>
#include <math.h>

#include "cpu/backward_blocked.h"
#include "cpu/target.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

#include "cpu/units_x86.h"
#include "cpu/vector_avx512.h"
#include "cpu/vector_avx512_bf16.h"

#define VECTORS 3
#define ROWS 8
#define UNIT 2
enum { PANEL = LANES * VECTORS, BLOCK_M = 192 };

static inline __m512 DOT(__m512 a, __m512 b, __m512 c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}

#define EXP2 exp2_degree5
#define ROW sdpa_backward_avx512_bf16

#include "cpu/squares.inc"
#include "cpu/product.inc"
#include "cpu/backward_tile.inc"
#include "cpu/backward_few.inc"
#include "cpu/backward_row.inc"
TARGET_END

#endif /* x86-64 */
