/* SPDX-License-Identifier: Apache-2.0
 * warp.cpp - lanes that talk to each other: PTX ISA, "shfl.sync", "vote.sync", "redux.sync",
 * "elect.sync", "bar.warp.sync"; and "setmaxnreg".
 *
 * The manual wants every lane that membermask names at the same instruction. Lanes that are
 * elsewhere would be waited for; in kernels whose branches are what ptxas makes of them that is a
 * fault, so that it is one here at once.
 */
#include "machine.h"

namespace {

void need_members(Warp &w, int slot, u32 mask, const char *what) {
    w.need(slot, mask, what);
    u32 members = w.at<u32>(slot)[__builtin_ctz(mask)];
    for (u32 rest = mask; rest; rest &= rest - 1)
        if (w.at<u32>(slot)[__builtin_ctz(rest)] != members)
            trap("%s: lanes have different membermasks", what);
    if ((members & w.present()) != mask || (members & w.left) != 0)
        trap("%s: diverged warp: lanes %08x are here, membermask is %08x", what, mask, members);
}

/* shfl.sync.bfly d, a, b, c, membermask: lane ^ b, within the segment that c describes. */
void shuffle_xor(Warp &w, const Ins &, const int *o, u32 mask) {
    need_members(w, o[4], mask, "shfl.sync");
    w.need(o[2], mask, "shfl.sync");
    w.need(o[3], mask, "shfl.sync");
    const Slot a = w.r[o[1]], b = w.r[o[2]], c = w.r[o[3]];
    u32 known = w.defined[o[1]], result_known = 0;
    for (u32 rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        int clamp = (int)(c.x[lane] & 31), segment = (int)(c.x[lane] >> 8 & 31);
        int last = (lane & segment) | (clamp & ~segment);
        int from = lane ^ (int)(b.x[lane] & 31);
        from = from <= last ? from : lane;
        if (!(mask >> from & 1))
            trap("shfl.sync: lane %d reads lane %d, which is not here", lane, from);
        w.at<u32>(o[0])[lane] = a.x[from];
        result_known |= (known >> from & 1) << lane;
    }
    w.define(o[0], mask, result_known);
}

template <bool ANY_LANE> void vote(Warp &w, const Ins &, const int *o, u32 mask) {
    need_members(w, o[2], mask, "vote.sync");
    w.need(o[1], mask, "vote.sync");
    u32 p = w.r[o[1]].x[0] & mask;
    bool result = ANY_LANE ? p != 0 : p == mask;
    u32 &d = w.r[o[0]].x[0];
    d = result ? d | mask : d & ~mask;
    w.define(o[0], mask, ALL);
}

/* d, a, membermask: the bitwise or of all lanes' a, to each. */
template <bool IS_OR> void reduce(Warp &w, const Ins &, const int *o, u32 mask) {
    need_members(w, o[2], mask, "redux.sync");
    w.need(o[1], mask, "redux.sync");
    u32 result = IS_OR ? 0u : (u32)ALL;
    const u32 *a = w.at<u32>(o[1]);
    for (u32 rest = mask; rest; rest &= rest - 1)
        result = IS_OR ? result | a[__builtin_ctz(rest)] : result & a[__builtin_ctz(rest)];
    lanes(mask, [&](int lane) { w.at<u32>(o[0])[lane] = result; });
    w.define(o[0], mask, ALL);
}

/* d, a, membermask: the largest of all lanes' a, signed, to each. */
void reduce_max(Warp &w, const Ins &, const int *o, u32 mask) {
    need_members(w, o[2], mask, "redux.sync");
    w.need(o[1], mask, "redux.sync");
    const int *a = w.at<int>(o[1]);
    int result = a[__builtin_ctz(mask)];
    for (u32 rest = mask; rest; rest &= rest - 1)
        result = a[__builtin_ctz(rest)] > result ? a[__builtin_ctz(rest)] : result;
    lanes(mask, [&](int lane) { w.at<int>(o[0])[lane] = result; });
    w.define(o[0], mask, ALL);
}

/* The leader is any lane of membermask; here by the knobs' dice, so that no code relies on one. */
void elect(Warp &w, const Ins &, const int *o, u32 mask) {
    need_members(w, o[1], mask, "elect.sync");
    int skipped = (int)(w.machine->dice() % (u32)__builtin_popcount(mask));
    u32 rest = mask;
    while (skipped-- > 0)
        rest &= rest - 1;
    u32 &d = w.r[o[0]].x[0];
    d = (d & ~mask) | (rest & -rest);
    w.define(o[0], mask, ALL);
}

/* Also orders the lanes' memory accesses. */
void warp_sync(Warp &w, const Ins &, const int *o, u32 mask) {
    need_members(w, o[0], mask, "bar.warp.sync");
    lanes_meet(w);
}

void check_count(const Warp &w, int registers, u32 mask) {
    need_whole_warp(w, mask, "setmaxnreg");
    if (registers < 24 || registers > 256 || registers % 8 != 0)
        trap("setmaxnreg: %d is not a multiple of 8 from 24 to 256", registers);
}

void give_registers(Warp &w, const Ins &, const int *o, u32 mask) {
    check_count(w, o[0], mask);
    if (o[0] > w.registers)
        trap("setmaxnreg.dec: %d are more than the %d that the warp has", o[0], w.registers);
    w.block->spare_registers += LANES * (w.registers - o[0]);
    w.registers = o[0];
    w.machine->events++;
}

void take_registers(Warp &w, const Ins &, const int *o, u32 mask) {
    check_count(w, o[0], mask);
    if (o[0] < w.registers)
        trap("setmaxnreg.inc: %d are fewer than the %d that the warp has", o[0], w.registers);
    int more = LANES * (o[0] - w.registers);
    if (more > w.block->spare_registers) {
        w.wait = Wait::REGISTERS;
        w.again = true;
        return;
    }
    w.block->spare_registers -= more;
    w.registers = o[0];
}

} // namespace

const std::vector<Op> WARP_OPS = {
    {"shfl.sync.bfly.b32", "=r r r r r", shuffle_xor},
    {"vote.sync.any.pred", "=p p r", vote<true>},
    {"vote.sync.all.pred", "=p p r", vote<false>},
    {"redux.sync.or.b32", "=r r r", reduce<true>},
    {"redux.sync.and.b32", "=r r r", reduce<false>},
    {"redux.sync.max.s32", "=r r r", reduce_max},
    {"elect.sync", "_|=p r", elect},
    {"bar.warp.sync", "r", warp_sync},
    {"setmaxnreg.inc.sync.aligned.u32", "i", take_registers},
    {"setmaxnreg.dec.sync.aligned.u32", "i", give_registers},
};
