/* SPDX-License-Identifier: Apache-2.0
 * atomic.h - the few atomic operations this library needs, for C11 compilers and for MSVC (whose
 * C11 atomics are experimental).
 */
#ifndef WAN_ATTN_CORE_ATOMIC_H
#define WAN_ATTN_CORE_ATOMIC_H

#include <stdint.h>

#if defined(_MSC_VER) && !defined(__clang__)

#include <intrin.h> /* defines: _InterlockedExchangeAdd64, _InterlockedOr and others */

typedef volatile int64_t wan_attn_counter;
typedef volatile long wan_attn_flags;

static inline int64_t wan_attn_fetch_add(wan_attn_counter *counter, int64_t n) {
    return _InterlockedExchangeAdd64(counter, n);
}
static inline uint32_t wan_attn_load(wan_attn_flags *flags) {
    return (uint32_t)_InterlockedOr(flags, 0);
}
static inline void wan_attn_store(wan_attn_flags *flags, uint32_t value) {
    _InterlockedExchange(flags, (long)value);
}
static inline void wan_attn_raise(wan_attn_flags *flags, uint32_t value) {
    uint32_t seen = wan_attn_load(flags), before;
    for (; seen < value; seen = before) {
        before = (uint32_t)_InterlockedCompareExchange(flags, (long)value, (long)seen);
        if (before == seen)
            return;
    }
}

#else

#include <stdatomic.h>

typedef _Atomic int64_t wan_attn_counter;
typedef _Atomic uint32_t wan_attn_flags;

/* Relaxed: the counter hands out tile numbers; the threads' start and join order everything
 * else. */
static inline int64_t wan_attn_fetch_add(wan_attn_counter *counter, int64_t n) {
    return atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}
static inline uint32_t wan_attn_load(wan_attn_flags *flags) {
    return atomic_load_explicit(flags, memory_order_relaxed);
}
static inline void wan_attn_store(wan_attn_flags *flags, uint32_t value) {
    atomic_store_explicit(flags, value, memory_order_relaxed);
}
/* *flags becomes the larger one of itself and value. */
static inline void wan_attn_raise(wan_attn_flags *flags, uint32_t value) {
    uint32_t seen = wan_attn_load(flags);
    while (seen < value && !atomic_compare_exchange_weak_explicit(
                               flags, &seen, value, memory_order_relaxed, memory_order_relaxed))
        continue;
}

#endif

#endif /* WAN_ATTN_CORE_ATOMIC_H */
