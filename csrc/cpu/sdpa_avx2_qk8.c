/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx2_qk8.c - attention with 8-bit scores (qk8.h) with AVX2, in products of int16 pairs, P V
 * too. The body: sdpa_tile.inc, with the products of sdpa_qk8.inc and sdpa_qk8_values.inc.
 *
 * Budget: 4 x 3 accumulators, two vectors of Q^T or P^T, a pair of K or V^T and a product: all 16
 * registers. Two channels or keys of a register tile are 12 vpmaddwd and 12 vpaddd for 10 loads,
 * where float32 has 24 FMA for 14.
 * Measured, as a multiple of sdpa_avx2 (AMD EPYC, Zen 3, CPU time of one core, 2026-11-29, head_dim
 * 128, medians of interleaved rounds): 4,096 keys fp32 1.39 to 1.46, bf16 1.37; 8,192 keys fp32
 * 1.43, bf16 1.42; other programs ran beside it. Of that time S is 44 %, P V 41 %, softmax 9 %, and
 * q and k in INT8 2 %. In a loop without anything else, vpmaddwd and vpaddd have 1.74 times the
 * products of FMA, where 2 are possible.
 */
#include <float.h>
#include <math.h>

#include "cpu/blocked.h"
#include "cpu/qk8.h"
#include "cpu/target.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

TARGET_BEGIN("avx2,fma,f16c")

#include "cpu/qk8_x86.h"
#include "cpu/units_x86.h"
#include "cpu/vector_avx2.h"
#include "cpu/vector_avx2_int.h"

#define VECTORS 3
#define ROWS 4
#define UNIT 2
#define BLOCK_N 128

#define SCORES_ARE_INT8 1
#define ROW sdpa_avx2_qk8
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
