/* SPDX-License-Identifier: Apache-2.0
 * run.cpp - runs a program: instruction by instruction for one warp, warps in some order, clusters
 * one after the other. What machine.py calls is at the end.
 */
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace {

/* Of one warp; the calls of the tests take some 100,000. */
const u64 MOST_STEPS = 20000000;

enum Control { BRA, BRA_UNI, RET, CONTROLS };

const Op CONTROL_OPS[CONTROLS] = {
    {"bra", "L", nullptr}, {"bra.uni", "L", nullptr}, {"ret", "", nullptr}};

/* Lanes leave the program: off every group that they are in. */
void leave(Warp &w, u32 mask) {
    w.left |= mask;
    for (Entry &e : w.stack)
        e.mask &= ~mask;
    while (!w.stack.empty() && w.stack.back().mask == 0)
        w.stack.pop_back();
}

/* `taken` of the top's lanes go to `target`, the others on; they meet where the branch says. */
void part(Warp &w, const Ins &ins, u32 taken) {
    Entry top = w.stack.back();
    int next = top.pc + 1;
    if (taken == top.mask || taken == 0) {
        w.stack.back().pc = taken ? ins.target : next;
        return;
    }
    if (top.reconverge == ins.reconverge)
        w.stack.pop_back();
    else
        w.stack.back().pc = ins.reconverge;
    Entry jumps{ins.target, ins.reconverge, taken}, stays{next, ins.reconverge, top.mask & ~taken};
    bool jumps_first =
        w.machine->knobs.order == ANY ? w.machine->coin() : w.machine->knobs.order == HIGHEST;
    w.stack.push_back(jumps_first ? stays : jumps);
    w.stack.push_back(jumps_first ? jumps : stays);
}

/* Groups that have come to where they meet others become one with them. */
bool settle(Warp &w) {
    while (!w.stack.empty() &&
           (w.stack.back().mask == 0 || w.stack.back().pc == w.stack.back().reconverge))
        w.stack.pop_back();
    return !w.stack.empty();
}

/* "wgmma.mma_async": registers of products in flight. A may be read meanwhile, and nothing else. */
void check_busy(Warp &w, const Ins &ins) {
    const Program &p = w.machine->program;
    for (int i = ins.args; i < (&ins)[1].args; i++) {
        u8 busy = p.kinds[i] ? w.busy[(size_t)p.pool[i]] : 0;
        if (busy >= 16)
            trap("%s: an accumulator of a wgmma in flight is touched before wait_group",
                 all_ops()[(size_t)ins.op].name);
        if (busy && p.kinds[i] == 2)
            trap("%s: a register that a wgmma in flight reads as A is overwritten",
                 all_ops()[(size_t)ins.op].name);
    }
}

u32 guarded(Warp &w, const Ins &ins, u32 mask) {
    if (ins.guard < 0)
        return mask;
    w.need(ins.guard, mask, "a guard");
    u32 p = w.r[(size_t)ins.guard].x[0];
    return mask & (ins.negated ? ~p : p);
}

void control(Warp &w, const Ins &ins, u32 mask, u32 taken) {
    if (ins.op == BRA_UNI && taken != 0 && taken != mask)
        trap("bra.uni: lanes %08x of %08x take it", taken, mask);
    if (ins.op != RET) {
        part(w, ins, taken);
        return;
    }
    w.stack.back().pc++;
    if (taken)
        leave(w, taken);
}

/* One instruction. Returns whether the warp can go on at once. */
bool step(Warp &w) {
    static const Op *const ops = all_ops().data();
    Machine &m = *w.machine;
    if (!settle(w))
        return false;
    Entry &top = w.stack.back();
    if (top.pc >= m.program.count)
        trap("the end of the program without ret");
    const Ins &ins = m.program.code[top.pc];
    w.pc = top.pc;
    u32 mask = top.mask, active = guarded(w, ins, mask);
    if (ins.op < CONTROLS) {
        m.program.executed[w.pc] += active != 0;
        control(w, ins, mask, active);
        return !w.stack.empty();
    }
    if (!w.products.empty() && active)
        check_busy(w, ins);
    if (active)
        ops[ins.op].run(w, ins, m.program.pool + ins.args, active);
    if (w.again) {
        w.again = false;
        return false;
    }
    m.program.executed[w.pc] += active != 0;
    w.stack.back().pc++;
    return w.wait == Wait::NOTHING;
}

void check_left(Warp &w) {
    for (const Copy &copy : w.copies)
        trap("a lane has left with a cp.async in flight to 0x%x", copy.to);
    if (!w.products.empty())
        trap("a warp has left with a wgmma in flight");
    if (w.at_cluster)
        trap("a warp has left between arrival and wait at the cluster's barrier");
}

bool can_run(const Warp &w) {
    if (w.over() || w.wait == Wait::BARRIER)
        return false;
    return w.wait == Wait::NOTHING || w.retry_at != w.machine->events;
}

Warp *choose(Machine &m) {
    std::vector<Warp *> ready;
    for (Warp &w : m.warps)
        if (can_run(w))
            ready.push_back(&w);
    if (ready.empty())
        return nullptr;
    if (m.knobs.order == LOWEST)
        return ready.front();
    return m.knobs.order == HIGHEST ? ready.back() : ready[m.dice() % ready.size()];
}

/* "barrier.cluster": over when all that have not left have arrived. */
void end_cluster_phase(Machine &m) {
    if (!m.cluster_arrived)
        return;
    for (const Warp &w : m.warps)
        if (!w.over() && !(w.at_cluster && w.cluster_phase == m.cluster_phase))
            return;
    m.cluster_arrived = 0;
    m.cluster_phase++;
    m.cluster_done = m.cluster_clocks;
    m.cluster_inits_done = m.cluster_inits;
    m.events++;
}

bool land_one(Machine &m) {
    std::vector<size_t> loads;
    for (size_t i = 0; i < m.bulk.size(); i++)
        if (!m.bulk[i].is_store)
            loads.push_back(i);
    if (loads.empty())
        return false;
    size_t which = m.knobs.order == HIGHEST ? loads.back()
                   : m.knobs.order == ANY   ? loads[m.dice() % loads.size()]
                                            : loads.front();
    run_bulk(m, m.bulk[which]);
    m.bulk.erase(m.bulk.begin() + (long)which);
    return true;
}

void deadlock(Machine &m) {
    std::string text;
    const char *names[] = {"running", "a barrier", "the cluster's barrier", "an mbarrier",
                           "registers"};
    for (const Warp &w : m.warps)
        if (!w.over() && text.size() < 400)
            text += " block " + std::to_string(w.block->rank) + " warp " + std::to_string(w.index) +
                    ": " + names[(int)w.wait] + ", line " +
                    std::to_string(m.program.code[w.pc].line) + ";";
    trap("deadlock:%s", text.c_str());
}

void go(Machine &m, Warp &w) {
    w.wait = Wait::NOTHING;
    m.running = &w;
    u64 steps = m.knobs.order == ANY ? 1 + m.dice() % 400 : ~0ull;
    while (steps-- && step(w))
        if (++w.steps > MOST_STEPS)
            trap("a warp goes on for ever");
    w.retry_at = m.events;
    if (w.over())
        check_left(w);
    m.running = nullptr;
}

void run_cluster(Machine &m) {
    for (;;) {
        m.bulk.erase(std::remove_if(m.bulk.begin(), m.bulk.end(),
                                    [](const Bulk &b) { return b.done && !b.is_store; }),
                     m.bulk.end());
        end_cluster_phase(m);
        Warp *w = choose(m);
        if (w && m.knobs.landing == RANDOM && m.dice() % 8 == 0)
            land_one(m);
        if (w)
            go(m, *w);
        else if (std::all_of(m.warps.begin(), m.warps.end(), [](Warp &x) { return x.over(); }))
            break;
        else if (!land_one(m))
            deadlock(m);
    }
    for (const Bulk &bulk : m.bulk)
        trap(bulk.is_store ? "a block has left while a bulk store reads its memory"
                           : "a block has left before a bulk copy to it has landed");
}

void start_warp(Machine &m, Block &block, Warp &w, int index) {
    const Program &p = m.program;
    w = Warp();
    w.machine = &m;
    w.block = &block;
    w.index = index;
    w.id = block.rank * (p.threads / LANES) + index;
    Slot garbage;
    std::fill(garbage.x, garbage.x + LANES, m.knobs.garbage);
    w.r.assign((size_t)p.slots, garbage);
    w.defined.assign((size_t)p.slots, 0);
    w.busy.assign((size_t)p.slots, 0);
    w.touched.assign((size_t)p.slots, 0);
    w.clocks.at[w.id] = 1;
    w.registers = m.knobs.registers ? m.knobs.registers : std::min(65536 / p.threads / 8 * 8, 255);
    w.stack.push_back({0, -1, ALL});
    for (int l = 0; l < LANES; l++) {
        u32 base = (u32)m.knobs.window + (m.knobs.rank_bits ? (u32)block.rank << RANK_SHIFT : 0u);
        const u32 special[] = {(u32)(index * LANES + l), (u32)block.number,
                               (u32)block.rank,          base,
                               (u32)p.threads,           (u32)l};
        for (int i = 0; i < SHARED_64; i++)
            w.r[(size_t)i].x[l] = special[i];
        w.at<u64>(SHARED_64)[l] = base;
    }
    for (int i = 0; i < FIRST_FREE; i++)
        w.defined[(size_t)i] = ALL;
    for (int i = 0; i < p.num_constants; i++) {
        int slot = p.constant_slots[i] >> 1, is_64 = p.constant_slots[i] & 1;
        for (int l = 0; l < LANES; l++)
            if (is_64)
                w.at<u64>(slot)[l] = p.constants[i];
            else
                w.at<u32>(slot)[l] = (u32)p.constants[i];
        w.defined[(size_t)slot] = ALL;
    }
}

void start_cluster(Machine &m, int first_block) {
    const Program &p = m.program;
    int warps = p.threads / LANES;
    m.bulk.clear();
    m.running = nullptr;
    m.cluster_arrived = m.cluster_phase = 0;
    m.cluster_clocks = m.cluster_inits = m.cluster_done = m.cluster_inits_done = Clocks();
    m.blocks.assign((size_t)p.cluster, Block());
    m.warps.resize((size_t)(p.cluster * warps));
    for (int rank = 0; rank < p.cluster; rank++) {
        Block &block = m.blocks[(size_t)rank];
        block.rank = rank;
        block.number = first_block + rank;
        block.shared.assign((size_t)p.shared_bytes, (u8)m.knobs.garbage);
        block.granules.assign((size_t)(p.shared_bytes + CHUNK - 1) / CHUNK, Granule());
        for (int index = 0; index < warps; index++) {
            Warp &w = m.warps[(size_t)(rank * warps + index)];
            start_warp(m, block, w, index);
            block.warps.push_back(&w);
        }
    }
}

std::string where(Machine &m, const Trap &trap, int first_block) {
    static thread_local char text[900];
    const Warp *at = m.running;
    if (at)
        snprintf(text, sizeof text, "block %d, warp %d, line %d: %s", at->block->number, at->index,
                 m.program.code[at->pc].line, trap.what());
    else
        snprintf(text, sizeof text, "cluster of block %d: %s", first_block, trap.what());
    return text;
}

} // namespace

