// SPDX-License-Identifier: Apache-2.0
// machine.h - the emulated GPU: blocks (or clusters of them) one after another, their threads as
// fibers, warps that do warp-wide instructions together, barriers. What memory looks like is
// memory.h's business, what units beside the threads do is units.h's.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "memory.h"

namespace emu {

constexpr int WARP = 32;

// Where in the kernel's source an instruction stands: lanes that meet must come from one place.
struct site {
    const char *file = __builtin_FILE();
    int line = __builtin_LINE();
};

// When asynchronous copies arrive. Correct kernels cannot tell the difference.
enum class landing { early, late, random };

struct options {
    landing copies = landing::random;
    std::uint64_t seed = 0;
    bool check_order = true; // off: to see what results alone would find
};

// What a warp-wide instruction does, given what each lane brought.
using warp_action = void (*)(int warp, const std::array<void *, WARP> &lanes);

class machine {
  public:
    static constexpr int MBARRIERS = 32; // of a block

    // Runs all blocks, `cluster` at a time; "" or what went wrong first.
    std::string launch(int grid, int threads, std::uint32_t shared_bytes, const options &how,
                       const std::function<void()> &kernel, int cluster = 1);

    // The running thread's number in its block, and that of its block in cluster and grid.
    int thread() const { return running % block_threads; }
    int rank() const { return running / block_threads; }
    int block() const { return first_block + rank(); }
    // In the cluster.
    int lane_number() const { return running; }
    int threads() const { return block_threads; }
    int cluster_size() const { return cluster; }
    // A number that no other block of this process has.
    int block_serial() const { return serial; }
    const options &settings() const { return how; }

    moment now() const { return {running, thread() / WARP, &lanes[running].knows}; }
    knowledge &knows() { return lanes[running].knows; }
    knowledge &knows(int lane_number) { return lanes[lane_number].knows; }
    // What a thread knows now becomes what others may know of it.
    void release(int lane_number, knowledge &to);
    void release(knowledge &to) { release(running, to); }
    void fence_async_proxy();
    // What this thread has done with mbarriers is known after the cluster's barrier, also a
    // relaxed one.
    void fence_mbarrier_init();
    int entity_of_warp(int warp) const { return static_cast<int>(lanes.size()) + warp; }
    int entity_of_mbarrier(int block_rank, int number) const {
        return entity_of_warp(static_cast<int>(warps.size())) + block_rank * MBARRIERS + number;
    }

    // All 32 lanes of the running thread's warp meet here; then `action` runs once.
    void together(const char *what, site at, void *brought, warp_action action);
    void block_barrier(site at);
    void named_barrier(int id, int count, bool waits, site at);
    // is_relaxed: orders nothing but initialisations of mbarriers that have been fenced.
    void cluster_arrive(bool is_relaxed);
    void cluster_wait(site at);
    // Until somebody wakes those that sleep over `reason`; a thread may be woken without need.
    void sleep(const void *reason, const char *what, site at);
    void wake(const void *reason);
    // Ends the launch with this message. Does not return.
    [[noreturn]] void fail(const std::string &message);
    // The same for units beside the threads: returns, and the scheduler ends the launch.
    void report(const std::string &message);
    bool coin() { return (random() & 1) != 0; }

    // Shared memory as its own block sees it: the block's rank in the cluster stands in bits 24 and
    // up, as on the hardware (%cluster_ctarank is what cvta puts there).
    std::uint32_t shared_base() const {
        return shared_memory::BASE | static_cast<std::uint32_t>(rank()) << 24;
    }
    // Such an address without the rank; an error if it is another block's.
    std::uint32_t own_shared(std::uint32_t address, site at);

    shared_memory &shared() { return memories[static_cast<std::size_t>(rank())]; }
    shared_memory &shared_of(int block_rank) {
        return memories[static_cast<std::size_t>(block_rank)];
    }
    bool has_left(int block_rank) const;

    global_memory global;
    // Extra turns that shared memory took because lanes fell on the same banks.
    std::uint64_t bank_conflicts = 0;

  private:
    enum class state { ready, meeting, at_barrier, asleep, done };
    struct lane {
        context fiber;
        state is = state::ready;
        const char *what = nullptr;
        site at{};
        void *brought = nullptr;
        int barrier = 0;              // at_barrier: which
        const void *reason = nullptr; // asleep
        int cluster_phase = 0;        // meetings of the cluster it has arrived at
        knowledge knows;
        std::shared_ptr<knowledge> fenced; // at its last fence_mbarrier_init
    };
    struct warp {
        int met = 0;      // lanes that wait for the others
        int first = 0;    // the first of them
        int arrived = 0;  // lanes at a barrier
        int finished = 0; // lanes that have left the kernel
    };
    struct barrier {
        int count = 0, arrived = 0; // count: 0 while nobody has arrived
        knowledge knows;
    };

    static void enter();
    std::uint32_t random();
    void run_cluster(std::uint32_t shared_bytes);
    bool pick_next();
    void yield();
    void check_lines();
    void advance_cluster();
    barrier &barrier_of(int block_rank, int id) {
        return barriers[static_cast<std::size_t>(block_rank * 16 + id)];
    }
    std::string who_waits() const;
    std::string name_of(const lane &l) const;

    options how;
    std::uint64_t random_state = 0;
    fiber_stacks stacks;
    context scheduler;
    std::vector<lane> lanes;
    std::vector<warp> warps;
    std::vector<barrier> barriers;
    std::vector<shared_memory> memories;
    const std::function<void()> *body = nullptr;
    int running = 0, first_block = 0, serial = 0;
    int block_threads = 0, cluster = 1;
    int cluster_arrived = 0, cluster_phase = 0;
    knowledge cluster_knows, cluster_known; // gathered now; of the last meeting
    bool failed = false;
    std::string message;
};

machine &the_machine();

} // namespace emu
