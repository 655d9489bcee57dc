/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx2_qk8_listed.c - sdpa_avx2_qk8.c with lists of blocks: its panel divides a block of
 * queries.
 *
 * Budget: 4 x 2 accumulators, two vectors of Q^T or P^T, a pair of K or V^T and a product: 12 of 16
 * registers. Panel of 16 queries.
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

#define ONLY_LISTS 1
#define VECTORS 2
#define ROWS 4
#define UNIT 2
#define BLOCK_N 128

#define SCORES_ARE_INT8 1
#define ROW sdpa_avx2_qk8
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
