/* SPDX-License-Identifier: Apache-2.0
 * memory.cpp - loads, stores and copies: PTX ISA, "ld", "ld.global.nc", "st", "Warp-level matrix
 * load instruction: ldmatrix", "Warp-level matrix store instruction: stmatrix", "cp.async", "mapa",
 * "prefetch", "red", "atom".
 */
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace {

/* A parameter's address in the generic window: cvta.param leaves it as it is. */
const u64 PARAM_END = 1u << 20;

u64 address_of(Warp &w, const int *m, int lane, bool is_64) {
    u64 base = is_64 ? w.at<u64>(m[0])[lane] : w.at<u32>(m[0])[lane];
    u64 address = base + (u64)(i64)m[1];
    return is_64 ? address : (u32)address;
}

/* `words` registers of BYTES each, from consecutive elements. */
template <int BYTES> void put(Warp &w, const int *registers, int words, int lane, const u8 *from) {
    for (int i = 0; i < words; i++) {
        u64 x = 0;
        std::memcpy(&x, from + i * BYTES, BYTES);
        if (BYTES == 8)
            w.at<u64>(registers[i])[lane] = x;
        else
            w.at<u32>(registers[i])[lane] = (u32)x;
        w.define(registers[i], 1u << lane, ALL);
    }
}

template <int BYTES> void get(Warp &w, const int *registers, int words, int lane, u8 *to) {
    for (int i = 0; i < words; i++) {
        w.need(registers[i], 1u << lane, "a store");
        if (BYTES == 8)
            std::memcpy(to + i * BYTES, &w.at<u64>(registers[i])[lane], 8);
        else
            std::memcpy(to + i * BYTES, &w.at<u32>(registers[i])[lane], BYTES);
    }
}

/* "Kernel Function Parameters": they have addresses from 0 on. */
template <int BYTES, int WORDS> void load_param(Warp &w, const Ins &, const int *o, u32 mask) {
    const int *m = o + WORDS;
    w.need(m[0], mask, "an address");
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        u64 at = address_of(w, m, lane, true);
        if (at % (BYTES * WORDS) != 0)
            trap("misaligned parameter address %llu", (unsigned long long)at);
        if (at + BYTES * WORDS > (u64)w.machine->program.param_bytes)
            trap("parameter address %llu: outside of the parameters", (unsigned long long)at);
        put<BYTES>(w, o, WORDS, lane, w.machine->program.params + at);
    }
}

/* "Operand Size Exceeding Instruction-Type Size": a wider register gets it by its sign. */
template <bool SIGNED> void load_param_wide(Warp &w, const Ins &, const int *o, u32 mask) {
    w.need(o[1], mask, "an address");
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest), x;
        u64 at = address_of(w, o + 1, lane, true);
        if (at % 4 != 0 || at + 4 > (u64)w.machine->program.param_bytes)
            trap("parameter address %llu: misaligned or outside", (unsigned long long)at);
        std::memcpy(&x, w.machine->program.params + at, 4);
        w.at<u64>(o[0])[lane] = SIGNED ? (u64)(i64)x : (u64)(u32)x;
    }
    w.define(o[0], mask, ALL);
}

template <int BYTES, int WORDS> void load_global(Warp &w, const Ins &, const int *o, u32 mask) {
    const int *m = o + WORDS;
    w.need(m[0], mask, "an address");
    u64 at[LANES]; /* a result may lie over the address */
    lanes(mask, [&](int lane) { at[lane] = address_of(w, m, lane, true); });
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        u8 *from = global_memory(*w.machine, at[lane], BYTES * WORDS, BYTES * WORDS, false);
        put<BYTES>(w, o, WORDS, lane, from);
    }
}

template <int BYTES, int WORDS> void store_global(Warp &w, const Ins &, const int *o, u32 mask) {
    const int *registers = o + 2;
    w.need(o[0], mask, "an address");
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        u64 at = address_of(w, o, lane, true);
        u8 *to = global_memory(*w.machine, at, BYTES * WORDS, BYTES * WORDS, true);
        get<BYTES>(w, registers, WORDS, lane, to);
    }
}

