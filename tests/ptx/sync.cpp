/* SPDX-License-Identifier: Apache-2.0
 * sync.cpp - barriers of blocks and clusters, mbarriers, fences: PTX ISA, "bar, barrier",
 * "barrier.cluster", "mbarrier", "membar / fence".
 */
#include "machine.h"

namespace {

/* An instruction that cannot go on: it is tried again when something has happened. */
void try_again(Warp &w, Wait why) {
    w.wait = why;
    w.again = true;
}

NamedBarrier &named(Warp &w, u32 id, u32 threads, u32 mask) {
    need_whole_warp(w, mask, "barrier");
    if (w.left)
        trap("barrier: lanes %08x have returned", w.left);
    if (id >= BARRIERS)
        trap("barrier %u: there are 16", id);
    if (threads % LANES != 0 || threads == 0 || threads > (u32)w.machine->program.threads)
        trap("barrier %u: for %u threads", id, threads);
    NamedBarrier &b = w.block->barriers[id];
    if (b.arrived && b.expected != threads)
        trap("barrier %u: for %u threads, but others came for %u", id, threads, b.expected);
    b.expected = threads;
    return b;
}

/* The last one lets all go on: each knows what all did before they came. */
void arrived(Warp &w, NamedBarrier &b) {
    b.arrived += LANES;
    release(w, b.clocks);
    if (b.arrived < b.expected)
        return;
    for (int index : b.waiting) {
        Warp &other = *w.block->warps[(size_t)index];
        acquire(other, b.clocks);
        lanes_meet(other);
        other.wait = Wait::NOTHING;
    }
    b = NamedBarrier();
    w.machine->events++;
}

void barrier_sync(Warp &w, u32 id, u32 threads, u32 mask) {
    NamedBarrier &b = named(w, id, threads, mask);
    b.waiting.push_back(w.index);
    w.wait = Wait::BARRIER;
    arrived(w, b);
}

u32 one_value(Warp &w, int slot, u32 mask) {
    w.need(slot, mask, "barrier");
    const u32 *x = w.at<u32>(slot);
    u32 value = x[__builtin_ctz(mask)];
    for (u32 rest = mask; rest; rest &= rest - 1)
        if (x[__builtin_ctz(rest)] != value)
            trap("barrier: lanes have different operands");
    return value;
}

void sync_all(Warp &w, const Ins &, const int *o, u32 mask) {
    barrier_sync(w, one_value(w, o[0], mask), (u32)w.machine->program.threads, mask);
}

void sync_some(Warp &w, const Ins &, const int *o, u32 mask) {
    barrier_sync(w, one_value(w, o[0], mask), one_value(w, o[1], mask), mask);
}

void arrive_some(Warp &w, const Ins &, const int *o, u32 mask) {
    arrived(w, named(w, one_value(w, o[0], mask), one_value(w, o[1], mask), mask));
}

/* "barrier.cluster": of all threads of the cluster that have not exited. */
template <bool RELEASES> void cluster_arrive(Warp &w, const Ins &, const int *, u32 mask) {
    need_whole_warp(w, mask, "barrier.cluster.arrive");
    Machine &m = *w.machine;
    if (w.at_cluster)
        trap("barrier.cluster.arrive: twice without a wait");
    w.at_cluster = true;
    w.cluster_phase = m.cluster_phase;
    m.cluster_inits.join(w.inits);
    for (int i = 0; i < WARPS; i++) /* .relaxed orders fence.mbarrier_init alone */
        m.cluster_inits.at[i] = std::max(m.cluster_inits.at[i], w.clocks.at[i]);
    if (RELEASES)
        release(w, m.cluster_clocks);
    m.cluster_arrived++;
    m.events++;
}

void cluster_wait(Warp &w, const Ins &, const int *, u32 mask) {
    need_whole_warp(w, mask, "barrier.cluster.wait");
    Machine &m = *w.machine;
    if (!w.at_cluster)
        trap("barrier.cluster.wait: without an arrive");
    if (m.cluster_phase == w.cluster_phase)
        return try_again(w, Wait::CLUSTER);
    w.at_cluster = false;
    acquire(w, m.cluster_done);
    w.inits.join(m.cluster_inits_done);
    lanes_meet(w);
}

u32 address_of(Warp &w, const int *m, int lane) {
    w.need(m[0], 1u << lane, "an address");
    return w.at<u32>(m[0])[lane] + (u32)m[1];
}

/* "mbarrier.init" */
void mbarrier_init(Warp &w, const Ins &, const int *o, u32 mask) {
    w.need(o[2], mask, "mbarrier.init");
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        Place at = shared_place(w, address_of(w, o, lane), 8, 8, true);
        u32 count = w.at<u32>(o[2])[lane];
        if (count == 0 || count >= 1u << 20)
            trap("mbarrier.init: a count of %u", count);
        if (at.block->mbarriers.count(at.offset))
            trap("mbarrier.init: there is one at 0x%x", at.offset);
        Granule &g = at.block->granules[at.offset / CHUNK];
        if (g.holds_mbarrier || g.defined)
            trap("mbarrier.init: data or another mbarrier lies at 0x%x", at.offset);
        Mbarrier b;
        size_t number = at.block->mbarriers.size();
        if (number >= MBARRIERS / 2)
            trap("mbarrier.init: more than this machine counts");
        b.number = (int)number + at.block->rank * (MBARRIERS / 2);
        b.count = count;
        b.pending = count;
        b.maker = w.id;
        b.made = w.clocks.at[w.id];
        at.block->mbarriers[at.offset] = b;
        g.holds_mbarrier = 1;
    }
}

