// SPDX-License-Identifier: Apache-2.0
// machine.h - the emulated GPU: blocks one after another, their threads as fibers, warps that do
// warp-wide instructions together, barriers. What memory looks like is memory.h's business.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
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
    // Runs all blocks; "" or what went wrong first.
    std::string launch(int grid, int threads, std::uint32_t shared_bytes, const options &how,
                       const std::function<void()> &kernel);

    int thread() const { return running; }
    int block() const { return block_number; }
    // A number that no other block of this process has.
    int block_serial() const { return serial; }
    const options &settings() const { return how; }
    moment now() const { return {running, epoch}; }

    // All 32 lanes of the running thread's warp meet here; then `action` runs once.
    void together(const char *what, site at, void *brought, warp_action action);
    void block_barrier(site at);
    // Ends the launch with this message. Does not return.
    [[noreturn]] void fail(const std::string &message);
    bool coin() { return (random() & 1) != 0; }

    global_memory global;
    shared_memory shared;
    // Extra turns that shared memory took because lanes fell on the same banks.
    std::uint64_t bank_conflicts = 0;

  private:
    enum class state { ready, meeting, at_barrier, done };
    struct lane {
        context fiber;
        state is = state::ready;
        const char *what = nullptr;
        site at{};
        void *brought = nullptr;
    };
    struct warp {
        int met = 0;      // lanes that wait for the others
        int first = 0;    // the first of them
        int arrived = 0;  // lanes at the block's barrier
        int finished = 0; // lanes that have left the kernel
    };

    static void enter();
    std::uint32_t random();
    void run_block();
    bool pick_next();
    void yield();
    void release_barrier();
    std::string who_waits() const;
    std::string name_of(const lane &l) const;

    options how;
    std::uint64_t random_state = 0;
    fiber_stacks stacks;
    context scheduler;
    std::vector<lane> lanes;
    std::vector<warp> warps;
    const std::function<void()> *body = nullptr;
    int running = 0, block_number = 0, serial = 0;
    int epoch = 0; // barriers of this block passed
    bool failed = false;
    std::string message;
};

machine &the_machine();

} // namespace emu
