/* SPDX-License-Identifier: Apache-2.0
 * backward_avx2.c - gradients of attention with AVX2, FMA and F16C; products in float32 for every
 * dtype. The body: backward_tile.inc.
 *
 * Budget: 4 x 3 accumulators + 3 + 1: all 16 registers; 12 FMA for 7 loads. Panels of 24 keys.
 * Measured, as a multiple of torch's SDPA (AMD EPYC, Zen 5, two threads, CPU time,
 * 2026-11-30, `bench backward`, 4096 x 4 x 128 and 8192 x 4 x 64):
 * fp32 1.17 and 1.17.
 */
#include <float.h>
#include <math.h>

#include "cpu/backward_blocked.h"
#include "cpu/target.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

TARGET_BEGIN("avx2,fma,f16c")

#include "cpu/units_x86.h"
#include "cpu/vector_avx2.h"

#define VECTORS 3
#define ROWS 4
#define UNIT 1
enum { PANEL = LANES * VECTORS, BLOCK_M = 192 };
#define DOT FMA
#define EXP2 exp2_degree5
#define ROW sdpa_backward_avx2

#include "cpu/squares.inc"
#include "cpu/product.inc"
#include "cpu/backward_tile.inc"
#include "cpu/backward_few.inc"
#include "cpu/backward_row.inc"
TARGET_END

#endif /* x86-64 */
