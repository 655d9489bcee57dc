/* SPDX-License-Identifier: Apache-2.0
 * backward_avx512.c - gradients of attention with AVX-512 (F, BW, VL, DQ); products in float32 for
 * every dtype. The body: backward_tile.inc.
 *
 * Budget: 8 x 3 accumulators + 3 + 1 of 32 registers; 24 FMA for 11 loads. Panels of 48 keys.
 * Measured, as a multiple of torch's SDPA (AMD EPYC, Zen 5, two threads, CPU time,
 * 2026-11-30, `bench backward`, 4096 x 4 x 128 and 8192 x 4 x 64):
 * fp32 2.00 and 1.88.
 */
#include <float.h>
#include <math.h>

#include "cpu/backward_blocked.h"
#include "cpu/target.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

#include "cpu/units_x86.h"
#include "cpu/vector_avx512.h"

#define VECTORS 3
#define ROWS 8
#define UNIT 1
enum { PANEL = LANES * VECTORS, BLOCK_M = 192 };
#define DOT FMA
#define EXP2 exp2_degree5
#define ROW sdpa_backward_avx512

#include "cpu/squares.inc"
#include "cpu/product.inc"
#include "cpu/backward_tile.inc"
#include "cpu/backward_few.inc"
#include "cpu/backward_row.inc"
TARGET_END

#endif /* x86-64 */
