/* SPDX-License-Identifier: Apache-2.0
 * wgmma.cpp - asynchronous products of warpgroups: PTX ISA, "Asynchronous Warpgroup Level
 * Matrix Instructions" ("Register Fragments", "Shared Memory Matrix Layout", "Matrix Descriptor
 * Format", "wgmma.mma_async", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group").
 *
 * Each warp makes its 16 of the 64 rows. Until wait_group retires it, an accumulator may not be
 * touched and the registers of A may not be written: Warp::busy counts who still needs a slot.
 */
#include <algorithm>
#include <cstring>

#include "half.h"
#include "tensor.h"

namespace {

enum { WRITES = 16, READS = 1 };

struct Shape {
    int n;
    bool is_bf16, a_in_registers;
};

int coded(const Shape &s) { return s.n | s.is_bf16 << 12 | s.a_in_registers << 13; }

Shape shape_of(const Ins &ins) {
    int code = all_ops()[(size_t)ins.op].shape;
    return {code & 0xfff, (code >> 12 & 1) != 0, (code >> 13 & 1) != 0};
}

/* Where operand fields begin. A in registers: d, a {4}, b, scale-d, scale-a, scale-b, trans-b. In
 * shared memory: d, a, b, scale-d, scale-a, scale-b, trans-a, trans-b. */
struct Operands {
    const int *d, *a, *b, *scale_d, *more;
};

Operands operands_of(const Shape &shape, const int *o) {
    const int *a = o + shape.n / 2, *b = a + (shape.a_in_registers ? 4 : 1);
    return {o, a, b, b + 1, b + 2};
}

/* "Matrix Descriptor Format", in units of 16 bytes: bits 0-13 start, 16-29 leading, 32-45 stride;
 * 49-51 base offset, 62-63 swizzle: 1 is 128 bytes. */
struct Descriptor {
    u32 start, leading, stride;
};

Descriptor decoded(u64 x) {
    if (x & 0x3ff1c000c000c000ull)
        trap("wgmma: descriptor %016llx sets reserved bits", (unsigned long long)x);
    if (x >> 62 != 1)
        trap("wgmma: descriptor %016llx: this machine knows SWIZZLE_128B alone",
             (unsigned long long)x);
    if (x >> 49 & 7)
        trap("wgmma: descriptor %016llx: a base offset", (unsigned long long)x);
    return {(u32)(x & 0x3fff) << 4, (u32)(x >> 16 & 0x3fff) << 4, (u32)(x >> 32 & 0x3fff) << 4};
}

/* Offset of 16 bytes: of K-major element (mn, k), k % 8 == 0; of MN-major, mn % 8 == 0. The swizzle
 * is a matter of absolute addresses: bits 4-6 ^= bits 7-9. */
u32 chunk_of(const Warp &w, const Descriptor &d, bool k_major, int mn, int k) {
    u32 at = k_major ? d.start + (u32)(mn / 8) * d.stride + (u32)(mn % 8) * 128 + (u32)k * 2
                     : d.start + (u32)(mn / 64) * d.leading + (u32)(mn % 64) * 2 +
                           (u32)(k / 8) * d.stride + (u32)(k % 8) * 128;
    at ^= at >> 3 & 0x70;
    u32 offset = at - ((u32)w.machine->knobs.window & 0x3ffff);
    if (offset + CHUNK > (u32)w.machine->program.shared_bytes)
        trap("wgmma: descriptor leads outside of the block's memory: 0x%x", at);
    return offset;
}

float from_half(u32 x, bool is_bf16) { return is_bf16 ? from_bf16(x) : from_f16(x); }

void get_chunk(const Warp &w, u32 offset, bool is_bf16, float x[8]) {
    u16 raw[8];
    std::memcpy(raw, &w.block->shared[offset], 16);
    for (int i = 0; i < 8; i++)
        x[i] = from_half(raw[i], is_bf16);
}

void get_a(Warp &w, const Shape &shape, const Operands &o, const Product &p, float (*a)[16]) {
    if (shape.a_in_registers) {
        for (int i = 0; i < 4; i++)
            for (int l = 0; l < LANES; l++) {
                u32 x = w.at<u32>(o.a[i])[l];
                int row = l / 4 + 8 * (i % 2), column = 2 * (l % 4) + 8 * (i / 2);
                a[row][column] = from_half(x & 0xffff, shape.is_bf16);
                a[row][column + 1] = from_half(x >> 16, shape.is_bf16);
            }
        return;
    }
    Descriptor d = decoded(p.a);
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k += 8)
            get_chunk(w, chunk_of(w, d, true, w.index % 4 * 16 + row, k), shape.is_bf16,
                      &a[row][k]);
}

