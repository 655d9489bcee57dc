/* SPDX-License-Identifier: Apache-2.0
 * bulk.cpp - bulk copies of boxes of a tensor: PTX ISA, "cp.async.bulk.tensor",
 * "cp.async.bulk.commit_group", "cp.async.bulk.wait_group" and "Tensors" (boxes, swizzle); and the
 * map that cuTensorMapEncodeTiled makes of one: CUDA driver API, "Tensor Map Object Management"
 * (maps.py checks its rules).
 */
#include <cstring>

#include "machine.h"

namespace {

/* What a map of ours says, at its place in the parameters: maps.py writes it. */
struct Map {
    u32 magic, element_bytes;
    u64 data;
    u64 size[4], stride[3]; /* elements, bytes */
    u32 box[4];
    u32 swizzle, unused;
};
static_assert(sizeof(Map) == 96, "as maps.py has it");

Map map_at(Machine &m, u64 at) {
    if (at % 64 != 0 || at + 128 > (u64)m.program.param_bytes)
        trap("tensor map at %llu: not 64-byte aligned in the parameters", (unsigned long long)at);
    Map map;
    std::memcpy(&map, m.program.params + at, sizeof map);
    if (map.magic != 0x70a9ed00u)
        trap("tensor map at %llu: nobody has encoded one there", (unsigned long long)at);
    return map;
}

u64 address_of(Warp &w, const int *m, int lane) {
    w.need(m[0], 1u << lane, "an address");
    return w.at<u64>(m[0])[lane] + (u64)(i64)m[1];
}

u32 shared_of(Warp &w, const int *m, int lane) {
    w.need(m[0], 1u << lane, "an address");
    return w.at<u32>(m[0])[lane] + (u32)m[1];
}

u32 box_bytes(const Map &map) {
    u32 bytes = map.element_bytes;
    for (u32 size : map.box)
        bytes *= size;
    return bytes;
}

/* The box in chunks of 16 bytes, dense in the order of its elements, then swizzled by absolute
 * address: f(place in shared memory, address in global memory or null where it is outside). */
template <class F> void each_chunk(Machine &m, const Map &map, const int *at, u32 shared, F f) {
    u32 row_bytes = map.box[0] * map.element_bytes, linear = 0;
    for (int d = 0; d < (int)map.box[3]; d++)
        for (int c = 0; c < (int)map.box[2]; c++)
            for (int b = 0; b < (int)map.box[1]; b++)
                for (u32 x = 0; x < row_bytes; x += CHUNK, linear += CHUNK) {
                    i64 column = at[0] + (i64)(x / map.element_bytes);
                    i64 i[3] = {at[1] + (i64)b, at[2] + (i64)c, at[3] + (i64)d};
                    bool inside = column >= 0 && column < (i64)map.size[0];
                    u64 address = map.data + (u64)column * map.element_bytes;
                    for (int j = 0; j < 3; j++) {
                        inside = inside && i[j] >= 0 && i[j] < (i64)map.size[j + 1];
                        address += (u64)i[j] * map.stride[j];
                    }
                    u32 absolute = shared + (u32)m.knobs.window + linear;
                    u32 swizzled = absolute ^ (absolute >> 3 & 0x70);
                    f(swizzled - (u32)m.knobs.window, inside ? address : 0);
                }
}

/* A chunk lies wholly inside or outside: sizes are multiples of 8 elements (maps.py). */
void run_load(Machine &m, const Bulk &bulk) {
    Map map = map_at(m, (u64)(bulk.map - m.program.params));
    for (size_t rank = 0; rank < m.blocks.size(); rank++) {
        if (!(bulk.blocks >> rank & 1))
            continue;
        Block &block = m.blocks[rank];
        if (block.has_left())
            trap("a bulk copy lands in the memory of block %d of the cluster, which has left",
                 block.rank);
        const auto barrier = block.mbarriers.find(bulk.mbarrier);
        if (barrier == block.mbarriers.end())
            trap("a bulk copy counts its bytes at 0x%x, which is no mbarrier", bulk.mbarrier);
        each_chunk(m, map, bulk.at, bulk.shared, [&](u32 offset, u64 address) {
            u8 *to = &block.shared[offset];
            if (address)
                std::memcpy(to, global_memory(m, address, CHUNK, CHUNK, false), CHUNK);
            else
                std::memset(to, 0, CHUNK);
            end_bulk_load({&block, offset}, barrier->second);
        });
        complete_bytes(m, block, bulk.mbarrier, box_bytes(map));
    }
}

void run_store(Machine &m, Bulk &bulk) {
    Map map = map_at(m, (u64)(bulk.map - m.program.params));
    Block &block = m.blocks[(size_t)bulk.block];
    Warp &w = m.warps[(size_t)bulk.warp];
    each_chunk(m, map, bulk.at, bulk.shared, [&](u32 offset, u64 address) {
        if (address)
            std::memcpy(global_memory(m, address, CHUNK, CHUNK, true), &block.shared[offset],
                        CHUNK);
        end_async_read(w, {&block, offset});
    });
}

void coordinates(Warp &w, const int *o, int lane, int *at) {
    for (int i = 0; i < 4; i++) {
        w.need(o[i], 1u << lane, "a coordinate");
        at[i] = w.at<int>(o[i])[lane];
    }
}

/* [to], [map, {4}], [mbarrier](, mask). Without .multicast to the block that `to` names. */
template <bool MULTICAST> void load(Warp &w, const Ins &, const int *o, u32 mask) {
    Machine &m = *w.machine;
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        u64 map_address = address_of(w, o + 2, lane);
        Map map = map_at(m, map_address);
        Bulk bulk{false, w.block->rank, w.id, lane, 0, 0, 0, m.program.params + map_address, {},
                  0,     false};
        coordinates(w, o + 4, lane, bulk.at);
        u32 alignment = map.swizzle ? 1024 : 128; /* of the pattern; of any box */
        Place to = shared_place(w, shared_of(w, o, lane), box_bytes(map), 128, false);
        if ((to.offset + (u32)m.knobs.window) % alignment)
            trap("cp.async.bulk.tensor: a swizzled box at 0x%x, not a multiple of 1024", to.offset);
        Place barrier = shared_place(w, shared_of(w, o + 8, lane), 8, 8, false);
        if (barrier.block != to.block)
            trap("cp.async.bulk.tensor: box and mbarrier are in different blocks");
        mbarrier_at(w, barrier);
        bulk.blocks = 1u << to.block->rank;
        bulk.shared = to.offset;
        bulk.mbarrier = barrier.offset;
        if (MULTICAST) {
            w.need(o[10], 1u << lane, "cp.async.bulk.tensor");
            bulk.blocks = w.at<u32>(o[10])[lane] & 0xffff;
            if (bulk.blocks == 0 || bulk.blocks >> m.blocks.size())
                trap("cp.async.bulk.tensor: blocks 0x%x of the cluster", bulk.blocks);
        }
        for (Block &block : m.blocks) {
            if (!(bulk.blocks >> block.rank & 1))
                continue;
            each_chunk(m, map, bulk.at, bulk.shared, [&](u32 offset, u64) {
                begin_bulk_load(w, {&block, offset});
                std::memset(&block.shared[offset], 0xff, CHUNK);
            });
        }
        m.bulk.push_back(bulk);
        if (m.lands_now())
            run_bulk(m, m.bulk.back());
    }
}

