/* SPDX-License-Identifier: Apache-2.0
 * system.h - what the C drivers need of a system and Windows calls by other names: aligned memory,
 * libraries opened at run time. Threads are POSIX's everywhere: mingw has them, too.
 */
#ifndef WAN_ATTN_TESTS_SYSTEM_H
#define WAN_ATTN_TESTS_SYSTEM_H

#include <stdlib.h>

#if defined(_WIN32)

#define WIN32_LEAN_AND_MEAN
#include <windows.h> /* defines: LoadLibraryA, GetProcAddress */

#include <malloc.h> /* defines: _aligned_malloc, _aligned_free */

static inline void *allocate_aligned(size_t size) { return _aligned_malloc(size, 64); }
static inline void free_aligned(void *memory) { _aligned_free(memory); }

static inline void *open_library(const char *path) { return (void *)LoadLibraryA(path); }
static inline void *find_function(void *library, const char *name) {
    return (void *)GetProcAddress((HMODULE)library, name);
}

#else

#include <dlfcn.h>

static inline void *allocate_aligned(size_t size) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, size) ? NULL : memory;
}
static inline void free_aligned(void *memory) { free(memory); }

static inline void *open_library(const char *path) { return dlopen(path, RTLD_NOW); }
static inline void *find_function(void *library, const char *name) { return dlsym(library, name); }

#endif

#endif /* WAN_ATTN_TESTS_SYSTEM_H */
