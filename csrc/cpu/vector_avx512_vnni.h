/* SPDX-License-Identifier: Apache-2.0
 * vector_avx512_vnni.h - integers in the vectors of vector_avx512.h, for sdpa_qk8.inc and
 * sdpa_qk8_values.inc: quads of bytes and pairs of int16.
 */
#ifndef WAN_ATTN_CPU_VECTOR_AVX512_VNNI_H
#define WAN_ATTN_CPU_VECTOR_AVX512_VNNI_H

#define INTS(x) _mm512_castps_si512(x)
#define VECTOR_OF(i) _mm512_castsi512_ps(i)
#if defined(__GNUC__) /* as intrinsics, gcc copies accumulators and spills some */
#define ADD_PRODUCTS(c, a, b) __asm__("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b))
#define ADD_QUADS(c, a, b) __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(b), "v"(a))
#else
#define ADD_PRODUCTS(c, a, b) (c) = VECTOR_OF(_mm512_dpwssd_epi32(INTS(c), INTS(a), INTS(b)))
#define ADD_QUADS(c, a, b) (c) = VECTOR_OF(_mm512_dpbusd_epi32(INTS(c), INTS(b), INTS(a)))
#endif
#define ADD_PRODUCTS_AT(c, a, p) ADD_PRODUCTS(c, a, LOAD(p))
#define QUADS 1

#define FLOATS(c) _mm512_cvtepi32_ps(INTS(c))
#define INTEGERS(x) VECTOR_OF(_mm512_cvtps_epi32(x))
#define ADD_INTS(a, b) VECTOR_OF(_mm512_add_epi32(INTS(a), INTS(b)))
#define PAIR_INTS(even, odd)                                                                       \
    VECTOR_OF(_mm512_or_si512(INTS(even), _mm512_slli_epi32(INTS(odd), 16)))

#endif /* WAN_ATTN_CPU_VECTOR_AVX512_VNNI_H */
