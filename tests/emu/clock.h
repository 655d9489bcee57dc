// SPDX-License-Identifier: Apache-2.0
// clock.h - vector clocks: who knows of whose past. Everything that acts has an entity number of
// its own: threads, warps (for what wgmma reads), mbarriers (for the bulk copies that they count).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace emu {

// Of one entity; it moves on whenever others may learn of what came before.
using tick = std::int16_t;

class vector_clock {
  public:
    void reset(int entities) { ticks.assign(static_cast<std::size_t>(entities), -1); }
    tick at(int entity) const { return ticks[static_cast<std::size_t>(entity)]; }
    void set(int entity, tick to) { ticks[static_cast<std::size_t>(entity)] = to; }
    void join(const vector_clock &other) {
        tick *mine = ticks.data();
        const tick *theirs = other.ticks.data();
        for (std::size_t i = 0, n = ticks.size(); i < n; i++)
            mine[i] = std::max(mine[i], theirs[i]);
    }

  private:
    std::vector<tick> ticks;
};

// What a thread has seen, and what of that it has made visible to wgmma and TMA (the asynchronous
// proxy): stores of threads need a fence in between.
struct knowledge {
    vector_clock generic, async;

    void reset(int entities) {
        generic.reset(entities);
        async.reset(entities);
    }
    void join(const knowledge &other) {
        generic.join(other.generic);
        async.join(other.async);
    }
};

// A point in a block's execution: whose, and what that thread knows.
struct moment {
    int entity; // of the thread
    int warp;   // in its block
    const knowledge *knows;
};

} // namespace emu
