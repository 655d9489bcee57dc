/* SPDX-License-Identifier: Apache-2.0
 * sdpa_avx2_qk8.c - attention with 8-bit scores (qk8.h) with AVX2, in products of int16 pairs, P V
 * too. The body: sdpa_tile.inc, with the products of sdpa_qk8.inc and sdpa_qk8_values.inc.
 *
 * Budget: 4 x 3 accumulators, two vectors of Q^T or P^T, a pair of K or V^T and a product: all 16
 * registers. Two channels or keys of a register tile are 12 vpmaddwd and 12 vpaddd for 10 loads,
 * where float32 has 24 FMA for 14.
 * Measured, as a multiple of sdpa_avx2 (AMD EPYC, Zen 3, CPU time of one core, 2026-11-29, head_dim
 * 128, medians of interleaved rounds): 4,096 keys fp32 1.39 to 1.46, bf16 1.37; 8,192 keys fp32 1.43,
 * bf16 1.42; other programs ran beside it. Of that time S is 44 %, P V 41 %, softmax 9 %, and q and
 * k in INT8 2 %. In a loop without anything else, vpmaddwd and vpaddd have 1.74 times the products
 * of FMA, where 2 are possible.
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

#define VECTORS 3
#define ROWS 4
#define UNIT 2
#define BLOCK_N 128

/* c += a * b of int16 pairs in each 32-bit lane; the second one has b in memory. They are two
 * instructions that a compiler cannot part: it would copy accumulators, and spill some. */
#if defined(__GNUC__)
#define ADD_PRODUCTS_FROM(c, a, b, where)                                                          \
    {                                                                                              \
        VEC product;                                                                               \
        __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"                                         \
                : "+x"(c), "=&x"(product)                                                          \
                : "x"(a), where(b));                                                               \
    }
#define ADD_PRODUCTS(c, a, b) ADD_PRODUCTS_FROM(c, a, b, "x")
#define ADD_PRODUCTS_AT(c, a, p) ADD_PRODUCTS_FROM(c, a, *(const __m256_u *)(p), "m")
#else
#define ADD_PRODUCTS(c, a, b)                                                                      \
    (c) = ADD_INTS(                                                                                \
        c, _mm256_castsi256_ps(_mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b))))
#define ADD_PRODUCTS_AT(c, a, p) ADD_PRODUCTS(c, a, LOAD(p))
#endif

#define FLOATS(c) _mm256_cvtepi32_ps(_mm256_castps_si256(c))
#define INTEGERS(x) _mm256_castsi256_ps(_mm256_cvtps_epi32(x))
#define ADD_INTS(a, b)                                                                             \
    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)))
#define PAIR_INTS(even, odd)                                                                       \
    _mm256_or_ps(even, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(odd), 16)))

#define SCORES_ARE_INT8 1
#define ROW sdpa_avx2_qk8
#include "cpu/row.inc"
TARGET_END

#endif /* x86-64 */