template <int BYTES, int WORDS> void load_shared(Warp &w, const Ins &, const int *o, u32 mask) {
    const int *m = o + WORDS;
    const u32 bytes = BYTES * WORDS;
    w.need(m[0], mask, "an address");
    u32 at[LANES];
    lanes(mask, [&](int lane) { at[lane] = (u32)address_of(w, m, lane, false); });
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        Place place = shared_place(w, at[lane], bytes, bytes, true);
        note_read(w, place, bytes, lane);
        put<BYTES>(w, o, WORDS, lane, &place.block->shared[place.offset]);
    }
}

template <int BYTES, int WORDS> void store_shared(Warp &w, const Ins &, const int *o, u32 mask) {
    const int *registers = o + 2;
    const u32 bytes = BYTES * WORDS;
    w.need(o[0], mask, "an address");
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        Place place = shared_place(w, (u32)address_of(w, o, lane, false), bytes, bytes, true);
        note_write(w, place, bytes, lane);
        get<BYTES>(w, registers, WORDS, lane, &place.block->shared[place.offset]);
    }
}

/* ldmatrix .x4: lane 8i + r has the address of row r of matrix i; of each matrix lane l gets the
 * elements 2 (l % 4) and the next of row l / 4, or, .trans, of column l / 4 of rows. */
template <bool TRANSPOSED> void ldmatrix_x4(Warp &w, const Ins &, const int *o, u32 mask) {
    need_whole_warp(w, mask, "ldmatrix");
    w.need(o[4], mask, "an address");
    u16 rows[4][8][8];
    for (int lane = 0; lane < LANES; lane++) {
        Place at = shared_place(w, (u32)address_of(w, o + 4, lane, false), 16, 16, true);
        note_read(w, at, 16, TOGETHER);
        std::memcpy(rows[lane / 8][lane % 8], &at.block->shared[at.offset], 16);
    }
    for (int i = 0; i < 4; i++) {
        u32 *d = w.at<u32>(o[i]);
        for (int l = 0; l < LANES; l++) {
            int a = l / 4, b = l % 4 * 2;
            u16 low = TRANSPOSED ? rows[i][b][a] : rows[i][a][b];
            u16 high = TRANSPOSED ? rows[i][b + 1][a] : rows[i][a][b + 1];
            d[l] = (u32)high << 16 | low;
        }
        w.define(o[i], mask, ALL);
    }
}

template <bool TRANSPOSED> void stmatrix_x4(Warp &w, const Ins &, const int *o, u32 mask) {
    need_whole_warp(w, mask, "stmatrix");
    w.need(o[0], mask, "an address");
    u16 rows[4][8][8];
    for (int i = 0; i < 4; i++) {
        w.need(o[2 + i], mask, "stmatrix");
        const u32 *x = w.at<u32>(o[2 + i]);
        for (int l = 0; l < LANES; l++) {
            int a = l / 4, b = l % 4 * 2;
            (TRANSPOSED ? rows[i][b][a] : rows[i][a][b]) = (u16)x[l];
            (TRANSPOSED ? rows[i][b + 1][a] : rows[i][a][b + 1]) = (u16)(x[l] >> 16);
        }
    }
    for (int lane = 0; lane < LANES; lane++) {
        Place at = shared_place(w, (u32)address_of(w, o, lane, false), 16, 16, true);
        note_write(w, at, 16, TOGETHER);
        std::memcpy(&at.block->shared[at.offset], rows[lane / 8][lane % 8], 16);
    }
}

