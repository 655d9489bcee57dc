/* SPDX-License-Identifier: Apache-2.0
 * mma.cpp - mma.sync: PTX ISA, "Multiply-and-Accumulate Instruction: mma", "Matrix Fragments for
 * mma.m16n8k8", "Matrix Fragments for mma.m16n8k16 with floating point type", "Matrix Fragments for
 * mma.m8n8k16", "Matrix Fragments for mma.m16n8k32".
 */
#include <cstring>

#include "half.h"
#include "tensor.h"

namespace {

float from_half(u32 x, bool is_bf16) { return is_bf16 ? from_bf16(x) : from_f16(x); }

/* a: K / 4 registers. Register i of lane l: row l / 4 + 8 (i % 2), columns 2 (l % 4) + 8 (i / 2)
 * and the next one. */
void get_a(Warp &w, const int *o, int k, bool is_bf16, float (*a)[16]) {
    for (int i = 0; i < k / 4; i++) {
        const u32 *x = w.at<u32>(o[i]);
        for (int l = 0; l < LANES; l++) {
            int row = l / 4 + 8 * (i % 2), column = 2 * (l % 4) + 8 * (i / 2);
            a[row][column] = from_half(x[l] & 0xffff, is_bf16);
            a[row][column + 1] = from_half(x[l] >> 16, is_bf16);
        }
    }
}

/* b: K / 8 registers. Register i of lane l: rows 2 (l % 4) + 8 i and the next one, column l / 4. */
void get_b(Warp &w, const int *o, int k, bool is_bf16, float (*b)[8]) {
    for (int i = 0; i < k / 8; i++) {
        const u32 *x = w.at<u32>(o[i]);
        for (int l = 0; l < LANES; l++) {
            int row = 2 * (l % 4) + 8 * i, column = l / 4;
            b[row][column] = from_half(x[l] & 0xffff, is_bf16);
            b[row + 1][column] = from_half(x[l] >> 16, is_bf16);
        }
    }
}

void need_all(Warp &w, const int *o, int first, int count, u32 mask) {
    need_whole_warp(w, mask, "mma.sync");
    if (mask != ALL)
        trap("mma.sync: lanes have returned");
    for (int i = first; i < first + count; i++)
        w.need(o[i], mask, "mma.sync");
}

/* d {4}, a {K / 4}, b {K / 8}, c {4}. c and d, register i: row l / 4 + 8 (i / 2), column
 * 2 (l % 4) + i % 2. */
template <int K, bool IS_BF16> void mma_f32(Warp &w, const Ins &, const int *o, u32 mask) {
    const int *in = o + 4, *c = in + K / 4 + K / 8;
    need_all(w, in, 0, K / 4 + K / 8 + 4, mask);
    float a[16][16], b[16][8];
    double d[16][8];
    get_a(w, in, K, IS_BF16, a);
    get_b(w, in + K / 4, K, IS_BF16, b);
    for (int i = 0; i < 4; i++)
        for (int l = 0; l < LANES; l++)
            d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2] = w.at<float>(c[i])[l];
    multiply<8>(w.machine->knobs, d, a, b, 16, K);
    for (int i = 0; i < 4; i++) {
        for (int l = 0; l < LANES; l++)
            w.at<float>(o[i])[l] =
                result_of(w.machine->knobs, d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2]);
        w.define(o[i], mask, ALL);
    }
}

/* d {2}, a {4}, b {2}, c {2}, all f16. c and d, register i: row l / 4 + 8 i, columns 2 (l % 4) and
 * the next one. Summed in blocks, each is rounded to f16. */
void mma_f16(Warp &w, const Ins &, const int *o, u32 mask) {
    need_all(w, o, 2, 8, mask);
    float a[16][16], b[16][8];
    double d[16][8];
    get_a(w, o + 2, 16, false, a);
    get_b(w, o + 6, 16, false, b);
    for (int i = 0; i < 2; i++)
        for (int l = 0; l < LANES; l++)
            for (int e = 0; e < 2; e++)
                d[l / 4 + 8 * i][2 * (l % 4) + e] =
                    from_f16(w.at<u32>(o[8 + i])[l] >> 16 * e & 0xffff);
    int block = w.machine->knobs.sum_block ? std::min(w.machine->knobs.sum_block, 16) : 16;
    for (int first = 0; first < 16; first += block) {
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 8; n++) {
                for (int i = first; i < first + block; i++)
                    d[m][n] += (double)a[m][i] * b[i][n];
                d[m][n] = from_f16(to_f16(d[m][n]));
            }
    }
    for (int i = 0; i < 2; i++) {
        for (int l = 0; l < LANES; l++) {
            const double *pair = &d[l / 4 + 8 * i][2 * (l % 4)];
            w.at<u32>(o[i])[l] = to_f16(pair[1]) << 16 | to_f16(pair[0]);
        }
        w.define(o[i], mask, ALL);
    }
}

int signed_byte(u32 bytes, int e) { return (int)((bytes >> 8 * e & 0xff) ^ 0x80) - 0x80; }

/* Signed bytes, summed exactly in s32: d {M / 4}, a {M K / 128}, b {K / 16}, c {M / 4}. With four
 * bytes a register, register i of lane l: a, row l / 4 + 8 (i % (M / 8)), columns 4 (l % 4) +
 * 16 (i / (M / 8)) and the next three; b, rows 4 (l % 4) + 16 i and the next three, column l / 4; c
 * and d, row l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2. */
template <int M, int K> void mma_s8(Warp &w, const Ins &, const int *o, u32 mask) {
    const int halves = M / 8, a_words = M * K / 128, b_words = K / 16, d_words = M / 4;
    const int *in = o + d_words, *c = in + a_words + b_words;
    need_all(w, in, 0, a_words + b_words + d_words, mask);
    int a[M][K], b[K][8], d[M][8];
    for (int l = 0; l < LANES; l++)
        for (int e = 0; e < 4; e++) {
            for (int i = 0; i < a_words; i++)
                a[l / 4 + 8 * (i % halves)][4 * (l % 4) + 16 * (i / halves) + e] =
                    signed_byte(w.at<u32>(in[i])[l], e);
            for (int i = 0; i < b_words; i++)
                b[4 * (l % 4) + 16 * i + e][l / 4] = signed_byte(w.at<u32>(in[a_words + i])[l], e);
        }
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < d_words; i++)
            d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2] = (int)w.at<u32>(c[i])[l];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < 8; n++)
            for (int k = 0; k < K; k++)
                d[m][n] = (int)((u32)d[m][n] + (u32)(a[m][k] * b[k][n]));
    for (int i = 0; i < d_words; i++) {
        for (int l = 0; l < LANES; l++)
            w.at<u32>(o[i])[l] = (u32)d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
        w.define(o[i], mask, ALL);
    }
}

} // namespace

const std::vector<Op> TENSOR_OPS = {
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "{=r4} {r4} {r2} {r4}",
     mma_f32<16, true>},
    {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "{=r4} {r4} {r2} {r4}",
     mma_f32<16, false>},
    {"mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", "{=r4} {r2} {r1} {r4}", mma_f32<8, false>},
    {"mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", "{=r4} {r2} {r1} {r4}",
     mma_f32<8, true>},
    {"mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16", "{=r2} {r4} {r2} {r2}", mma_f16},
    {"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "{=r4} {r4} {r2} {r4}", mma_s8<16, 32>},
    {"mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32", "{=r2} {r1} {r1} {r2}", mma_s8<8, 16>},
};
