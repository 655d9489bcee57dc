/* SPDX-License-Identifier: Apache-2.0
 * platform.h - what Windows and POSIX systems call by different names: locks, threads, libraries
 * that are opened at run time. Knows no kernel.
 */
#ifndef WAN_ATTN_CORE_PLATFORM_H
#define WAN_ATTN_CORE_PLATFORM_H

#include <stddef.h>
#include <stdio.h>

/* A function's address as memory, so that it can be put into a field of any function type: ISO C
 * has no cast from void * to a function. */
typedef struct wan_attn_address {
    void *value;
} wan_attn_address;

#if defined(_WIN32)

/* Without it <windows.h> declares Winsock, whose names (bind, send) are ours to use. */
#if !defined(WIN32_LEAN_AND_MEAN)
#define WIN32_LEAN_AND_MEAN
#endif
#include <windows.h> /* defines: SRWLOCK, LoadLibraryExA, GetProcAddress, WaitForSingleObject */

#include <process.h> /* defines: _beginthreadex */
#include <string.h>

#define WAN_ATTN_CUDA_LIBRARY "nvcuda.dll"

/* A lock needs no making and no end: it guards state that is filled once, at first use. */
typedef SRWLOCK wan_attn_lock;
#define WAN_ATTN_UNLOCKED SRWLOCK_INIT

static inline void wan_attn_acquire(wan_attn_lock *lock) { AcquireSRWLockExclusive(lock); }
static inline void wan_attn_release(wan_attn_lock *lock) { ReleaseSRWLockExclusive(lock); }

typedef HANDLE wan_attn_thread;
typedef unsigned wan_attn_thread_result;
#define WAN_ATTN_THREAD_CALL __stdcall
#define WAN_ATTN_THREAD_DONE 0

typedef wan_attn_thread_result(WAN_ATTN_THREAD_CALL *wan_attn_thread_fn)(void *ctx);

static inline int wan_attn_start_thread(wan_attn_thread *thread, wan_attn_thread_fn fn, void *ctx) {
    *thread = (HANDLE)_beginthreadex(NULL, 0, fn, ctx, 0, NULL);
    return *thread != NULL;
}
static inline void wan_attn_join_thread(wan_attn_thread thread) {
    WaitForSingleObject(thread, INFINITE);
    CloseHandle(thread);
}

/* Opens the library at `path`, or the system's own of this name where path is "". NULL: `reason`
 * has the system's words. */
static inline void *wan_attn_open_library(const char *path, const char *name, char *reason,
                                          size_t size) {
    DWORD where = path[0] ? LOAD_LIBRARY_SEARCH_DEFAULT_DIRS | LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR
                          : LOAD_LIBRARY_SEARCH_SYSTEM32;
    void *library = (void *)LoadLibraryExA(path[0] ? path : name, NULL, where);
    if (!library)
        snprintf(reason, size, "%s does not load: Windows error %lu", path[0] ? path : name,
                 (unsigned long)GetLastError());
    return library;
}
static inline wan_attn_address wan_attn_find_function(void *library, const char *name) {
    wan_attn_address found;
    FARPROC function = GetProcAddress((HMODULE)library, name);
    memcpy(&found.value, &function, sizeof(found.value));
    return found;
}

#else

#include <dlfcn.h> /* defines: dlopen, dlsym, dlerror */
#include <pthread.h>

#define WAN_ATTN_CUDA_LIBRARY "libcuda.so.1"

/* A lock needs no making and no end: it guards state that is filled once, at first use. */
typedef pthread_mutex_t wan_attn_lock;
#define WAN_ATTN_UNLOCKED PTHREAD_MUTEX_INITIALIZER

static inline void wan_attn_acquire(wan_attn_lock *lock) { (void)pthread_mutex_lock(lock); }
static inline void wan_attn_release(wan_attn_lock *lock) { (void)pthread_mutex_unlock(lock); }

typedef pthread_t wan_attn_thread;
typedef void *wan_attn_thread_result;
#define WAN_ATTN_THREAD_CALL
#define WAN_ATTN_THREAD_DONE NULL

typedef wan_attn_thread_result(WAN_ATTN_THREAD_CALL *wan_attn_thread_fn)(void *ctx);

static inline int wan_attn_start_thread(wan_attn_thread *thread, wan_attn_thread_fn fn, void *ctx) {
    return pthread_create(thread, NULL, fn, ctx) == 0;
}
static inline void wan_attn_join_thread(wan_attn_thread thread) { pthread_join(thread, NULL); }

/* Opens the library at `path`, or the system's own of this name where path is "". NULL: `reason`
 * has the system's words. */
static inline void *wan_attn_open_library(const char *path, const char *name, char *reason,
                                          size_t size) {
    void *library = dlopen(path[0] ? path : name, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *words = dlerror();
        snprintf(reason, size, "%s%s", words ? words : name, words ? "" : " does not load");
    }
    return library;
}
static inline wan_attn_address wan_attn_find_function(void *library, const char *name) {
    wan_attn_address found = {dlsym(library, name)};
    return found;
}

#endif

#endif /* WAN_ATTN_CORE_PLATFORM_H */
