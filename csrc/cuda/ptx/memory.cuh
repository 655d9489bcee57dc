/* SPDX-License-Identifier: Apache-2.0
 * memory.cuh - loads, stores and asynchronous copies. Shared memory is a 32-bit address, counted in
 * bytes from shared_base().
 */
#ifndef WAN_ATTN_CUDA_PTX_MEMORY_H
#define WAN_ATTN_CUDA_PTX_MEMORY_H

/* The block's dynamic shared memory; 1024-byte aligned, which the address arithmetic of swizzled
 * tiles relies on. */
DEVICE u32 shared_base() {
    extern __shared__ __align__(1024) unsigned char dynamic_smem[];
    return (u32)__cvta_generic_to_shared(dynamic_smem);
}

DEVICE int load_global_i32(const void *at) {
    int x;
    asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(x) : "l"(at));
    return x;
}

DEVICE i64 load_global_i64(const void *at) {
    i64 x;
    asm volatile("ld.global.nc.s64 %0, [%1];" : "=l"(x) : "l"(at));
    return x;
}

DEVICE u32 load_global_b16(const void *at) {
    unsigned short x;
    asm("ld.global.nc.b16 %0, [%1];" : "=h"(x) : "l"(at));
    return x;
}

DEVICE u32 load_global_b32(const void *at) {
    u32 x;
    asm("ld.global.nc.b32 %0, [%1];" : "=r"(x) : "l"(at));
    return x;
}

DEVICE float load_global_f32(const void *at) {
    float x;
    asm("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(at));
    return x;
}

DEVICE double load_global_f64(const void *at) {
    double x;
    asm("ld.global.nc.f64 %0, [%1];" : "=d"(x) : "l"(at));
    return x;
}

/* Of memory that this very thread writes later on: not through the path for what is never written.
 */
DEVICE u32 load_own_b16(const void *at) {
    unsigned short x;
    asm volatile("ld.global.b16 %0, [%1];" : "=h"(x) : "l"(at) : "memory");
    return x;
}

DEVICE u32 load_own_b32(const void *at) {
    u32 x;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
    return x;
}

DEVICE void load_own_b32x4(u32 x[4], const void *at) {
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(at)
                 : "memory");
}

DEVICE void load_global_f32x2(float x[2], const void *at) {
    asm("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "l"(at));
}

DEVICE void store_global_b16(void *at, u32 x) {
    asm volatile("st.global.b16 [%0], %1;" ::"l"(at), "h"((unsigned short)x) : "memory");
}

DEVICE void store_global_f32(void *at, float x) {
    asm volatile("st.global.f32 [%0], %1;" ::"l"(at), "f"(x) : "memory");
}

DEVICE void store_global_b32(void *at, u32 x) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(at), "r"(x) : "memory");
}

DEVICE void store_global_f32x2(void *at, float x, float y) {
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(x), "f"(y) : "memory");
}

DEVICE void store_global_b32x2(void *at, u32 x, u32 y) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(x), "r"(y) : "memory");
}

DEVICE void store_global_b32x4(void *at, const u32 x[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3])
                 : "memory");
}

/* A number that many threads have a part in: integers, so that their order does not matter. */
DEVICE void raise_global_u32(void *at, u32 x) {
    asm volatile("red.global.max.u32 [%0], %1;" ::"l"(at), "r"(x) : "memory");
}

/* Returns what stood there before. */
DEVICE u32 add_global_u32(void *at, u32 x) {
    u32 before;
    asm volatile("atom.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(x) : "memory");
    return before;
}

DEVICE void load_shared_b32x4(u32 x[4], u32 at) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
}

/* The same, or zeros if is_zero; `at` is then not read. All lanes must call. */
DEVICE void load_shared_b32x4_or_zero(u32 x[4], u32 at, bool is_zero) {
    x[0] = x[1] = x[2] = x[3] = 0;
    if (!is_zero)
        load_shared_b32x4(x, at);
}

DEVICE void store_shared_b32x4(u32 at, const u32 x[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3])
                 : "memory");
}

DEVICE void load_global_b32x4(u32 x[4], const void *at) {
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(at));
}

/* 16 bytes from global to shared memory, or 16 zero bytes if is_zero; `from` is then not read and
 * may point anywhere. Both addresses are multiples of 16. Other threads may read the bytes after
 * this thread's cp_async_wait and a barrier. Turing has no asynchronous copies: there the bytes
 * pass through registers, and the thread waits for them. */
DEVICE void cp_async_16_or_zero(u32 to, const void *from, bool is_zero) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(is_zero ? 0 : 16)
                 : "memory");
#else
    u32 x[4] = {0, 0, 0, 0};
    if (!is_zero)
        load_global_b32x4(x, from);
    store_shared_b32x4(to, x);
#endif
}

DEVICE void cp_async_16(u32 to, const void *from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
    cp_async_16_or_zero(to, from, false);
#endif
}

/* from - bytes. Opaque to the compiler, which would otherwise turn a chain of these into separate
 * multiplications: twice the instructions, in the main loop. */
DEVICE const char *stepped_back(const char *from, i64 bytes) {
    const char *to;
    asm("sub.s64 %0, %1, %2;" : "=l"(to) : "l"(from), "l"(bytes));
    return to;
}

/* Ends a group of this thread's copies; a group may be empty. */
DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Waits until at most `pending` of this thread's newest groups are still under way. A template: the
 * instruction wants a literal. */
template <int pending> DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

#endif /* WAN_ATTN_CUDA_PTX_MEMORY_H */
