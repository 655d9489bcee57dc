/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx512_bf16_listed.c - sdpa_avx512_bf16.c with lists of blocks: its panel is a block of queries.
 *
 * Budget: 4 x 4 accumulators + 4 + 1 of 32 registers; 16 vdpbf16ps for 8 loads. Panel of 64 queries.
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

#define ONLY_LISTS 1
#define VECTORS 4
#define ROWS 4
#define UNIT 2
#define BLOCK_N 512

#define DOT DOT_PAIRS

#define ROW sdpa_avx512_bf16
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