template <int N> void get_b(Warp &w, bool is_bf16, u64 b_at, bool k_major, float (*b)[N]) {
    Descriptor d = decoded(b_at);
    float x[8];
    for (int first = 0; first < N; first += k_major ? 1 : 8)
        for (int k = 0; k < 16; k += k_major ? 8 : 1) {
            get_chunk(w, chunk_of(w, d, k_major, first, k), is_bf16, x);
            for (int i = 0; i < 8; i++)
                (k_major ? b[k + i][first] : b[k][first + i]) = x[i];
        }
}

/* d, register i of lane l: row l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2. */
template <int N> void compute(Warp &w, const Shape &shape, const Operands &o, const Product &p) {
    static thread_local float a[16][16], b[16][N];
    static thread_local double d[16][N];
    bool k_major = o.more[shape.a_in_registers ? 2 : 3] == 0;
    get_a(w, shape, o, p, a);
    get_b<N>(w, shape.is_bf16, p.b, k_major, b);
    for (int i = 0; i < N / 2; i++)
        for (int l = 0; l < LANES; l++)
            d[l / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (l % 4) + i % 2] =
                p.adds ? (double)w.at<float>(o.d[i])[l] : 0.0;
    multiply<N>(w.machine->knobs, d, a, b, 16, 16);
    for (int i = 0; i < N / 2; i++)
        for (int l = 0; l < LANES; l++)
            w.at<float>(o.d[i])[l] = result_of(
                w.machine->knobs, d[l / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (l % 4) + i % 2]);
}

/* Everything that the product will read; marks it as being read. */
void begin_reads(Warp &w, const Shape &shape, Product &p, bool k_major) {
    Descriptor d = decoded(p.b);
    for (int mn = 0; mn < shape.n; mn += k_major ? 1 : 8)
        for (int k = 0; k < 16; k += k_major ? 8 : 1)
            p.chunks.push_back(chunk_of(w, d, k_major, mn, k));
    if (!shape.a_in_registers) {
        d = decoded(p.a);
        for (int row = 0; row < 16; row++)
            for (int k = 0; k < 16; k += 8)
                p.chunks.push_back(chunk_of(w, d, true, w.index % 4 * 16 + row, k));
    }
    for (u32 offset : p.chunks)
        begin_async_read(w, {w.block, offset});
}

/* .sync.aligned: the four warps of a group run the same products, with the same descriptors. */
void compare_with_group(Warp &w, const Ins &ins, const Product &p) {
    size_t group = (size_t)w.index / 4;
    auto &log = w.block->products;
    if (log.size() <= group)
        log.resize(group + 1);
    const u64 words[3] = {(u64)(&ins - w.machine->program.code), p.a, p.b};
    for (u64 word : words) {
        u64 at = w.product_count++;
        if (at == log[group].size())
            log[group].push_back(word);
        else if (log[group][at] != word)
            trap("wgmma: the warps of a warpgroup run different products");
    }
}

u64 one_value(Warp &w, int slot, u32 mask) {
    w.need(slot, mask, "wgmma: a descriptor");
    const u64 *x = w.at<u64>(slot);
    for (int l = 1; l < LANES; l++)
        if (x[l] != x[0])
            trap("wgmma: lanes have different descriptors");
    return x[0];
}

bool reads_scale(Warp &w, int slot, u32 mask) {
    w.need(slot, mask, "wgmma: scale-d");
    u32 p = w.r[slot].x[0];
    if (p != 0 && p != ALL)
        trap("wgmma: lanes have different scale-d");
    return p != 0;
}

/* .fence: needed before the first product, and again wherever its registers have been written. */
void need_fence(const Warp &w, int slot) {
    if (w.touched[(size_t)slot])
        trap("wgmma: a register was written and no wgmma.fence came after that");
}

void check_registers(Warp &w, const Shape &shape, const Operands &o, bool adds, u32 mask) {
    for (int i = 0; i < shape.n / 2; i++) {
        need_fence(w, o.d[i]);
        if (w.busy[(size_t)o.d[i]] % WRITES)
            trap("wgmma: an accumulator is still read as A by a product in flight");
        if (adds && !w.busy[(size_t)o.d[i]])
            w.need(o.d[i], mask, "wgmma: an accumulator");
    }
    for (int i = 0; i < 4 && shape.a_in_registers; i++) {
        if (w.busy[(size_t)o.a[i]] >= WRITES)
            trap("wgmma: A is an accumulator in flight");
        need_fence(w, o.a[i]);
        w.need(o.a[i], mask, "wgmma: A");
    }
}

