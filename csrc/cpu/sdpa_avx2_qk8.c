/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx2_qk8.c - attention with 8-bit scores (qk8.h) with AVX2: products of int16 pairs, P V in
 * float32 with FMA. The body: sdpa_tile.inc, with sdpa_qk8.inc's scores.
 *
 * Budget: 4 x 3 accumulators, two vectors of Q^T, a key's pair and a product: all 16 registers. Two
 * channels of a register tile are 12 vpmaddwd and 12 vpaddd for 10 loads, where float32 has 24 FMA
 * for 14. A core that adds integers in four ports (AMD) then takes half the time for S, one with
 * three (Intel) two thirds: 1.3 or 1.2 times sdpa_avx2 in all, where the quantising of q and k is
 * shared by some thousand rows. Measured: nothing yet.
 */
#include <float.h>
#include <math.h>

#include "cpu/blocked.h"
#include "cpu/qk8.h"
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
#define DOT_INTS(a, b, c)                                                                          \
    _mm256_castsi256_ps(                                                                           \
        _mm256_add_epi32(_mm256_castps_si256(c),                                                   \
                         _mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b))))
#define FLOATS(c) _mm256_cvtepi32_ps(_mm256_castps_si256(c))

#define SCORES_ARE_INT8 1
#define ROW sdpa_avx2_qk8
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
