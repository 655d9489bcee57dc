/* SPDX-License-Identifier: Apache-2.0
 * mma.cuh - tensor core products of one warp and the loads that bring their operands into place.
 *
 * With g = lane / 4, t = lane % 4 and two 16-bit elements a register, low half first:
 *
 *     A 16x16            columns 2t, 2t+1   2t+8, 2t+9      B 16x8              column g
 *         row g               a[0]             a[2]             rows 2t, 2t+1       b[0]
 *         row g + 8           a[1]             a[3]             rows 2t+8, 2t+9     b[1]
 *
 *     C, D 16x8          columns 2t, 2t+1
 *         row g             d[0], d[1]        packed to 16 bits, two neighbouring C tiles are an A
 *         row g + 8         d[2], d[3]        tile: no value has to change its lane
 *
 * Of 8-bit elements a register holds four. A then is 16x32 and B 32x8: 2t, 2t+1 are 4t to 4t+3, and
 * the others lie 16 columns or rows further on instead of 8; C and D are the same.
 */
#ifndef WAN_ATTN_CUDA_PTX_MMA_H
#define WAN_ATTN_CUDA_PTX_MMA_H

/* Four 8x8 matrices of 16-bit elements; lane 8i + r brings the address of row r of matrix i and
 * gets of each matrix the elements (row g, columns 2t, 2t+1). */
DEVICE void ldmatrix_x4(u32 x[4], u32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row_address)
                 : "memory");
}

/* The same of the transposed matrices: (rows 2t, 2t+1, column g) of what lies in memory. */
DEVICE void ldmatrix_x4_trans(u32 x[4], u32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row_address)
                 : "memory");
}

/* d += A B, accumulated in f32. */
DEVICE void mma_m16n8k16_bf16(float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Turing multiplies 8 columns of A at a time: the left half, then the right one. */
DEVICE void mma_m16n8k16_f16(float d[4], const u32 a[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ < 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%8}, "
        "{%0, %1, %2, %3};\n\t"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%6, %7}, {%9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/* d += A B, accumulated in f16: d[0] is row g, d[1] row g + 8, columns 2t and 2t+1 packed. Twice as
 * fast as an f32 sum on GeForce. A sum is rounded to 11 bits after every 8 products on Ampere and
 * Ada, after all 16 on Blackwell, as bit-accurate models of them have it (MMA-Sim, by Microsoft);
 * the emulator of the tests rounds after 16. */
DEVICE void mma_m16n8k16_f16_sum_f16(u32 d[2], const u32 a[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, "
        "{%0, %1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* d += A B of signed 8-bit elements, exactly, in s32. Turing multiplies 8 rows and 16 columns of A
 * at a time: the upper rows' left half and right half, then those of the lower rows. */
DEVICE void mma_m16n8k32_s8(int d[4], const u32 a[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ < 800
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%4}, {%8}, {%0, %1};\n\t"
        "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%6}, {%9}, {%0, %1};\n\t"
        "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%2, %3}, {%5}, {%8}, {%2, %3};\n\t"
        "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%2, %3}, {%7}, {%9}, {%2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

#endif /* WAN_ATTN_CUDA_PTX_MMA_H */
