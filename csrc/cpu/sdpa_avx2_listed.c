/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx2_listed.c - sdpa_avx2.c with lists of blocks: its panel divides a block of queries.
 *
 * Budget: 4 x 2 accumulators + 2 + 1 of 16 registers; 8 FMA for 6 loads. Panel of 16 queries.
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

#define ONLY_LISTS 1
#define VECTORS 2
#define ROWS 4
#define UNIT 1
#define BLOCK_N 128
#define DOT FMA

#define ROW sdpa_avx2
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