bool Machine::lands_now() { return knobs.landing == EARLY || (knobs.landing == RANDOM && coin()); }

const std::vector<Op> &all_ops() {
    static const std::vector<Op> all = [] {
        std::vector<Op> ops(CONTROL_OPS, CONTROL_OPS + CONTROLS);
        for (const auto *part : {&ALU_OPS, &CONVERT_OPS, &MEMORY_OPS, &WARP_OPS, &SYNC_OPS,
                                 &TENSOR_OPS, &WGMMA_OPS, &BULK_OPS})
            ops.insert(ops.end(), part->begin(), part->end());
        return ops;
    }();
    return all;
}

extern "C" {

int ptx_op(int number, const char **name, const char **operands) {
    if ((size_t)number >= all_ops().size())
        return 0;
    *name = all_ops()[(size_t)number].name;
    *operands = all_ops()[(size_t)number].operands;
    return 1;
}

/* Runs a grid. Returns 0, or 1 with what was wrong in `message`. */
int ptx_launch(const Program *program, const Knobs *knobs, const Tensor *tensors, int num_tensors,
               int grid, char *message, int message_bytes) {
    static thread_local Machine m;
    m.program = *program;
    m.knobs = *knobs;
    m.dice.seed((u32)knobs->seed);
    m.tensors.assign(tensors, tensors + num_tensors);
    m.written.assign((size_t)num_tensors, {});
    for (int i = 0; i < num_tensors; i++)
        if (tensors[i].output)
            m.written[(size_t)i].assign((size_t)tensors[i].bytes, 0);
    int block = 0;
    try {
        if (grid % program->cluster != 0 || program->threads % LANES != 0)
            trap("a grid of %d blocks of %d threads, clusters of %d", grid, program->threads,
                 program->cluster);
        if (program->threads / LANES * program->cluster > WARPS)
            trap("more warps in a cluster than this machine counts");
        for (; block < grid; block += program->cluster) {
            start_cluster(m, block);
            run_cluster(m);
        }
    } catch (const Trap &trap) {
        snprintf(message, (size_t)message_bytes, "%s", where(m, trap, block).c_str());
        return 1;
    }
    return 0;
}
}
