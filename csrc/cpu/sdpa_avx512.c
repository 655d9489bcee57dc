/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx512.c - attention with AVX-512 (F, BW, VL, DQ); products in float32 for every dtype. The
 * body: sdpa_tile.inc.
 *
 * Budget: 8 x 3 accumulators + 3 + 1 of 32 registers; 24 FMA for 11 loads. Panel of 48 queries.
 * Measured, as a multiple of torch's SDPA (AMD EPYC, Zen 4, one core, 2026-11-21, 4 heads x 4096 x
 * 4096 x 128; docs/measured.md): fp32 1.24, fp16 2.05; 90 and 91 % of the core's peak.
 */
#include <float.h>
#include <math.h>

#include "cpu/blocked.h"
#include "cpu/target.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

#include "cpu/units_x86.h"
#include "cpu/vector_avx512.h"

#define VECTORS 3
#define ROWS 8
#define UNIT 1
#define BLOCK_N 128
#define DOT FMA

#define ROW sdpa_avx512
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
