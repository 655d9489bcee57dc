/* SPDX-License-Identifier: Apache-2.0
 * shadow.cpp - who may touch memory, and when: addresses, alignment, and the order of accesses.
 *
 * Order follows PTX ISA, "Memory Consistency Model": an access is ordered after another one if a
 * chain of barriers leads from one to the other. Vector clocks keep that chain: a release copies
 * what a warp knows into a barrier, an acquire takes it out. The verdict does not depend on the
 * schedule. Async proxy ("membar / fence"): what a thread has stored is visible to wgmma and
 * bulk copies only after its own fence.proxy.async; the manual would also let another thread fence
 * what it has seen, which no code here does.
 */
#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "machine.h"

void trap(const char *format, ...) {
    char text[600];
    va_list more;
    va_start(more, format);
    vsnprintf(text, sizeof text, format, more);
    va_end(more);
    throw Trap(text);
}

void need_whole_warp(const Warp &w, u32 mask, const char *what) {
    if (mask != w.present() || mask == 0)
        trap("%s: diverged warp (lanes %08x of %08x)", what, mask, w.present());
}

bool Block::has_left() const {
    return std::all_of(warps.begin(), warps.end(), [](const Warp *w) { return w->over(); });
}

/* Bits 24 and up of a shared address are the rank of its block in the cluster: where mapa puts it,
 * and what a block's own addresses have there (SASS: PRMT 0x654, S2UR SR_CgaCtaId). Without
 * knobs.rank_bits a block's own addresses have 0 there, mapa's the rank and one. */
Place shared_place(Warp &w, u32 address, u32 bytes, u32 alignment, bool own_block) {
    Machine &m = *w.machine;
    u32 rank = address >> RANK_SHIFT, offset = (address & 0xffffffu) - (u32)m.knobs.window;
    if (!m.knobs.rank_bits)
        rank = rank ? rank - 1 : (u32)w.block->rank;
    if (rank >= m.blocks.size())
        trap("shared address 0x%x: no block of this rank", address);
    if (own_block && rank != (u32)w.block->rank)
        trap("shared address 0x%x: of another block, in an access to shared::cta", address);
    if (address % alignment != 0)
        trap("misaligned shared address 0x%x: not a multiple of %u", address, alignment);
    if (offset + bytes > (u32)m.program.shared_bytes || offset + bytes < offset)
        trap("shared address 0x%x: outside of the block's memory", address);
    return {&m.blocks[rank], offset};
}

u8 *atomic_memory(Machine &m, u64 address) {
    if (address % 4 != 0)
        trap("misaligned atomic operation at 0x%llx", (unsigned long long)address);
    for (const Tensor &t : m.tensors)
        if (t.output && address >= (u64)t.data && address + 4 <= (u64)t.data + (u64)t.bytes)
            return (u8 *)address;
    trap("atomic operation at 0x%llx: out of every output", (unsigned long long)address);
}

u8 *global_memory(Machine &m, u64 address, u64 bytes, u32 alignment, bool writes) {
    if (address % alignment != 0)
        trap("misaligned global address 0x%llx: not a multiple of %u", (unsigned long long)address,
             alignment);
    for (size_t i = 0; i < m.tensors.size(); i++) {
        Tensor &t = m.tensors[i];
        u64 begin = (u64)t.data, end = begin + (u64)t.bytes;
        if (address < begin || address + bytes > end)
            continue;
        if (!writes && t.output == 1)
            trap("global read of the output %s", t.name);
        if (writes && !t.output)
            trap("global write to the input %s", t.name);
        for (u64 j = address - begin; t.output && j < address - begin + bytes; j++) {
            if (m.written[i][j])
                trap("%s: byte %lld is %s", t.name, (long long)j,
                     writes ? "written twice" : "read where it was written");
            m.written[i][j] = writes;
        }
        return (u8 *)address;
    }
    trap("global address 0x%llx: out of every tensor", (unsigned long long)address);
}

/* Whether w knows of what `who` did at that time. */
static bool knows(const Warp &w, int who, Clock when, int lane, int other_lane) {
    if (who < 0 || !w.machine->knobs.check_order)
        return true;
    if (who == w.id && (lane != other_lane || lane == TOGETHER))
        return when < w.together;
    return w.clocks.at[who] >= when;
}

static u16 bits_of_bytes(u32 offset, u32 bytes) {
    u32 first = offset % CHUNK, count = std::min<u32>(bytes, CHUNK - first);
    return (u16)(((1u << count) - 1) << first);
}

template <class F> static void each_granule(Place at, u32 bytes, F f) {
    for (u32 done = 0; done < bytes;) {
        u32 offset = at.offset + done;
        f(at.block->granules[offset / CHUNK], bits_of_bytes(offset, bytes - done));
        done += CHUNK - offset % CHUNK;
    }
}

static void check_readable(Warp &w, const Granule &g, u16 bits, int lane, u32 offset) {
    if (g.holds_mbarrier)
        trap("shared offset 0x%x: an mbarrier, read as data", offset);
    if (g.writes_under_way)
        trap("shared offset 0x%x: read while a copy into it is in flight", offset);
    if (bits & ~g.defined)
        trap("shared offset 0x%x: uninitialised memory is read", offset);
    if (!knows(w, g.writer, g.written, lane, g.writer_lane))
        trap("shared offset 0x%x: read, but no barrier orders it after its write by %s %d", offset,
             g.writer < WARPS ? "warp" : "mbarrier", g.writer % WARPS);
}

