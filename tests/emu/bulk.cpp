// SPDX-License-Identifier: Apache-2.0
// bulk.cpp - mbarriers and TMA. Rules: PTX manual, "mbarrier", "cp.async.bulk.tensor" and "async
// proxy". A copy is visible to whoever knows that the mbarrier's phase is over.
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>

#include "cuda/ptx/ptx_sm90.cuh"
#include "units.h"

namespace emu {

namespace {

struct mbarrier {
    int count = 0, pending = 0;
    long long bytes = 0; // announced and not yet come; negative: come before they were announced
    int completed = 0;   // phases
    int awaited = 0;     // of these, those that somebody has waited for
    int last_bulk = 0;   // the last phase that bulk copies were part of
    int last_remote = 0; // or another block's arrivals
    knowledge gathered, known;
    int made_by = 0; // lane
    tick made_at = 0;
    int entity = 0;
};

// What the opaque bytes of a tensor map hold here (encode_tensor_map).
struct tensor_map {
    unsigned long long magic;
    char *base;
    long long size[4], stride[4]; // stride in bytes; [0] is that of an element
    int box[4];
    long long swizzle;
};
constexpr unsigned long long MAGIC = 0x57414e5f4d415031u;
static_assert(sizeof(tensor_map) <= 128, "a CUtensorMap has 128 bytes");

struct transfer {
    int block;   // whose shared memory
    u32 shared;  // where in it the box begins
    u32 barrier; // load: which counts
    tensor_map map;
    box_at at;
    int lane; // store: whose
    bool is_committed, has_read;
};

// On its way to another block.
struct arrival {
    int block;
    u32 barrier;
    knowledge sent;
};

std::vector<std::map<u32, mbarrier>> barriers; // per block of the cluster, by address
std::deque<transfer> loads;                    // that have not come
std::deque<transfer> stores;                   // that nobody has waited for
std::deque<arrival> arrivals;                  // from other blocks, that have not come
unsigned turn = 0;                             // which transfer comes next

machine &gpu() { return the_machine(); }

std::string line_of(site at) { return "line " + std::to_string(at.line) + ": "; }

void demand(const std::string &problem, site at) {
    if (!problem.empty())
        gpu().fail(line_of(at) + problem);
}

std::string hex(u32 address) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%x", address - shared_memory::BASE);
    return text;
}

mbarrier &barrier_at(u32 address, int block, bool by_async_proxy, site where) {
    auto &known = barriers[static_cast<std::size_t>(block)];
    auto found = known.find(address);
    if (found == known.end())
        gpu().fail(line_of(where) + "no mbarrier was initialised at " + hex(address));
    mbarrier &b = found->second;
    const knowledge &mine = gpu().knows();
    if (gpu().settings().check_order) {
        if (gpu().lane_number() != b.made_by && mine.generic.at(b.made_by) < b.made_at)
            gpu().fail(line_of(where) + "the mbarrier's initialisation may not have happened yet");
        if ((by_async_proxy || block != gpu().rank()) && mine.async.at(b.made_by) < b.made_at)
            gpu().fail(line_of(where) +
                       "the mbarrier's initialisation was not made visible to the async proxy");
    }
    return b;
}

// "" or what is wrong.
std::string advance(mbarrier &b) {
    if (b.pending == 0 && b.bytes < 0)
        return std::to_string(-b.bytes) + " more bytes arrived than announced";
    if (b.pending > 0 || b.bytes > 0)
        return "";
    b.completed++;
    b.pending = b.count;
    b.known.join(b.gathered);
    b.known.generic.set(b.entity, static_cast<tick>(b.completed));
    gpu().wake(&b);
    return "";
}

// Calls visit(shared address of 16 bytes, their place in global memory or nullptr if outside of the
// tensor) for the whole box.
template <typename Visit> void each_piece(const transfer &t, const Visit &visit) {
    const int *box = t.map.box;
    u32 place = t.shared;
    std::array<int, 4> i{};
    for (i[3] = 0; i[3] < box[3]; i[3]++)
        for (i[2] = 0; i[2] < box[2]; i[2]++)
            for (i[1] = 0; i[1] < box[1]; i[1]++)
                for (i[0] = 0; i[0] < box[0]; i[0] += 8, place += 16) {
                    bool is_inside = true;
                    char *from = t.map.base;
                    for (int d = 0; d < 4; d++) {
                        long long x =
                            t.at[static_cast<std::size_t>(d)] + i[static_cast<std::size_t>(d)];
                        is_inside = is_inside && x >= 0 && x < t.map.size[d];
                        from += x * t.map.stride[d];
                    }
                    u32 swizzled = t.map.swizzle ? place ^ (place >> 7 & 7) << 4 : place;
                    visit(swizzled, is_inside ? from : nullptr);
                }
}

long long bytes_of(const tensor_map &map) {
    return 2LL * map.box[0] * map.box[1] * map.box[2] * map.box[3];
}

void land(const transfer &t) {
    mbarrier &b = barriers[static_cast<std::size_t>(t.block)].at(t.barrier);
    shared_memory &memory = gpu().shared_of(t.block);
    each_piece(t, [&](u32 to, const char *from) {
        if (from)
            std::memcpy(memory.piece(to), from, 16);
        else
            std::memset(memory.piece(to), 0, 16);
        memory.end_bulk(to, b.entity, static_cast<tick>(b.completed + 1));
    });
    b.bytes -= bytes_of(t.map);
    b.last_bulk = b.completed + 1;
    std::string problem = advance(b);
    if (!problem.empty())
        gpu().report("mbarrier at " + hex(t.barrier) + ": " + problem);
}

void land(const arrival &a) {
    mbarrier &b = barriers[static_cast<std::size_t>(a.block)].at(a.barrier);
    b.pending--;
    b.last_remote = b.completed + 1;
    b.gathered.join(a.sent);
    std::string problem = advance(b);
    if (!problem.empty())
        gpu().report("mbarrier at " + hex(a.barrier) + ": " + problem);
}

void write_out(transfer &t) {
    t.has_read = true;
    shared_memory &memory = gpu().shared_of(t.block);
    each_piece(t, [&](u32 from, char *to) {
        if (!to)
            return;
        std::string problem = gpu().global.check(to, 16, true);
        if (!problem.empty())
            gpu().report("bulk store: " + problem);
        else
            std::memcpy(to, memory.piece(from), 16);
    });
}

transfer transfer_of(const void *map, u32 shared, const box_at &at, site where) {
    transfer t = {};
    std::memcpy(&t.map, map, sizeof t.map);
    if (t.map.magic != MAGIC)
        gpu().fail(line_of(where) + "this is no tensor map");
    u32 pattern = t.map.swizzle ? 1024 : 128; // what the kernels' address arithmetic relies on
    if (shared % pattern != 0)
        gpu().fail(line_of(where) + "shared address " + hex(shared) +
                   " of a box must be a multiple of " + std::to_string(pattern));
    t.shared = shared;
    t.at = at;
    t.lane = gpu().lane_number();
    return t;
}

} // namespace

