/* SPDX-License-Identifier: Apache-2.0
 * wgmma.cuh - tensor core products of a warpgroup: D += A B with D 64xN in registers, A 64x16, B
 * 16xN, asynchronous.
 *
 * With w the warp's number in its group, g = lane / 4 and t = lane % 4, d[j][e] of a lane is row
 * 16w + g + 8 (e / 2), column 8j + 2t + e % 2: 16 rows of a warp are as in mma.cuh, and so is A in
 * registers.
 *
 * Operands in shared memory are named by descriptors (matrix_descriptor), in tiles of rows of 128
 * bytes, swizzled as TMA does it. ss: A is K-major (a row of Q), B is K-major (a row is a key of
 * K). rs: A is in registers, B is MN-major (a row is a key of V, its columns are N).
 *
 * Between wgmma_commit and the wgmma_wait that ends the group, d, a and the tiles must stay
 * untouched. The compiler does not know that: hold() at the end of the wait stops it from using a
 * value earlier; computed() before a wait stops it from doing the work after it.
 */
#ifndef WAN_ATTN_CUDA_PTX_WGMMA_H
#define WAN_ATTN_CUDA_PTX_WGMMA_H

/* Before the first product after registers of d or a have been touched. */
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/* Ends a group of products. */
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/* Until at most `pending` of the newest groups are under way. */
template <int pending> DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* The value has been computed before, and is not used before. No instruction. */
DEVICE void hold(float &x) { asm volatile("" : "+f"(x)::"memory"); }

/* Sums of weights, which are never below 0, have been computed before what follows. It is a store
 * that never happens: hold() binds the first half of the compiler only, and the second (ptxas)
 * moves a wait up as far as it can. `at`: any place in shared memory. */
DEVICE void computed(float x, float y, u32 at) {
    asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; setp.lt.or.f32 p, %1, 0f00000000, "
                 "p; @p st.shared.f32 [%2], %0; }" ::"f"(x),
                 "f"(y), "r"(at)
                 : "memory");
}

#define WGMMA_D8(j)                                                                                \
    "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]), "+f"(d[j + 1][0]),                 \
        "+f"(d[j + 1][1]), "+f"(d[j + 1][2]), "+f"(d[j + 1][3])
#define WGMMA_D32(j) WGMMA_D8(j), WGMMA_D8(j + 2), WGMMA_D8(j + 4), WGMMA_D8(j + 6)

#define WGMMA_0_31                                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_32_39 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_40_63                                                                                \
    ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, " \
    "%58, %59, %60, %61, %62, %63"
#define WGMMA_64_87                                                                                \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
    "%82, %83, %84, %85, %86, %87"
#define WGMMA_88_127                                                                               \
    ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, " \
    "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "   \
    "%120, %121, %122, %123, %124, %125, %126, %127"

/* d = A B, or d += A B if `adds`. */
#define WGMMA_SS(n, type, registers, a_at, b_at, adds_at, ...)                                     \
    DEVICE void wgmma_ss_n##n##_##type(float d[n / 8][4], u64 a, u64 b, bool adds) {               \
        asm volatile("{ .reg .pred p; setp.ne.s32 p, %" #adds_at ", 0; "                           \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type             \
                     " {" registers "}, %" #a_at ", %" #b_at ", p, 1, 1, 0, 0; }"                  \
                     : __VA_ARGS__                                                                 \
                     : "l"(a), "l"(b), "r"((int)adds));                                            \
    }

/* d += A B; a: the four registers of a 16x16 tile of each warp. */
#define WGMMA_RS(n, type, registers, a0, a1, a2, a3, b_at, ...)                                    \
    DEVICE void wgmma_rs_n##n##_##type(float d[n / 8][4], const u32 a[4], u64 b) {                 \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type             \
                     " {" registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_at         \
                     ", 1, 1, 1, 1;"                                                               \
                     : __VA_ARGS__                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }

#define WGMMA_R32 WGMMA_0_31
#define WGMMA_R40 WGMMA_0_31 WGMMA_32_39
#define WGMMA_R64 WGMMA_R40 WGMMA_40_63
#define WGMMA_R88 WGMMA_R64 WGMMA_64_87
#define WGMMA_R128 WGMMA_R88 WGMMA_88_127
#define WGMMA_O32 WGMMA_D32(0)
#define WGMMA_O40 WGMMA_D32(0), WGMMA_D8(8)
#define WGMMA_O64 WGMMA_D32(0), WGMMA_D32(8)
#define WGMMA_O88 WGMMA_O64, WGMMA_D8(16), WGMMA_D8(18), WGMMA_D8(20)
#define WGMMA_O128 WGMMA_O64, WGMMA_D32(16), WGMMA_D32(24)

WGMMA_SS(80, bf16, WGMMA_R40, 40, 41, 42, WGMMA_O40)
WGMMA_SS(80, f16, WGMMA_R40, 40, 41, 42, WGMMA_O40)
WGMMA_SS(128, bf16, WGMMA_R64, 64, 65, 66, WGMMA_O64)
WGMMA_SS(128, f16, WGMMA_R64, 64, 65, 66, WGMMA_O64)
WGMMA_SS(176, bf16, WGMMA_R88, 88, 89, 90, WGMMA_O88)
WGMMA_SS(176, f16, WGMMA_R88, 88, 89, 90, WGMMA_O88)
WGMMA_RS(64, bf16, WGMMA_R32, 32, 33, 34, 35, 36, WGMMA_O32)
WGMMA_RS(64, f16, WGMMA_R32, 32, 33, 34, 35, 36, WGMMA_O32)
WGMMA_RS(128, bf16, WGMMA_R64, 64, 65, 66, 67, 68, WGMMA_O64)
WGMMA_RS(128, f16, WGMMA_R64, 64, 65, 66, 67, 68, WGMMA_O64)
WGMMA_RS(256, bf16, WGMMA_R128, 128, 129, 130, 131, 132, WGMMA_O128)
WGMMA_RS(256, f16, WGMMA_R128, 128, 129, 130, 131, 132, WGMMA_O128)

#endif /* WAN_ATTN_CUDA_PTX_WGMMA_H */
