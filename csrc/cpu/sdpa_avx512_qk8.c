/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx512_qk8.c - attention with 8-bit scores (qk8.h) with AVX-512 VNNI: S in quads of bytes,
 * P V in pairs of int16. The body: sdpa_tile.inc, with the products of sdpa_qk8.inc and
 * sdpa_qk8_values.inc.
 *
 * Budget: 8 x 3 accumulators, three vectors of Q^T or P^T and one of K or V^T, of 32 registers. 24
 * vpdpbusd are 64 products a lane where float32 has 16, 24 vpdpwssd of P V are 32: 2.7 times
 * sdpa_avx512 by count, and 1.3 times sdpa_avx512_bf16.
 * Measured, as a multiple of the exact row (AMD EPYC, two threads, CPU time, 2026-11-30, head_dim
 * 128, 4,096 keys): sdpa_avx512 in fp32 2.08, sdpa_avx512_bf16 in bf16 1.10.
 */
#include <float.h>
#include <math.h>

#include "cpu/blocked.h"
#include "cpu/qk8.h"
#include "cpu/target.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "cpu/qk8_x86.h"
#include "cpu/units_x86.h"
#include "cpu/vector_avx512.h"
#include "cpu/vector_avx512_vnni.h"

#define VECTORS 3
#define ROWS 8
#define UNIT 2
#define BLOCK_N 128

#define SCORES_ARE_INT8 1
#define ROW sdpa_avx512_qk8
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