/* "red" and "atom" on a word of an output, lane by lane: in any order, as on the hardware. */
template <bool IS_MAX, bool RETURNS>
void change_global(Warp &w, const Ins &, const int *o, u32 mask) {
    const int *m = o + (RETURNS ? 1 : 0);
    w.need(m[0], mask, "an address");
    w.need(m[2], mask, "an atomic operation");
    u64 at[LANES]; /* a result may lie over the address */
    lanes(mask, [&](int lane) { at[lane] = address_of(w, m, lane, true); });
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        u8 *to = atomic_memory(*w.machine, at[lane]);
        u32 before, x = w.at<u32>(m[2])[lane];
        std::memcpy(&before, to, 4);
        u32 after = IS_MAX ? std::max(before, x) : before + x;
        std::memcpy(to, &after, 4);
        if (RETURNS)
            w.at<u32>(o[0])[lane] = before;
    }
    if (RETURNS)
        w.define(o[0], mask, ALL);
}

void land(Warp &w, Copy &copy) {
    u8 *to = &w.block->shared[copy.to];
    std::memset(to, 0, 16);
    if (copy.bytes)
        std::memcpy(to, copy.from, copy.bytes);
    copy.landed = true;
}

/* cp.async.cg: 16 bytes, of which the first src-size are read and the others become zero. */
template <bool HAS_SIZE> void cp_async(Warp &w, const Ins &, const int *o, u32 mask) {
    w.need(o[0], mask, "an address");
    if (o[4] != 16)
        trap("cp.async.cg: cp-size must be 16");
    if (HAS_SIZE)
        w.need(o[5], mask, "cp.async");
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        Place to = shared_place(w, (u32)address_of(w, o, lane, false), 16, 16, true);
        u32 bytes = HAS_SIZE ? w.at<u32>(o[5])[lane] : 16;
        if (bytes > 16)
            trap("cp.async: src-size %u is larger than cp-size", bytes);
        const u8 *from = nullptr;
        if (bytes) {
            w.need(o[2], 1u << lane, "an address");
            from = global_memory(*w.machine, address_of(w, o + 2, lane, true), bytes, 16, false);
        }
        begin_copy(w, to, 16, lane);
        std::memset(&to.block->shared[to.offset], 0xff, 16);
        w.copies.push_back({lane, w.copy_group[lane], to.offset, from, bytes, false});
        if (w.machine->lands_now())
            land(w, w.copies.back());
    }
}

void commit_copies(Warp &w, const Ins &, const int *, u32 mask) {
    lanes(mask, [&](int lane) { w.copy_group[lane]++; });
}

/* Until at most o[0] of the newest groups of a thread are under way. */
void wait_copies(Warp &w, const Ins &, const int *o, u32 mask) {
    std::vector<Copy> rest;
    for (Copy &copy : w.copies) {
        bool is_over =
            (mask >> copy.lane & 1) != 0 && copy.group + (u32)o[0] < w.copy_group[copy.lane];
        if (!is_over) {
            rest.push_back(copy);
            continue;
        }
        if (!copy.landed)
            land(w, copy);
        end_copy(w, {w.block, copy.to}, 16, copy.lane);
    }
    w.copies.swap(rest);
}

/* The address of the same place in the memory of the block with that rank. */
void mapa(Warp &w, const Ins &, const int *o, u32 mask) {
    u32 *d = w.at<u32>(o[0]);
    const u32 *a = w.at<u32>(o[1]), *rank = w.at<u32>(o[2]);
    const u32 shift = w.machine->knobs.rank_bits ? 0 : 1; /* shared_place */
    w.need(o[1], mask, "mapa");
    w.need(o[2], mask, "mapa");
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        if (rank[lane] >= w.machine->blocks.size())
            trap("mapa: the cluster has no block %u", rank[lane]);
        d[lane] = (a[lane] & 0xffffffu) | (rank[lane] + shift) << RANK_SHIFT;
    }
    w.define(o[0], mask, ALL);
}

/* Only that it is a map: 64-byte aligned, in the parameters. */
void prefetch_map(Warp &w, const Ins &, const int *o, u32 mask) {
    w.need(o[0], mask, "an address");
    for (u32 rest = mask; rest; rest &= rest - 1) {
        u64 at = address_of(w, o, __builtin_ctz(rest), true);
        if (at % 64 != 0 || at + 128 > (u64)w.machine->program.param_bytes || at >= PARAM_END)
            trap("prefetch.tensormap: no tensor map at %llu", (unsigned long long)at);
    }
}

} // namespace

