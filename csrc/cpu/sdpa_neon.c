/* SPDX-License-Identifier: Apache-2.0
 * sdpa_neon.c - attention with the vectors that every 64-bit Arm has; products in float32 for every
 * dtype. The body: sdpa_tile.inc.
 *
 * Budget: 8 x 3 accumulators + 3 + 1 of 32 registers; 24 FMA for 11 loads. Panel of 12 queries.
 * Measured: nothing yet, only tested (under emulation).
 */
#include <float.h>
#include <math.h>

#include "cpu/blocked.h"

#if defined(__aarch64__) || defined(_M_ARM64)

#include <arm_neon.h>

#include "cpu/units_neon.h"
#include "cpu/vector_neon.h"

#define VECTORS 3
#define ROWS 8
#define UNIT 1
#define BLOCK_N 128
#define DOT FMA

#define ROW sdpa_neon
#include "cpu/row.inc"

#endif /* 64-bit Arm */
