/* SPDX-License-Identifier: Apache-2.0
 * cpuid.c - which vector extensions the CPU has *and* the operating system saves. Knows no kernel.
 */
#include "core/cpuid.h"

#include "core/atomic.h"

#if defined(__x86_64__) || defined(_M_X64)
#define IS_X86 1
#if defined(_MSC_VER)
#include <immintrin.h> /* defines: _xgetbv */
#include <intrin.h>    /* defines: __cpuidex */
#else
#include <cpuid.h> /* defines: __get_cpuid_count */
#endif
#endif

static const struct {
    const char *name;
    uint32_t builds_on;
    const char *words;
} FEATURES[] = {
#define FEATURE(macro, bit, name, builds_on, words) [bit] = {name, builds_on, words},
    WAN_ATTN_CPU_FEATURE_LIST(FEATURE)};

enum { FEATURE_COUNT = sizeof(FEATURES) / sizeof(FEATURES[0]) };

const char *wan_attn_cpu_feature_name(int32_t bit) {
    return bit >= 0 && bit < FEATURE_COUNT ? FEATURES[bit].name : NULL;
}

uint32_t wan_attn_cpu_feature_level(int32_t bit) {
    uint32_t level = bit >= 0 && bit < FEATURE_COUNT ? 1u << bit : 0;
    for (int32_t below = bit; below >= 0 && level; below--) /* a feature builds on earlier ones */
        if (level & 1u << below)
            level |= FEATURES[below].builds_on;
    return level;
}

const char *wan_attn_cpu_feature_words(uint32_t features) {
    for (int32_t bit = 0; bit < FEATURE_COUNT; bit++)
        if (features & 1u << bit)
            return FEATURES[bit].words;
    return "nothing";
}

#if defined(IS_X86)

typedef struct cpuid_regs {
    uint32_t eax, ebx, ecx, edx;
} cpuid_regs;

static cpuid_regs cpuid(uint32_t leaf, uint32_t subleaf) {
    cpuid_regs r = {0, 0, 0, 0};
#if defined(_MSC_VER)
    int regs[4];
    __cpuidex(regs, 0, 0);
    if ((uint32_t)regs[0] >= leaf) {
        __cpuidex(regs, (int)leaf, (int)subleaf);
        r.eax = (uint32_t)regs[0], r.ebx = (uint32_t)regs[1], r.ecx = (uint32_t)regs[2],
        r.edx = (uint32_t)regs[3];
    }
#else
    /* Leaves the zeros where there is no such leaf. */
    (void)__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
}

/* XCR0: which register files the operating system saves on a context switch. */
static uint64_t saved_state(void) {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
#endif
}

static int has(uint32_t reg, int bit) { return (int)(reg >> bit & 1); }

static uint32_t detect(void) {
    /* XCR0 bits: 1 SSE, 2 AVX, 5-7 the parts of AVX-512, 17-18 those of AMX (Intel SDM 1, 13.3) */
    const uint64_t YMM = 0x6, ZMM = 0xe6, TILES = 0x60000;
    uint32_t found = WAN_ATTN_CPU_KNOWN;
    cpuid_regs one = cpuid(1, 0);
    int osxsave = has(one.ecx, 27);
    uint64_t saved = osxsave ? saved_state() : 0;
    if ((saved & YMM) != YMM)
        return found;
    cpuid_regs seven = cpuid(7, 0), seven_one = cpuid(7, 1);
    if (!(has(one.ecx, 12) && has(one.ecx, 29) && has(seven.ebx, 5))) /* FMA, F16C, AVX2 */
        return found;
    found |= WAN_ATTN_CPU_AVX2;
    if ((saved & ZMM) != ZMM ||
        !(has(seven.ebx, 16) && has(seven.ebx, 17) && has(seven.ebx, 30) && has(seven.ebx, 31)))
        return found;
    found |= WAN_ATTN_CPU_AVX512;
    if (has(seven_one.eax, 5))
        found |= WAN_ATTN_CPU_AVX512_BF16;
    if (has(seven.ecx, 11))
        found |= WAN_ATTN_CPU_AVX512_VNNI;
    int has_amx_bf16 = has(seven.edx, 22), has_amx_tile = has(seven.edx, 24);
    if ((saved & TILES) == TILES && has_amx_bf16 && has_amx_tile)
        found |= WAN_ATTN_CPU_AMX;
    return found;
}

uint32_t wan_attn_cpu_features(void) {
    /* cpuid traps to the hypervisor in a virtual machine: microseconds, so it is asked once. */
    static wan_attn_flags known;
    uint32_t features = wan_attn_load(&known);
    if (!features)
        wan_attn_store(&known, features = detect());
    return features;
}

#elif defined(__aarch64__) || defined(_M_ARM64)

/* NEON is part of the base architecture. */
uint32_t wan_attn_cpu_features(void) { return WAN_ATTN_CPU_KNOWN | WAN_ATTN_CPU_NEON; }

#else

uint32_t wan_attn_cpu_features(void) { return WAN_ATTN_CPU_KNOWN; }

#endif
