/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx2.c - attention with AVX2, FMA and F16C; products in float32 for every dtype. The body:
 * sdpa_tile.inc.
 *
 * Budget: 4 x 3 accumulators + 3 + 1: all 16 registers; 12 FMA for 7 loads. Panel of 24 queries.
 * Measured, as a multiple of torch's SDPA (AMD EPYC, Zen 4, one core, 2026-11-21, 4 heads x 4096 x
 * 4096 x 128; docs/measured.md): fp32 1.20, bf16 1.28, fp16 2.01; 88 to 90 % of the
 * core's peak.
 */
#include <float.h>
#include <math.h>

#include "cpu/blocked.h"
#include "cpu/target.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

TARGET_BEGIN("avx2,fma,f16c")

#include "cpu/units_x86.h"
#include "cpu/vector_avx2.h"

#define VECTORS 3
#define ROWS 4
#define UNIT 1
#define BLOCK_N 128
#define DOT FMA

#define FEW_ROWS 20 /* of 24: measured */
#define ROW sdpa_avx2
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
