/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx512_qk8_listed.c - sdpa_avx512_qk8.c with lists of blocks: its panel is a block of
 * queries.
 *
 * Budget: 4 x 4 accumulators, four vectors of Q^T or P^T and one of K or V^T, of 32 registers.
 * Panel of 64 queries.
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

#define ONLY_LISTS 1
#define VECTORS 4
#define ROWS 4
#define UNIT 2
#define BLOCK_N 128

#define SCORES_ARE_INT8 1
#define ROW sdpa_avx512_qk8
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
