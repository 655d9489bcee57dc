/* SPDX-License-Identifier: Apache-2.0
 * sdpa_neon_listed.c - sdpa_neon.c with lists of blocks: its panel divides a block of queries.
 *
 * Budget: 4 x 4 accumulators + 4 + 1 of 32 registers; 16 FMA for 5 loads. Panel of 16 queries.
 */
#include <float.h>
#include <math.h>

#include "cpu/blocked.h"

#if defined(__aarch64__) || defined(_M_ARM64)

#include <arm_neon.h>

#include "cpu/units_neon.h"
#include "cpu/vector_neon.h"

#define ONLY_LISTS 1
#define VECTORS 4
#define ROWS 4
#define UNIT 1
#define BLOCK_N 128
#define DOT FMA

#define ROW sdpa_neon
#include "cpu/row.inc"

#endif /* 64-bit Arm */
