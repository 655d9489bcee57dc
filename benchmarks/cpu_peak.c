/* SPDX-License-Identifier: Apache-2.0
 * cpu_peak.c - what a core of this CPU can do at most: independent multiply-adds from registers,
 * nothing else. bench_cpu.py compiles and runs it: one line "name GFLOP/s" for each kind there is.
 * Median of many runs by process CPU time, because others may use the machine too.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TARGET(features) __attribute__((target(features), noinline))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define TARGET(features) __attribute__((noinline))
#endif

enum { CHAINS = 12, STEPS = 2000000, REPEATS = 41 };
enum { TILE_CHAINS = 6, TILE_FLOPS = 16 * 16 * 32 * 2, TILE_STEPS = STEPS / 8 };

static double cpu_seconds(void) { return (double)clock() / CLOCKS_PER_SEC; }

static volatile float sink;

/* CHAINS accumulators in registers, so that latency is hidden; each step x = MULTIPLY_ADD(x). */
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define ADVANCE(i)                                                                                 \
    x##i = MULTIPLY_ADD(x##i);                                                                     \
    __asm__("" : "+" REGISTER(x##i));
#define STORE(i) sink = FIRST(x##i);
#define BODY(type, zero)                                                                           \
    type x0 = zero, x1 = zero, x2 = zero, x3 = zero, x4 = zero, x5 = zero, x6 = zero, x7 = zero,   \
         x8 = zero, x9 = zero, x10 = zero, x11 = zero;                                             \
    for (int s = 0; s < STEPS; s++) {                                                              \
        EACH(ADVANCE)                                                                              \
    }                                                                                              \
    EACH(STORE)

#if defined(__x86_64__)
#define REGISTER(x) "v"(x)
TARGET("avx2,fma") static void fma_avx2(void) {
    __m256 a = _mm256_set1_ps(0.9f);
#define MULTIPLY_ADD(x) _mm256_fmadd_ps(a, x, a)
#define FIRST(x) _mm256_cvtss_f32(x)
    BODY(__m256, a)
#undef MULTIPLY_ADD
#undef FIRST
}
TARGET("avx512f") static void fma_avx512(void) {
    __m512 a = _mm512_set1_ps(0.9f);
#define MULTIPLY_ADD(x) _mm512_fmadd_ps(a, x, a)
#define FIRST(x) _mm512_cvtss_f32(x)
    BODY(__m512, a)
#undef MULTIPLY_ADD
#undef FIRST
}
TARGET("avx512f,avx512bf16") static void dot_avx512_bf16(void) {
    __m512i a = _mm512_set1_epi32(0x3f003f00);
#define MULTIPLY_ADD(x) _mm512_dpbf16_ps(x, (__m512bh)a, (__m512bh)a)
#define FIRST(x) _mm512_cvtss_f32(x)
    BODY(__m512, _mm512_setzero_ps())
#undef MULTIPLY_ADD
#undef FIRST
}
/* Six sums and two factors: all eight tiles. What is in them does not matter. */
TARGET("amx-tile,amx-bf16") static void tile_amx_bf16(void) {
    uint8_t config[64] = {1};
    for (int t = 0; t < 8; t++)
        config[16 + 2 * t] = 64, config[48 + t] = 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
    for (int s = 0; s < TILE_STEPS; s++) {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
        _tile_dpbf16ps(4, 6, 7);
        _tile_dpbf16ps(5, 6, 7);
    }
    _tile_release();
}
/* The CPU has it, and Linux (arch_prctl ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) gives it. */
static int has_amx_bf16(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#elif defined(__aarch64__)
#define REGISTER(x) "w"(x)
static void fma_neon(void) {
    float32x4_t a = vdupq_n_f32(0.9f);
#define MULTIPLY_ADD(x) vfmaq_f32(a, a, x)
#define FIRST(x) vgetq_lane_f32(x, 0)
    BODY(float32x4_t, a)
#undef MULTIPLY_ADD
#undef FIRST
}
#endif

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(const char *name, void (*run)(void), double flops) {
    double took[REPEATS];
    for (int r = 0; r < REPEATS; r++) {
        double start = cpu_seconds();
        run();
        took[r] = cpu_seconds() - start;
    }
    qsort(took, REPEATS, sizeof(took[0]), ascending);
    printf("%s %.1f\n", name, flops / took[REPEATS / 2] / 1e9);
}

int main(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        report("fma_avx2", fma_avx2, (double)STEPS * CHAINS * 16);
    if (__builtin_cpu_supports("avx512f"))
        report("fma_avx512", fma_avx512, (double)STEPS * CHAINS * 32);
    if (__builtin_cpu_supports("avx512bf16"))
        report("dot_avx512_bf16", dot_avx512_bf16, (double)STEPS * CHAINS * 64);
    if (has_amx_bf16())
        report("tile_amx_bf16", tile_amx_bf16, (double)TILE_STEPS * TILE_CHAINS * TILE_FLOPS);
#elif defined(__aarch64__)
    report("fma_neon", fma_neon, (double)STEPS * CHAINS * 8);
#endif
    return 0;
}