void end_phase_if_over(Machine &m, Mbarrier &b) {
    if (b.pending == 0 && b.bytes == 0) {
        b.phase++;
        b.pending = b.count;
        b.done.join(b.arriving);
        m.events++;
    }
}

void arrive_once(Warp &w, Mbarrier &b) {
    if (b.pending <= 0)
        trap("mbarrier.arrive: more arrivals than the count %u", b.count);
    release(w, b.arriving);
    b.pending--;
    end_phase_if_over(*w.machine, b);
}

template <bool OWN_BLOCK> void mbarrier_arrive(Warp &w, const Ins &, const int *o, u32 mask) {
    for (u32 rest = mask; rest; rest &= rest - 1)
        arrive_once(w, mbarrier_at(w, shared_place(w, address_of(w, o, __builtin_ctz(rest)), 8, 8,
                                                   OWN_BLOCK)));
}

/* "mbarrier.arrive", .expect_tx: first expect-tx, then arrive-on. */
void arrive_and_expect(Warp &w, const Ins &, const int *o, u32 mask) {
    w.need(o[2], mask, "mbarrier.arrive.expect_tx");
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        Mbarrier &b = mbarrier_at(w, shared_place(w, address_of(w, o, lane), 8, 8, true));
        b.bytes += w.at<u32>(o[2])[lane];
        if (b.bytes >= 1 << 20)
            trap("mbarrier.arrive.expect_tx: a tx-count of %lld", (long long)b.bytes);
        arrive_once(w, b);
    }
}

/* "mbarrier.try_wait": true if the phase of that parity has completed, the one before the current
 * one. May suspend: this machine then runs others first. */
void try_wait(Warp &w, const Ins &, const int *o, u32 mask) {
    w.need(o[3], mask, "mbarrier.try_wait");
    u32 &d = w.r[o[0]].x[0];
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        Mbarrier &b = mbarrier_at(w, shared_place(w, address_of(w, o + 1, lane), 8, 8, true));
        u32 parity = w.at<u32>(o[3])[lane];
        if (parity > 1)
            trap("mbarrier.try_wait.parity: a parity of %u", parity);
        bool is_over = (b.phase & 1) != parity;
        d = is_over ? d | 1u << lane : d & ~(1u << lane);
        if (!is_over) {
            w.wait = Wait::MBARRIER;
            continue;
        }
        acquire(w, b.done);
        Clock &seen = w.clocks.at[WARPS + b.number];
        seen = std::max(seen, b.phase);
    }
    w.define(o[0], mask, ALL);
}

/* "membar / fence", .mbarrier_init: others see this thread's mbarriers initialised after it. */
void fence_mbarrier_init(Warp &w, const Ins &, const int *, u32) {
    for (auto &[offset, b] : w.block->mbarriers)
        if (b.maker == w.id)
            b.fenced = true;
}