static void check_writable(Warp &w, const Granule &g, int lane, u32 offset) {
    if (g.holds_mbarrier)
        trap("shared offset 0x%x: an mbarrier, overwritten", offset);
    if (g.writes_under_way)
        trap("shared offset 0x%x: written while a copy into it is in flight", offset);
    if (g.reads_under_way)
        trap("shared offset 0x%x: overwritten while wgmma or a bulk store still reads it", offset);
    if (!knows(w, g.writer, g.written, lane, g.writer_lane))
        trap("shared offset 0x%x: written, but no barrier orders it after the write by %s %d",
             offset, g.writer < WARPS ? "warp" : "mbarrier", g.writer % WARPS);
    if (!w.machine->knobs.check_order)
        return;
    for (int other = 0; other < WARPS; other++)
        if (other != w.id && g.read[other] > w.clocks.at[other])
            trap("shared offset 0x%x: overwritten, but no barrier orders it after the read by"
                 " warp %d",
                 offset, other);
}

void note_read(Warp &w, Place at, u32 bytes, int lane) {
    each_granule(at, bytes, [&](Granule &g, u16 bits) {
        check_readable(w, g, bits, lane, at.offset);
        g.read[w.id] = w.clocks.at[w.id];
    });
}

static void mark_written(Warp &w, Block &block, Granule &g, u16 bits, int lane) {
    g.defined |= bits;
    g.writer = w.id;
    g.writer_lane = (u8)lane;
    g.written = w.clocks.at[w.id];
    if (!g.unfenced)
        w.unfenced.push_back({&block, (u32)(&g - block.granules.data())});
    g.unfenced = 1;
}

void note_write(Warp &w, Place at, u32 bytes, int lane) {
    each_granule(at, bytes, [&](Granule &g, u16 bits) {
        check_writable(w, g, lane, at.offset);
        mark_written(w, *at.block, g, bits, lane);
    });
}

/* "cp.async": until it is waited for, its bytes are anybody's guess. */
void begin_copy(Warp &w, Place at, u32 bytes, int lane) {
    each_granule(at, bytes, [&](Granule &g, u16 bits) {
        check_writable(w, g, lane, at.offset);
        g.defined &= (u16)~bits;
        g.writes_under_way++;
    });
}

void end_copy(Warp &w, Place at, u32 bytes, int lane) {
    each_granule(at, bytes, [&](Granule &g, u16 bits) {
        g.writes_under_way--;
        mark_written(w, *at.block, g, bits, lane);
    });
}

static void check_fenced(const Granule &g, u32 offset, const char *what) {
    if (g.unfenced)
        trap("shared offset 0x%x: %s, but its store by a thread is not visible to the async proxy"
             " (no fence.proxy.async)",
             offset, what);
}

void begin_bulk_load(Warp &w, Place chunk) {
    Granule &g = chunk.block->granules[chunk.offset / CHUNK];
    check_writable(w, g, TOGETHER, chunk.offset);
    check_fenced(g, chunk.offset, "a bulk copy overwrites it");
    g.defined = 0;
    g.writes_under_way++;
}

void end_bulk_load(Place chunk, const Mbarrier &barrier) {
    Granule &g = chunk.block->granules[chunk.offset / CHUNK];
    g.writes_under_way--;
    g.defined = 0xffff;
    g.writer = WARPS + barrier.number;
    g.written = barrier.phase + 1; /* known to who sees this phase completed */
    g.unfenced = 0;
}

void begin_async_read(Warp &w, Place chunk) {
    Granule &g = chunk.block->granules[chunk.offset / CHUNK];
    check_readable(w, g, 0xffff, TOGETHER, chunk.offset);
    check_fenced(g, chunk.offset, "wgmma or a bulk store reads it");
    g.reads_under_way++;
}

void end_async_read(Warp &w, Place chunk) {
    Granule &g = chunk.block->granules[chunk.offset / CHUNK];
    g.reads_under_way--;
    g.read[w.id] = w.clocks.at[w.id];
}

/* Of what these lanes have stored (cp.async included), nothing is hidden any longer. */
void fence_async(Warp &w, u32 mask) {
    std::vector<std::pair<Block *, u32>> rest;
    for (auto &[block, number] : w.unfenced) {
        Granule &g = block->granules[number];
        if (g.writer != w.id || !g.unfenced)
            continue;
        if (g.writer_lane == TOGETHER ? mask == w.present() : (mask >> g.writer_lane & 1) != 0)
            g.unfenced = 0;
        else
            rest.push_back({block, number});
    }
    w.unfenced.swap(rest);
}

void release(Warp &w, Clocks &to) {
    to.join(w.clocks);
    w.clocks.at[w.id]++;
}

void acquire(Warp &w, const Clocks &from) {
    if (from.at[w.id] + 1 > w.together && from.at[w.id] != 0)
        w.together = from.at[w.id] + 1;
    w.clocks.join(from);
}

/* What any lane did before is known to all lanes from here on. */
void lanes_meet(Warp &w) {
    w.clocks.at[w.id]++;
    w.together = w.clocks.at[w.id];
}
