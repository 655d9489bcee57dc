// SPDX-License-Identifier: Apache-2.0
// machine.cpp - the scheduler: which thread runs next, who has to wait for whom.
#include "machine.h"

#include "units.h"

namespace emu {

machine &the_machine() {
    static machine gpu;
    return gpu;
}

void machine::enter() {
    machine &gpu = the_machine();
    (*gpu.body)();
    lane &self = gpu.lanes[gpu.running];
    self.is = state::done;
    warp &mine = gpu.warps[gpu.running / WARP];
    mine.finished++;
    if (mine.finished < WARP && mine.met + mine.finished == WARP)
        gpu.fail("thread " + std::to_string(gpu.thread()) +
                 " has left the kernel while its warp waits for it: " + gpu.who_waits());
    gpu.advance_cluster();
    if (gpu.has_left(gpu.rank())) {
        std::string left = bulk_leftovers(gpu.rank());
        if (!left.empty())
            gpu.fail(left);
    }
    gpu.yield();
    __builtin_unreachable();
}

std::string machine::launch(int grid, int threads, std::uint32_t shared_bytes,
                            const options &settings, const std::function<void()> &kernel,
                            int blocks_together) {
    how = settings;
    random_state = how.seed * 2 + 1;
    body = &kernel;
    failed = false;
    message.clear();
    bank_conflicts = 0;
    cluster = blocks_together;
    block_threads = threads;
    stacks.reserve(threads * cluster);
    lanes.assign(static_cast<std::size_t>(threads * cluster), lane{});
    memories.resize(static_cast<std::size_t>(cluster));
    for (first_block = 0; first_block < grid && !failed; first_block += cluster) {
        run_cluster(shared_bytes);
        for (int rank = 0; rank < cluster && !failed; rank++) {
            message = memories[static_cast<std::size_t>(rank)].end_block();
            if (message.empty())
                message = warpgroup_leftovers(rank);
            failed = !message.empty();
        }
    }
    if (failed)
        return "block " + std::to_string(first_block - cluster) + ": " + message;
    return "";
}

void machine::run_cluster(std::uint32_t shared_bytes) {
    auto count = static_cast<int>(lanes.size());
    warps.assign(static_cast<std::size_t>(count / WARP), warp{});
    int entities = entity_of_mbarrier(cluster, 0);
    barriers.assign(static_cast<std::size_t>(cluster * 16), barrier{});
    for (barrier &b : barriers)
        b.knows.reset(entities);
    cluster_knows.reset(entities);
    cluster_known.reset(entities);
    cluster_arrived = cluster_phase = 0;
    for (int rank = 0; rank < cluster; rank++)
        shared_of(rank).begin_block(shared_bytes, entity_of_warp(rank * block_threads / WARP),
                                    how.check_order);
    begin_bulk_units();
    begin_warpgroups();
    serial++;
    for (int i = 0; i < count; i++) {
        lanes[i].is = state::ready;
        lanes[i].cluster_phase = 0;
        lanes[i].fenced.reset();
        lanes[i].knows.reset(entities);
        lanes[i].knows.generic.set(i, 0);
        stacks.prepare(i, lanes[i].fiber, enter);
    }
    running = static_cast<int>(random() % static_cast<unsigned>(count));
    while (!failed && pick_next())
        switch_context(scheduler, lanes[running].fiber);
    if (failed)
        return;
    for (const lane &l : lanes)
        if (l.is != state::done)
            return report("deadlock: " + who_waits() + mbarriers_in_words());
    for (const barrier &b : barriers)
        if (b.arrived > 0)
            report("a block has ended with arrivals at a barrier that nobody waits for");
}

bool machine::has_left(int rank) const {
    int left = 0;
    for (int w = 0; w < block_threads / WARP; w++)
        left += warps[static_cast<std::size_t>(rank * block_threads / WARP + w)].finished;
    return left == block_threads;
}

std::uint32_t machine::own_shared(std::uint32_t address, site at) {
    if (address >> 24 != static_cast<std::uint32_t>(rank()))
        fail("line " + std::to_string(at.line) + ": shared address of block " +
             std::to_string(address >> 24) + " of the cluster, in block " + std::to_string(rank()));
    return address & 0xffffffu;
}

// Knuth's linear congruential generator, of which the upper bits are good.
std::uint32_t machine::random() {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(random_state >> 33);
}

// Stays in the warp while one of its lanes can run, which is what a GPU does and what is fast; now
// and then another warp gets ahead, so that no order between warps can be relied on. Bulk copies
// arrive in between, or when nobody can go on without them.
bool machine::pick_next() {
    auto count = static_cast<int>(warps.size());
    do {
        int first = running / WARP;
        if (random() % (16 * WARP) == 0) {
            first = static_cast<int>(random() % static_cast<unsigned>(count));
            if (how.copies == landing::random)
                land_something();
        }
        for (int i = 0; i < count && !failed; i++) {
            int w = (first + i) % count;
            for (int l = 1; l <= WARP; l++) {
                int candidate = w * WARP + (running + l) % WARP;
                if (lanes[candidate].is == state::ready) {
                    running = candidate;
                    return true;
                }
            }
        }
    } while (!failed && land_something());
    return false;
}

void machine::yield() { switch_context(lanes[running].fiber, scheduler); }

void machine::fail(const std::string &text) {
    report(text);
    yield();
    __builtin_unreachable();
}

void machine::report(const std::string &text) {
    if (!failed)
        message = text;
    failed = true;
}

void machine::release(int number, knowledge &to) {
    knowledge &mine = lanes[number].knows;
    to.join(mine);
    mine.generic.set(number, static_cast<tick>(mine.generic.at(number) + 1));
}

void machine::fence_async_proxy() {
    knowledge &mine = lanes[running].knows;
    mine.async.join(mine.generic);
    mine.generic.set(running, static_cast<tick>(mine.generic.at(running) + 1));
}

void machine::together(const char *what, site at, void *brought, warp_action action) {
    lane &self = lanes[running];
    int number = running / WARP;
    warp &mine = warps[number];
    self.what = what;
    self.at = at;
    self.brought = brought;
    if (mine.arrived + mine.finished > 0)
        fail(name_of(self) + " without all lanes of its warp: " + who_waits());
    if (mine.met == 0)
        mine.first = running;
    const lane &first = lanes[mine.first];
    if (first.at.line != at.line || first.what != what)
        fail("lanes of a warp meet at different instructions: " + name_of(self) + " and " +
             name_of(first));
    if (++mine.met < WARP) {
        self.is = state::meeting;
        yield();
        return;
    }
    std::array<void *, WARP> all;
    for (int l = 0; l < WARP; l++) {
        lane &other = lanes[number * WARP + l];
        all[l] = other.brought;
        other.is = state::ready;
    }
    mine.met = 0;
    action(number, all);
}

void machine::block_barrier(site at) { named_barrier(0, block_threads, true, at); }

void machine::named_barrier(int id, int count, bool waits, site at) {
    lane &self = lanes[running];
    warp &mine = warps[running / WARP];
    barrier &b = barrier_of(rank(), id);
    if (waits && mine.met > 0)
        fail("barrier at line " + std::to_string(at.line) +
             " while lanes of the warp wait: " + who_waits());
    self.what = "barrier";
    self.at = at;
    if (b.arrived > 0 && b.count != count)
        fail(name_of(self) + " is for " + std::to_string(count) + " threads, and for " +
             std::to_string(b.count) + " to others");
    b.count = count;
    b.arrived++;
    release(b.knows);
    self.is = waits ? state::at_barrier : state::ready;
    self.barrier = id;
    mine.arrived += waits;
    if (b.arrived < count) {
        if (waits)
            yield();
        return;
    }
    if (count == block_threads)
        check_lines();
    for (int i = rank() * block_threads; i < (rank() + 1) * block_threads; i++) {
        lane &l = lanes[i];
        if (l.is != state::at_barrier || l.barrier != id)
            continue;
        l.is = state::ready;
        l.knows.join(b.knows);
        warps[i / WARP].arrived--;
    }
    b.arrived = 0;
}

// A barrier of the whole block is one place in the source.
void machine::check_lines() {
    const lane &first = lanes[rank() * block_threads];
    for (int i = 0; i < block_threads; i++) {
        const lane &l = lanes[rank() * block_threads + i];
        if (l.at.line != first.at.line)
            fail("threads wait at different barriers: " + name_of(l) + " and " + name_of(first));
    }
}

void machine::fence_mbarrier_init() {
    knowledge &mine = lanes[running].knows;
    mine.async.join(mine.generic);
    lanes[running].fenced = std::make_shared<knowledge>(mine);
    mine.generic.set(running, static_cast<tick>(mine.generic.at(running) + 1));
}

void machine::cluster_arrive(bool is_relaxed) {
    lane &self = lanes[running];
    self.cluster_phase++;
    cluster_arrived++;
    if (!is_relaxed)
        release(cluster_knows);
    else if (self.fenced)
        cluster_knows.join(*self.fenced);
    advance_cluster();
}

void machine::advance_cluster() {
    int present = 0;
    for (const lane &l : lanes)
        present += l.is != state::done;
    if (cluster_arrived == 0 || cluster_arrived < present)
        return;
    cluster_phase++;
    cluster_arrived = 0;
    cluster_known.join(cluster_knows);
    wake(&cluster_phase);
}

void machine::cluster_wait(site at) {
    while (lanes[running].cluster_phase > cluster_phase)
        sleep(&cluster_phase, "barrier of the cluster", at);
    lanes[running].knows.join(cluster_known);
}

void machine::sleep(const void *reason, const char *what, site at) {
    lane &self = lanes[running];
    self.what = what;
    self.at = at;
    self.reason = reason;
    self.is = state::asleep;
    yield();
}

void machine::wake(const void *reason) {
    for (lane &l : lanes)
        if (l.is == state::asleep && l.reason == reason)
            l.is = state::ready;
}

std::string machine::name_of(const lane &l) const {
    auto number = static_cast<int>(&l - lanes.data());
    return std::string(l.what) + " (thread " + std::to_string(number) + ", line " +
           std::to_string(l.at.line) + ")";
}

std::string machine::who_waits() const {
    std::string text;
    int last_line = -1, count = 0;
    for (const lane &l : lanes) {
        if (l.is == state::ready || l.is == state::done)
            continue;
        count++;
        if (l.at.line != last_line)
            text += name_of(l) + " ";
        last_line = l.at.line;
    }
    return std::to_string(count) + " threads wait, among them " + text;
}

} // namespace emu