void fence_proxy_async(Warp &w, const Ins &, const int *, u32 mask) {
    fence_async(w, mask);
    for (auto &[offset, b] : w.block->mbarriers)
        if (b.maker == w.id)
            b.fenced = true;
}

/* Fences that make nothing of ours visible to the async proxy. */
void other_fence(Warp &, const Ins &, const int *, u32) {}

} // namespace

/* The mbarrier there, for whoever may know that it is one. */
Mbarrier &mbarrier_at(Warp &w, Place at) {
    auto found = at.block->mbarriers.find(at.offset);
    if (found == at.block->mbarriers.end())
        trap("no mbarrier was initialised at shared offset 0x%x", at.offset);
    Mbarrier &b = found->second;
    bool is_maker = b.maker == w.id;
    if (!is_maker && !b.fenced)
        trap("mbarrier 0x%x: no fence has made its initialisation visible", at.offset);
    if (!is_maker && std::max(w.clocks.at[b.maker], w.inits.at[b.maker]) < b.made)
        trap("mbarrier 0x%x: no barrier lies between its initialisation and this", at.offset);
    if (at.block->has_left())
        trap("mbarrier 0x%x: its block has left", at.offset);
    return b;
}

/* "Complete-tx Operation": complete-tx, on behalf of a bulk copy. */
void complete_bytes(Machine &m, Block &block, u32 offset, i64 bytes) {
    auto found = block.mbarriers.find(offset);
    if (found == block.mbarriers.end())
        trap("a bulk copy counts its bytes at shared offset 0x%x, which is no mbarrier", offset);
    Mbarrier &b = found->second;
    if (!b.fenced)
        trap("mbarrier 0x%x: its initialisation is not visible to the async proxy", offset);
    b.bytes -= bytes;
    if (b.bytes <= -(1 << 20))
        trap("mbarrier 0x%x: a tx-count of %lld", offset, (long long)b.bytes);
    end_phase_if_over(m, b);
    m.events++;
}

#define BARRIERS_OF(name)                                                                          \
    {name ".sync.aligned", "r", sync_all}, {name ".sync.aligned", "r r", sync_some}, {             \
        name ".arrive.aligned", "r r", arrive_some                                                 \
    }

const std::vector<Op> SYNC_OPS = {
    BARRIERS_OF("barrier"),
    {"bar.sync", "r", sync_all},
    {"bar.sync", "r r", sync_some},
    {"bar.arrive", "r r", arrive_some},
    {"barrier.cluster.arrive.aligned", "", cluster_arrive<true>},
    {"barrier.cluster.arrive.release.aligned", "", cluster_arrive<true>},
    {"barrier.cluster.arrive.relaxed.aligned", "", cluster_arrive<false>},
    {"barrier.cluster.wait.aligned", "", cluster_wait},
    {"barrier.cluster.wait.acquire.aligned", "", cluster_wait},
    {"mbarrier.init.shared::cta.b64", "s r", mbarrier_init},
    {"mbarrier.arrive.shared::cta.b64", "_ s", mbarrier_arrive<true>},
    {"mbarrier.arrive.shared::cluster.b64", "_ s", mbarrier_arrive<false>},
    {"mbarrier.arrive.expect_tx.shared::cta.b64", "_ s r", arrive_and_expect},
    {"mbarrier.try_wait.parity.shared::cta.b64", "=p s r", try_wait},
    {"fence.mbarrier_init.release.cluster", "", fence_mbarrier_init},
    {"fence.proxy.async", "", fence_proxy_async},
    {"fence.proxy.async.shared::cta", "", fence_proxy_async},
    {"fence.proxy.async.shared::cluster", "", fence_proxy_async},
    {"fence.proxy.async.global", "", other_fence},
    {"fence.proxy.alias", "", other_fence},
    {"fence.acq_rel.cta", "", other_fence},
    {"fence.acq_rel.cluster", "", other_fence},
    {"fence.acq_rel.gpu", "", other_fence},
    {"fence.sc.cta", "", other_fence},
    {"fence.sc.cluster", "", other_fence},
};
