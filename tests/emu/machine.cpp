// SPDX-License-Identifier: Apache-2.0
// machine.cpp - the scheduler: which thread runs next, who has to wait for whom.
#include "machine.h"

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
        gpu.fail("thread " + std::to_string(gpu.running) +
                 " has left the kernel while its warp waits for it: " + gpu.who_waits());
    gpu.yield();
    __builtin_unreachable();
}

std::string machine::launch(int grid, int threads, std::uint32_t shared_bytes,
                            const options &settings, const std::function<void()> &kernel) {
    how = settings;
    random_state = how.seed * 2 + 1;
    body = &kernel;
    failed = false;
    message.clear();
    bank_conflicts = 0;
    stacks.reserve(threads);
    lanes.assign(threads, lane{});
    for (block_number = 0; block_number < grid && !failed; block_number++) {
        shared.begin_block(shared_bytes, how.check_order);
        run_block();
        if (!failed)
            message = shared.end_block();
        failed = failed || !message.empty();
    }
    if (failed)
        return "block " + std::to_string(block_number - 1) + ": " + message;
    return "";
}

void machine::run_block() {
    auto threads = static_cast<int>(lanes.size());
    warps.assign(threads / WARP, warp{});
    epoch = 0;
    serial++;
    for (int i = 0; i < threads; i++) {
        lanes[i].is = state::ready;
        stacks.prepare(i, lanes[i].fiber, enter);
    }
    running = static_cast<int>(random() % threads);
    while (!failed && pick_next())
        switch_context(scheduler, lanes[running].fiber);
    if (failed)
        return;
    for (const lane &l : lanes)
        if (l.is != state::done) {
            failed = true;
            message = "deadlock: " + who_waits();
            return;
        }
}

// Knuth's linear congruential generator, of which the upper bits are good.
std::uint32_t machine::random() {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(random_state >> 33);
}

// Stays in the warp while one of its lanes can run, which is what a GPU does and what is fast; now
// and then another warp gets ahead, so that no order between warps can be relied on.
bool machine::pick_next() {
    int count = static_cast<int>(warps.size());
    int first = running / WARP;
    if (random() % (16 * WARP) == 0)
        first = static_cast<int>(random() % count);
    for (int i = 0; i < count; i++) {
        int w = (first + i) % count;
        for (int l = 1; l <= WARP; l++) {
            int candidate = w * WARP + (running + l) % WARP;
            if (lanes[candidate].is == state::ready) {
                running = candidate;
                return true;
            }
        }
    }
    return false;
}

void machine::yield() { switch_context(lanes[running].fiber, scheduler); }

void machine::fail(const std::string &text) {
    failed = true;
    message = text;
    yield();
    __builtin_unreachable();
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

void machine::block_barrier(site at) {
    lane &self = lanes[running];
    warp &mine = warps[running / WARP];
    if (mine.met > 0)
        fail("barrier at line " + std::to_string(at.line) +
             " while lanes of the warp wait: " + who_waits());
    self.what = "barrier";
    self.at = at;
    self.is = state::at_barrier;
    mine.arrived++;
    int arrived = 0;
    for (const warp &w : warps)
        arrived += w.arrived;
    if (arrived == static_cast<int>(lanes.size()))
        release_barrier();
    else
        yield();
}

void machine::release_barrier() {
    for (lane &l : lanes) {
        if (l.at.line != lanes[0].at.line)
            fail("threads wait at different barriers: " + name_of(l) + " and " + name_of(lanes[0]));
        l.is = state::ready;
    }
    for (warp &w : warps)
        w.arrived = 0;
    epoch++;
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
        if (l.is != state::meeting && l.is != state::at_barrier)
            continue;
        count++;
        if (l.at.line != last_line)
            text += name_of(l) + " ";
        last_line = l.at.line;
    }
    return std::to_string(count) + " threads wait, among them " + text;
}

} // namespace emu