/* [map, {4}], [from] */
void store(Warp &w, const Ins &, const int *o, u32 mask) {
    Machine &m = *w.machine;
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        u64 map_address = address_of(w, o, lane);
        Map map = map_at(m, map_address);
        Bulk bulk{true, w.block->rank, w.id, lane, 0, 0, 0, m.program.params + map_address, {},
                  -1,   false};
        coordinates(w, o + 2, lane, bulk.at);
        Place from = shared_place(w, shared_of(w, o + 6, lane), box_bytes(map), 128, true);
        if (map.swizzle && (from.offset + (u32)m.knobs.window) % 1024)
            trap("cp.async.bulk.tensor: a swizzled box at 0x%x, not a multiple of 1024",
                 from.offset);
        bulk.shared = from.offset;
        each_chunk(m, map, bulk.at, bulk.shared,
                   [&](u32 offset, u64) { begin_async_read(w, {w.block, offset}); });
        m.bulk.push_back(bulk);
        if (m.lands_now())
            run_bulk(m, m.bulk.back());
    }
}

void commit(Warp &w, const Ins &, const int *, u32 mask) {
    for (Bulk &bulk : w.machine->bulk)
        if (bulk.is_store && bulk.warp == w.id && bulk.group < 0 && (mask >> bulk.lane & 1))
            bulk.group = w.store_group[bulk.lane];
    lanes(mask, [&](int lane) { w.store_group[lane]++; });
}

/* Until at most o[0] groups of a thread are under way, or, .read, still read their sources. */
void wait(Warp &w, const Ins &, const int *o, u32 mask) {
    Machine &m = *w.machine;
    std::vector<Bulk> rest;
    for (Bulk &bulk : m.bulk) {
        bool is_over = bulk.is_store && bulk.warp == w.id && (mask >> bulk.lane & 1) &&
                       bulk.group >= 0 && bulk.group + o[0] < w.store_group[bulk.lane];
        if (is_over)
            run_bulk(m, bulk);
        else
            rest.push_back(bulk);
    }
    m.bulk.swap(rest);
}

} // namespace

void run_bulk(Machine &m, Bulk &bulk) {
    if (bulk.done)
        return;
    bulk.done = true;
    if (bulk.is_store)
        run_store(m, bulk);
    else
        run_load(m, bulk);
}

#define TENSOR_COPY "cp.async.bulk.tensor.4d."
#define TO_SHARED TENSOR_COPY "shared::cluster.global.tile.mbarrier::complete_tx::bytes"

const std::vector<Op> BULK_OPS = {
    {TO_SHARED, "s t4 s", load<false>},
    {TO_SHARED ".multicast::cluster", "s t4 s h", load<true>},
    {TENSOR_COPY "global.shared::cta.tile.bulk_group", "t4 s", store},
    {"cp.async.bulk.commit_group", "", commit},
    {"cp.async.bulk.wait_group", "i", wait},
    {"cp.async.bulk.wait_group.read", "i", wait},
};