void issue(Warp &w, const Ins &ins, const int *pool, u32 mask) {
    Shape shape = shape_of(ins);
    Operands o = operands_of(shape, pool);
    need_whole_warp(w, mask, "wgmma");
    const int *signs = o.more, count = shape.a_in_registers ? 3 : 4;
    if (signs[0] != 1 || signs[1] != 1)
        trap("wgmma: this machine knows no negated operands");
    if (count == 4 && signs[2] != 0)
        trap("wgmma: this machine knows A in shared memory K-major alone");
    Product p{&ins, -1, false, reads_scale(w, *o.scale_d, mask), 0, 0, {}};
    check_registers(w, shape, o, p.adds, mask);
    p.a = shape.a_in_registers ? 0 : one_value(w, *o.a, mask);
    p.b = one_value(w, *o.b, mask);
    compare_with_group(w, ins, p);
    begin_reads(w, shape, p, signs[count - 1] == 0);
    for (int i = 0; i < shape.n / 2; i++) {
        w.busy[(size_t)o.d[i]] = (u8)(w.busy[(size_t)o.d[i]] + WRITES);
        w.defined[(size_t)o.d[i]] = ALL;
    }
    for (int i = 0; i < 4 && shape.a_in_registers; i++)
        w.busy[(size_t)o.a[i]] = (u8)(w.busy[(size_t)o.a[i]] + READS);
    w.products.push_back(std::move(p));
    if (w.machine->lands_now())
        for (Product &other : w.products) /* in order */
            run_product(w, other);
}

void retire(Warp &w, Product &p) {
    run_product(w, p);
    Shape shape = shape_of(*p.ins);
    Operands o = operands_of(shape, w.machine->program.pool + p.ins->args);
    for (int i = 0; i < shape.n / 2; i++)
        w.busy[(size_t)o.d[i]] = (u8)(w.busy[(size_t)o.d[i]] - WRITES);
    for (int i = 0; i < 4 && shape.a_in_registers; i++)
        w.busy[(size_t)o.a[i]] = (u8)(w.busy[(size_t)o.a[i]] - READS);
    for (u32 offset : p.chunks)
        end_async_read(w, {w.block, offset});
}

void fence(Warp &w, const Ins &, const int *, u32 mask) {
    need_whole_warp(w, mask, "wgmma.fence");
    std::fill(w.touched.begin(), w.touched.end(), 0);
}

void commit(Warp &w, const Ins &, const int *, u32 mask) {
    need_whole_warp(w, mask, "wgmma.commit_group");
    for (Product &p : w.products)
        if (p.group < 0)
            p.group = w.product_group;
    w.product_group++;
}

void wait(Warp &w, const Ins &, const int *o, u32 mask) {
    need_whole_warp(w, mask, "wgmma.wait_group");
    size_t kept = 0;
    for (Product &p : w.products) {
        bool is_over = p.group >= 0 && p.group + o[0] < w.product_group;
        if (is_over)
            retire(w, p);
        else
            w.products[kept++] = std::move(p);
    }
    w.products.resize(kept);
}

} // namespace

/* For one N, both types, A in shared memory and in registers. */
#define PRODUCT(n, half, type, is_bf16)                                                            \
    {"wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type,                              \
     "{=r" #half "} l l p i i i i", issue, coded({n, is_bf16, false})},                            \
    {                                                                                              \
        "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type,                           \
            "{=r" #half "} {r4} l p i i i", issue, coded({n, is_bf16, true})                       \
    }
#define PRODUCTS(n, half) PRODUCT(n, half, "bf16", true), PRODUCT(n, half, "f16", false)

const std::vector<Op> WGMMA_OPS = {
    {"wgmma.fence.sync.aligned", "", fence},
    {"wgmma.commit_group.sync.aligned", "", commit},
    {"wgmma.wait_group.sync.aligned", "i", wait},
    PRODUCTS(64, 32),
    PRODUCTS(80, 40),
    PRODUCTS(128, 64),
    PRODUCTS(176, 88),
    PRODUCTS(256, 128),
};

void run_product(Warp &w, Product &p) {
    if (p.done)
        return;
    p.done = true;
    Shape shape = shape_of(*p.ins);
    Operands o = operands_of(shape, w.machine->program.pool + p.ins->args);
    switch (shape.n) {
    case 64: return compute<64>(w, shape, o, p);
    case 80: return compute<80>(w, shape, o, p);
    case 128: return compute<128>(w, shape, o, p);
    case 176: return compute<176>(w, shape, o, p);
    case 256: return compute<256>(w, shape, o, p);
    default: trap("wgmma: this machine does not know an N of %d", shape.n);
    }
}