void begin_bulk_units() {
    barriers.assign(static_cast<std::size_t>(gpu().cluster_size()), {});
    loads.clear();
    stores.clear();
    arrivals.clear();
    turn = 0;
}

bool land_something() {
    turn++;
    for (transfer &t : stores)
        if (!t.has_read && (turn % 2 || loads.empty())) {
            write_out(t);
            return true;
        }
    if (!arrivals.empty() && (turn % 2 == 0 || loads.empty())) {
        arrival a = arrivals.front();
        arrivals.pop_front();
        land(a);
        return true;
    }
    if (loads.empty())
        return false;
    auto which = loads.begin() + static_cast<long>(turn % loads.size());
    transfer t = *which;
    loads.erase(which);
    land(t);
    return true;
}

std::string bulk_leftovers(int block_rank) {
    for (const transfer &t : loads)
        if (t.block == block_rank)
            return "a block has ended with a bulk copy under way to its shared memory";
    for (const transfer &t : stores)
        if (t.block == block_rank)
            return "a block has ended with a bulk store that may still read its shared memory";
    for (const arrival &a : arrivals)
        if (a.block == block_rank)
            return "a block has ended with another block's arrival under way to its mbarrier";
    for (auto &[address, b] : barriers[static_cast<std::size_t>(block_rank)]) {
        if (b.bytes != 0 || b.awaited < b.last_bulk)
            return "a block has ended without a wait for bulk copies counted at " + hex(address);
        if (b.awaited < b.last_remote)
            return "a block has ended without a wait for another block's arrivals at " +
                   hex(address);
    }
    return "";
}

std::string mbarriers_in_words() {
    std::string text;
    for (std::size_t block = 0; block < barriers.size(); block++)
        for (auto &[address, b] : barriers[block])
            text += "; " + std::to_string(block) + ":" + hex(address) + " phase " +
                    std::to_string(b.completed) + " pending " + std::to_string(b.pending) + "/" +
                    std::to_string(b.count) + " bytes " + std::to_string(b.bytes);
    return text;
}

void mbarrier_init(u32 at, int count, site where) {
    auto &known = barriers[static_cast<std::size_t>(gpu().rank())];
    demand(gpu().shared().check_address(at / 16 * 16), where);
    if (at % 8 != 0 || known.count(at) > 0 || count < 1 || known.size() == machine::MBARRIERS)
        gpu().fail(line_of(where) + "an mbarrier cannot be initialised at " + hex(at));
    mbarrier b;
    b.count = b.pending = count;
    b.made_by = gpu().lane_number();
    b.made_at = gpu().knows().generic.at(b.made_by);
    b.entity = gpu().entity_of_mbarrier(gpu().rank(), static_cast<int>(known.size()));
    b.gathered = b.known = gpu().knows();
    known[at] = b;
}

void mbarrier_init_fence() { gpu().fence_mbarrier_init(); }

