/* SPDX-License-Identifier: Apache-2.0
 * machine.h - the machine that runs PTX: blocks of a cluster, their warps, and what is under way.
 *
 * A warp is a vector of 32 lanes. Every instruction is executed for all lanes of a mask at once.
 * Where a branch parts the lanes, they go on one group after the other and meet again at the
 * branch's immediate post-dominator. A warp keeps its own place in the program, so that changing
 * from one to another costs nothing. What stands in quotation marks here and in the other files
 * are titles of sections of the PTX ISA manual; their numbers change with its versions.
 */
#ifndef WAN_ATTN_TESTS_PTX_MACHINE_H
#define WAN_ATTN_TESTS_PTX_MACHINE_H

#include <cstdint>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i64 = int64_t;

enum : u32 { ALL = 0xffffffffu };
enum { LANES = 32, WARPS = 32, MBARRIERS = 64, CLOCKS = WARPS + MBARRIERS, CHUNK = 16 };
enum { BARRIERS = 16, RANK_SHIFT = 24 };
enum { TOGETHER = 254 }; /* the lane that wrote or read, where the whole warp did */
enum Landing { EARLY, LATE, RANDOM };
enum Order { LOWEST, HIGHEST, ANY };

/* Thrown by whatever finds a fault; the launch adds where it happened. */
struct Trap : std::runtime_error {
    using std::runtime_error::runtime_error;
};
[[noreturn]] void trap(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* One instruction, as translate.py lays it out. */
struct Ins {
    int op, guard, negated; /* guard: slot of a predicate, or -1 */
    int args;               /* first of its operands in the pool */
    int target, reconverge; /* of branches: where to, and where its lanes meet again */
    int line;
};

/* A register of 32 bits for 32 lanes; one of 64 bits has two of them. A predicate is x[0]. */
struct alignas(64) Slot {
    u32 x[LANES];
};

struct Tensor {
    const char *name;
    u8 *data;
    i64 bytes;
    int output; /* 2: in place, read before it is written */
};

/* How the machine takes the liberties that the manual leaves to it. */
struct Knobs {
    int landing, order, seed;
    int check_order;  /* 0: results alone */
    int rank_bits;    /* 0: every block of a cluster has the same shared addresses */
    int window;       /* where shared memory begins */
    int sum_block;    /* products that a tensor core adds at a time; 0: all, rounded once */
    int sum_bits;     /* fraction bits that it keeps below the largest of them */
    int ex2_error;    /* units in the last place that ex2 and rcp may be wrong by */
    int flush_sums;   /* 1: tensor cores make a sum below 2^-126 a zero */
    int registers;    /* that a thread is launched with; 0: as many as the launch bound allows */
    unsigned garbage; /* what uninitialised registers and memory hold */
};

struct Program {
    const Ins *code; /* and one behind the last, whose `args` is the end of the pool */
    int count;
    const int *pool;
    const u8 *kinds;      /* of the pool's entries: 1 a register that is read, 2 written, 0 none */
    const u64 *constants; /* slots [first_constant, ...), broadcast; pairs for 64 bits */
    const int *constant_slots;
    int num_constants, slots;
    int threads, cluster, shared_bytes, param_bytes;
    const u8 *params;
    u64 *executed; /* per instruction */
};

/* Slots that every warp begins with (translate.py: SPECIAL). */
enum {
    TID_X,
    CTAID_X,
    CLUSTER_RANK,
    SHARED,
    NTID_X,
    LANE_ID,
    SHARED_64,
    FIRST_FREE = SHARED_64 + 2
};

using Clock = u32;
struct Clocks {
    Clock at[CLOCKS] = {};
    void join(const Clocks &other) {
        for (int i = 0; i < CLOCKS; i++)
            at[i] = at[i] > other.at[i] ? at[i] : other.at[i];
    }
};

/* What is known of 16 bytes of shared memory. Writers: warps by their number in the cluster, and
 * mbarriers (WARPS + number), on whose behalf bulk copies write. */
struct Granule {
    u16 defined = 0; /* bit per byte */
    u8 writer_lane = 0;
    u8 holds_mbarrier = 0;
    u8 unfenced = 0; /* written by a thread, and not yet visible to the async proxy */
    int writer = -1;
    Clock written = 0;
    u16 writes_under_way = 0, reads_under_way = 0;
    Clock read[WARPS] = {};
};

struct Mbarrier {
    int number = 0; /* in the cluster */
    u32 count = 0;
    i64 pending = 0, bytes = 0;
    u32 phase = 0; /* completed phases */
    bool fenced = false;
    int maker = 0;
    Clock made = 0;
    Clocks arriving, done;
};

struct NamedBarrier {
    u32 expected = 0, arrived = 0;
    Clocks clocks;
    std::vector<int> waiting; /* warps of the block */
};

struct Warp;

/* 16 bytes that cp.async brings for one lane. */
struct Copy {
    int lane;
    u32 group, to; /* offset in shared memory */
    const u8 *from;
    u32 bytes;
    bool landed;
};

/* A wgmma under way. */
struct Product {
    const Ins *ins;
    int group; /* -1: not committed yet */
    bool done, adds;
    u64 a, b;
    std::vector<u32> chunks; /* of shared memory that it reads */
};

/* A bulk copy under way. */
struct Bulk {
    bool is_store;
    int block, warp, lane; /* that issued it */
    u32 blocks;            /* to whose memory it goes: a bit each */
    u32 shared, mbarrier;  /* offsets */
    const u8 *map;
    int at[4];
    int group; /* stores: -1 while not committed */
    bool done;
};

struct Entry {
    int pc, reconverge;
    u32 mask;
};

struct Block {
    int rank = 0, number = 0;
    std::vector<u8> shared;
    std::vector<Granule> granules;
    std::map<u32, Mbarrier> mbarriers;
    NamedBarrier barriers[BARRIERS];
    std::vector<Warp *> warps;
    int spare_registers = 0;
    std::vector<std::vector<u64>> products; /* per warpgroup: what its first warp issued */
    bool has_left() const;
};

enum class Wait { NOTHING, BARRIER, CLUSTER, MBARRIER, REGISTERS };

struct Machine;

struct Warp {
    Machine *machine = nullptr;
    Block *block = nullptr;
    int id = 0, index = 0; /* in the cluster, in the block */
    std::vector<Slot> r;
    std::vector<u32> defined; /* lanes, per slot */
    std::vector<u8> busy;     /* per slot: products that will write it (16s) or read it (1s) */
    std::vector<Entry> stack;
    u32 left = 0; /* lanes that have returned */
    Wait wait = Wait::NOTHING;
    u64 retry_at = 0, steps = 0;
    int pc = 0;
    bool again = false; /* the instruction has to be tried again later */
    Clocks clocks, inits;
    Clock together = 0; /* what lanes did before it, all lanes of the warp know */
    std::vector<std::pair<Block *, u32>> unfenced;
    std::vector<Copy> copies;
    u32 copy_group[LANES] = {};
    std::vector<Product> products;
    int product_group = 0;
    u64 product_count = 0;
    std::vector<u8> touched; /* slots written since the last wgmma.fence */
    int store_group[LANES] = {};
    bool at_cluster = false; /* has arrived there and not yet waited */
    u32 cluster_phase = 0;
    int registers = 0;

    bool over() const { return stack.empty(); }
    u32 present() const { return ALL & ~left; }
    template <class T> T *at(int slot) { return reinterpret_cast<T *>(r[slot].x); }
    void define(int slot, u32 mask, u32 known) {
        defined[slot] = (defined[slot] & ~mask) | (known & mask);
        touched[slot] = 1;
    }
    void need(int slot, u32 mask, const char *what) {
        if (mask & ~defined[slot])
            trap("%s: uninitialised register (lanes %08x)", what, mask & ~defined[slot]);
    }
};

struct Machine {
    Program program{};
    Knobs knobs{};
    std::vector<Tensor> tensors;
    std::vector<std::vector<u8>> written; /* per tensor, outputs: a byte for each byte */
    std::vector<Block> blocks;
    std::vector<Warp> warps;
    std::vector<Bulk> bulk;
    u32 cluster_arrived = 0, cluster_phase = 0;
    Clocks cluster_clocks, cluster_inits, cluster_done, cluster_inits_done;
    Warp *running = nullptr;
    u64 events = 0; /* that may let a waiting warp go on */
    std::mt19937 dice;

    bool lands_now();
    bool coin() { return (dice() >> 7 & 1) != 0; }
};

typedef void (*Run)(Warp &, const Ins &, const int *, u32);

/* One PTX instruction with all its modifiers. Operands: p, h, r, l: predicate, 16, 32, 64 bits;
 * "=" before a result; m: [register + offset]; i: literal; L: label; {r4}: four of them in braces;
 * t4: [register, {four registers}]; _: the sink. */
struct Op {
    const char *name, *operands;
    Run run;
    int shape = 0; /* of wgmma */
};
const std::vector<Op> &all_ops();
extern const std::vector<Op> ALU_OPS, CONVERT_OPS, MEMORY_OPS, WARP_OPS, SYNC_OPS, TENSOR_OPS,
    WGMMA_OPS, BULK_OPS;

template <class F> inline void lanes(u32 mask, F f) {
    if (mask == ALL) {
#pragma GCC ivdep
        for (int l = 0; l < LANES; l++)
            f(l);
    } else {
        for (u32 m = mask; m; m &= m - 1)
            f(__builtin_ctz(m));
    }
}

/* Lanes that must come together, without those that have returned. */
void need_whole_warp(const Warp &w, u32 mask, const char *what);

/* shadow.cpp: addresses, and the order of accesses. */
struct Place {
    Block *block;
    u32 offset;
};
Place shared_place(Warp &w, u32 address, u32 bytes, u32 alignment, bool own_block);
void note_read(Warp &w, Place at, u32 bytes, int lane);
void note_write(Warp &w, Place at, u32 bytes, int lane);
void begin_copy(Warp &w, Place at, u32 bytes, int lane); /* cp.async */
void end_copy(Warp &w, Place at, u32 bytes, int lane);
void begin_bulk_load(Warp &w, Place chunk);
void end_bulk_load(Place chunk, const Mbarrier &barrier);
void begin_async_read(Warp &w, Place chunk);
void end_async_read(Warp &w, Place chunk);
void fence_async(Warp &w, u32 mask);
void acquire(Warp &w, const Clocks &from);
void release(Warp &w, Clocks &to);
void lanes_meet(Warp &w);
u8 *global_memory(Machine &m, u64 address, u64 bytes, u32 alignment, bool writes);
/* A word of an output that atomic operations may change as often as they like. */
u8 *atomic_memory(Machine &m, u64 address);

/* sync.cpp */
Mbarrier &mbarrier_at(Warp &w, Place at);
void complete_bytes(Machine &m, Block &block, u32 offset, i64 bytes);

/* wgmma.cpp, bulk.cpp: work that other units do. */
void run_product(Warp &w, Product &product);
void run_bulk(Machine &m, Bulk &bulk);

#endif /* WAN_ATTN_TESTS_PTX_MACHINE_H */
