/* SPDX-License-Identifier: Apache-2.0
 * lock.h - a lock that needs no making and no end: for state that is filled once, at first use.
 */
#ifndef WAN_ATTN_CORE_LOCK_H
#define WAN_ATTN_CORE_LOCK_H

#if defined(_WIN32)

#include <windows.h> /* defines: SRWLOCK and its functions */

typedef SRWLOCK wan_attn_lock;
#define WAN_ATTN_UNLOCKED SRWLOCK_INIT

static inline void wan_attn_acquire(wan_attn_lock *lock) { AcquireSRWLockExclusive(lock); }
static inline void wan_attn_release(wan_attn_lock *lock) { ReleaseSRWLockExclusive(lock); }

#else

#include <pthread.h>

typedef pthread_mutex_t wan_attn_lock;
#define WAN_ATTN_UNLOCKED PTHREAD_MUTEX_INITIALIZER

static inline void wan_attn_acquire(wan_attn_lock *lock) { (void)pthread_mutex_lock(lock); }
static inline void wan_attn_release(wan_attn_lock *lock) { (void)pthread_mutex_unlock(lock); }

#endif

#endif /* WAN_ATTN_CORE_LOCK_H */