void mbarrier_arrive(u32 at, int block_rank, u32 bytes, site where) {
    if (block_rank < 0 || block_rank >= gpu().cluster_size() || gpu().has_left(block_rank))
        gpu().fail(line_of(where) + "arrival at an mbarrier of a block that is not there");
    mbarrier &b = barrier_at(at, block_rank, false, where);
    if (block_rank != gpu().rank()) {
        arrival a = {block_rank, at, gpu().knows()};
        gpu().release(a.sent);
        landing when = gpu().settings().copies;
        if (when == landing::early || (when == landing::random && gpu().coin()))
            land(a);
        else
            arrivals.push_back(a);
        return;
    }
    b.bytes += bytes;
    b.pending--;
    gpu().release(b.gathered);
    demand(advance(b), where);
}

void mbarrier_wait(u32 at, u32 parity, site where) {
    mbarrier &b = barrier_at(at, gpu().rank(), false, where);
    while ((static_cast<u32>(b.completed) & 1) == (parity & 1))
        gpu().sleep(&b, "mbarrier", where);
    gpu().knows().join(b.known);
    b.awaited = b.completed;
}

void bulk_load(u32 to, const void *map, u32 barrier, u32 blocks, const box_at &at, site where) {
    transfer t = transfer_of(map, to, at, where);
    t.barrier = barrier;
    if (blocks == 0 || blocks >> gpu().cluster_size() != 0)
        gpu().fail(line_of(where) + "a block that is not in the cluster");
    for (int block = 0; block < gpu().cluster_size(); block++) {
        if (!(blocks >> block & 1))
            continue;
        if (gpu().has_left(block))
            gpu().fail(line_of(where) + "bulk copy to a block that has left");
        t.block = block;
        barrier_at(barrier, block, true, where);
        shared_memory &memory = gpu().shared_of(block);
        each_piece(t, [&](u32 piece, const char *from) {
            demand(memory.check_address(piece), where);
            if (from)
                demand(gpu().global.check(from, 16, false), where);
            demand(memory.begin_bulk(piece, gpu().now()), where);
            std::memset(memory.piece(piece), 0xff, 16); // whoever reads too early gets NaN
        });
        landing when = gpu().settings().copies;
        if (when == landing::early || (when == landing::random && gpu().coin() && gpu().coin()))
            land(t);
        else
            loads.push_back(t);
    }
}

void bulk_store(const void *map, u32 from, const box_at &at, site where) {
    transfer t = transfer_of(map, from, at, where);
    t.block = gpu().rank();
    shared_memory &memory = gpu().shared();
    each_piece(t, [&](u32 piece, const char *) {
        demand(memory.check_address(piece), where);
        demand(memory.begin_store(piece, gpu().now()), where);
    });
    landing when = gpu().settings().copies;
    if (when == landing::early || (when == landing::random && gpu().coin()))
        write_out(t);
    stores.push_back(t);
}

void bulk_store_commit() {
    for (transfer &t : stores)
        t.is_committed = t.is_committed || t.lane == gpu().lane_number();
}

void bulk_store_wait_read() {
    for (transfer &t : stores) {
        if (t.lane != gpu().lane_number() || !t.is_committed)
            continue;
        if (!t.has_read)
            write_out(t);
        each_piece(t, [&](u32 piece, const char *) {
            gpu().shared_of(t.block).end_store(piece, gpu().now());
        });
    }
    auto is_over = [](const transfer &t) {
        return t.lane == gpu().lane_number() && t.is_committed;
    };
    stores.erase(std::remove_if(stores.begin(), stores.end(), is_over), stores.end());
}

} // namespace emu

// cuTensorMapEncodeTiled for 4-D maps of 16-bit elements, with its rules: 0, or the number of the
// rule that is broken.
extern "C" int emu_encode_tensor_map(void *map, void *base, const long long size[4],
                                     const long long stride[3], const int box[4], int is_swizzled) {
    emu::tensor_map made = {};
    made.magic = emu::MAGIC;
    made.base = static_cast<char *>(base);
    made.swizzle = is_swizzled;
    made.stride[0] = 2;
    if (reinterpret_cast<std::uintptr_t>(map) % 64 != 0)
        return 1;
    if (reinterpret_cast<std::uintptr_t>(base) % 16 != 0)
        return 2;
    for (int d = 0; d < 4; d++) {
        made.size[d] = size[d];
        made.box[d] = box[d];
        if (size[d] < 1 || size[d] > 1LL << 32)
            return 3;
        if (box[d] < 1 || box[d] > 256)
            return 4;
        if (d > 0) {
            made.stride[d] = stride[d - 1];
            if (stride[d - 1] < 1 || stride[d - 1] % 16 != 0 || stride[d - 1] >= 1LL << 40)
                return 5;
        }
    }
    if (box[0] * 2 % 16 != 0 || (is_swizzled && box[0] * 2 > 128))
        return 6;
    std::memcpy(map, &made, sizeof made);
    return 0;
}
