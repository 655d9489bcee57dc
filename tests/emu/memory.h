// SPDX-License-Identifier: Apache-2.0
// memory.h - global and shared memory of the emulated GPU, and who may touch what when.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "clock.h"

namespace emu {

// Tensors of the launch. Every access must lie in one of them; outputs are written once, and not
// read afterwards.
class global_memory {
  public:
    void clear() { tensors.clear(); }
    // in_place: an output that may be read as well, element by element before it is written.
    void add(const char *name, void *data, std::int64_t bytes, bool is_output, bool in_place);
    // "" or what is wrong with touching these bytes.
    std::string check(const void *at, int bytes, bool is_write);
    // The same for an atomic operation on a word: of outputs, as often as they like.
    std::string check_atomic(const void *at) const;

  private:
    struct tensor {
        std::string name;
        const char *begin;
        const char *end;
        bool is_output, in_place;
        std::vector<bool> written; // per 2 bytes
    };
    std::vector<tensor> tensors;
    std::size_t last_hit = 0;
};

// A block's shared memory with a shadow that knows for every 16 bytes who wrote and who read them
// last. The kernels touch shared memory in 16-byte pieces only, so that this is exact.
//
// Two accesses of which one writes must be ordered: same thread, or one knows of the other by way
// of barriers. The verdict does not depend on the order in which the emulator happened to run the
// threads.
class shared_memory {
  public:
    static constexpr std::uint32_t PIECE = 16;
    // Addresses begin here, not at 0, so that a forgotten base is an error.
    static constexpr std::uint32_t BASE = 1024;
    static constexpr int MAX_WARPS = 16;

    // first_warp: the entity of the block's warp 0.
    void begin_block(std::uint32_t bytes, int first_warp, bool check_order);
    std::string end_block() const;

    char *piece(std::uint32_t address) { return &bytes[address - BASE]; }
    // These return "" or what is wrong. by_warp: all lanes get what is read, whoever reads.
    std::string check_address(std::uint32_t address) const;
    std::string read(std::uint32_t address, const moment &now, bool by_warp);
    std::string write(std::uint32_t address, const moment &now);
    std::string begin_copy(std::uint32_t address, const moment &now);
    void end_copy(std::uint32_t address, const moment &now);
    // Through the asynchronous proxy: reads of a warp's product number `number`; bulk copies, which
    // an mbarrier's phase makes known; bulk stores from here, and their end.
    std::string read_product(std::uint32_t address, const moment &now, tick number);
    std::string begin_bulk(std::uint32_t address, const moment &now);
    void end_bulk(std::uint32_t address, int mbarrier, tick phase);
    std::string begin_store(std::uint32_t address, const moment &now);
    void end_store(std::uint32_t address, const moment &now);

  private:
    enum class state : std::uint8_t { never_written, written, in_flight };
    struct access {
        std::int16_t entity = 0;
        tick at = -1;         // -1: none
        bool by_many = false; // lanes of the thread's warp
        bool is_async = false;
    };
    struct record {
        state is = state::never_written;
        std::int16_t stores = 0; // bulk stores that are still reading
        access last_write;
        std::array<access, MAX_WARPS> last_read;
        std::array<tick, MAX_WARPS> last_product{};
    };

    static bool is_ordered(const access &before, const moment &now, bool by_many, bool is_async);
    static access access_of(const moment &now, bool by_many) {
        return {static_cast<std::int16_t>(now.entity), now.knows->generic.at(now.entity), by_many,
                false};
    }
    std::string check_read(std::uint32_t address, const moment &now, bool by_many, bool is_async);
    std::string check_overwrite(std::uint32_t address, const moment &now, bool is_async) const;
    std::string about(std::uint32_t address, const char *what, const access &other) const;
    record &record_of(std::uint32_t address) { return records[(address - BASE) / PIECE]; }
    const record &record_of(std::uint32_t address) const {
        return records[(address - BASE) / PIECE];
    }

    std::vector<char> bytes;
    std::vector<record> records;
    int in_flight = 0, first_warp = 0;
    bool check_order = true;
};

} // namespace emu
