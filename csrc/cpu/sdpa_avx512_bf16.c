/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx512_bf16.c - attention in bfloat16 with AVX512-BF16: vdpbf16ps adds the products of two
 * pairs to a float32, at twice the rate of float32 products. The body: sdpa_tile.inc.
 *
 * Budget: 8 x 3 accumulators + 3 + 1 of 32 registers; 24 vdpbf16ps for 11 loads. Panel of 48
 * queries.
 * Numerics: float32 query and key are rounded to bfloat16, as torch does; P is rounded to bfloat16,
 * row_sum adds up what it was before. vdpbf16ps takes subnormal numbers for zero. Calls of up to
 * FEW_ROWS queries have products in float32 instead (sdpa_few.inc).
 * Measured, as a multiple of torch's SDPA (AMD EPYC, Zen 4, one core, 2026-11-21, 4 heads x 4096 x
 * 4096 x 128; docs/measured.md): 2.51; 88 % of the core's peak.
 */
#include <float.h>
#include <math.h>

#include "cpu/blocked.h"
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
#define BLOCK_N 512 /* O is loaded and stored less often than with 128: +1.5 % */

#define DOT DOT_PAIRS

#define FEW_ROWS (PANEL / 4) /* an estimate: its float32 products are slower than this row's */
#define ROW sdpa_avx512_bf16
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