#define LOADS_OF_PARAMS(t, BYTES, one, two, four)                                                  \
    {"ld.param." t, one " m", load_param<BYTES, 1>},                                               \
        {"ld.param.v2." t, two " m", load_param<BYTES, 2>}, {                                      \
        "ld.param.v4." t, four " m", load_param<BYTES, 4>                                          \
    }
#define WORDS_OF_PARAMS(t) LOADS_OF_PARAMS(t, 4, "=r", "{=r2}", "{=r4}")
#define PAIRS_OF_PARAMS(t) LOADS_OF_PARAMS(t, 8, "=l", "{=l2}", "{=l4}")
#define GLOBAL(t)                                                                                  \
    {"ld.global.nc." t, "=r m", load_global<4, 1>},                                                \
        {"ld.global.nc.v2." t, "{=r2} m", load_global<4, 2>},                                      \
        {"ld.global.nc.v4." t, "{=r4} m", load_global<4, 4>},                                      \
        {"st.global." t, "m r", store_global<4, 1>},                                               \
        {"st.global.v2." t, "m {r2}", store_global<4, 2>}, {                                       \
        "st.global.v4." t, "m {r4}", store_global<4, 4>                                            \
    }

const std::vector<Op> MEMORY_OPS = {
    WORDS_OF_PARAMS("b32"),
    WORDS_OF_PARAMS("u32"),
    WORDS_OF_PARAMS("s32"),
    WORDS_OF_PARAMS("f32"),
    PAIRS_OF_PARAMS("b64"),
    PAIRS_OF_PARAMS("u64"),
    PAIRS_OF_PARAMS("s64"),
    GLOBAL("b32"),
    GLOBAL("u32"),
    GLOBAL("s32"),
    GLOBAL("f32"),
    {"ld.param.s32", "=l m", load_param_wide<true>},
    {"ld.param.u32", "=l m", load_param_wide<false>},
    {"ld.param.b32", "=l m", load_param_wide<false>},
    {"ld.global.nc.s64", "=l m", load_global<8, 1>},
    {"ld.global.nc.f64", "=l m", load_global<8, 1>},
    {"ld.global.b16", "=h m", load_global<2, 1>},
    {"ld.global.b32", "=r m", load_global<4, 1>},
    {"ld.global.v4.b32", "{=r4} m", load_global<4, 4>},
    {"ld.global.nc.b16", "=h m", load_global<2, 1>},
    {"st.global.b16", "m h", store_global<2, 1>},
    {"red.global.max.u32", "m r", change_global<true, false>},
    {"atom.global.add.u32", "=r m r", change_global<false, true>},
    {"ld.shared.b32", "=r s", load_shared<4, 1>},
    {"ld.shared.v4.b32", "{=r4} s", load_shared<4, 4>},
    {"st.shared.b32", "s r", store_shared<4, 1>},
    {"st.shared.f32", "s r", store_shared<4, 1>},
    {"st.shared.v4.b32", "s {r4}", store_shared<4, 4>},
    {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", "{=r4} s", ldmatrix_x4<false>},
    {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "{=r4} s", ldmatrix_x4<true>},
    {"stmatrix.sync.aligned.m8n8.x4.shared.b16", "s {r4}", stmatrix_x4<false>},
    {"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "s {r4}", stmatrix_x4<true>},
    {"cp.async.cg.shared.global", "s m i", cp_async<false>},
    {"cp.async.cg.shared.global", "s m i r", cp_async<true>},
    {"cp.async.commit_group", "", commit_copies},
    {"cp.async.wait_group", "i", wait_copies},
    {"mapa.shared::cluster.u32", "=r r r", mapa},
    {"prefetch.tensormap", "m", prefetch_map},
};
