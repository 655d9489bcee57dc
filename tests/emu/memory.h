// SPDX-License-Identifier: Apache-2.0
// memory.h - global and shared memory of the emulated GPU, and who may touch what when.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace emu {

// A point in a block's execution: whose, and after how many barriers.
struct moment {
    int thread;
    int epoch;
};

// Tensors of the launch. Every access must lie in one of them; outputs are written once.
class global_memory {
  public:
    void clear() { tensors.clear(); }
    void add(const char *name, void *data, std::int64_t bytes, bool is_output);
    // "" or what is wrong with touching these bytes.
    std::string check(const void *at, int bytes, bool is_write);

  private:
    struct tensor {
        std::string name;
        const char *begin;
        const char *end;
        bool is_output;
        std::vector<bool> written; // per 2 bytes
    };
    std::vector<tensor> tensors;
    std::size_t last_hit = 0;
};

// Shared memory with a shadow that knows for every 16 bytes who wrote and who read them last. The
// kernels touch shared memory in 16-byte pieces only, so that this is exact.
//
// Two accesses of which one writes must be ordered: same thread, or a barrier between them. (No
// kernel uses barriers of a warp.) The verdict does not depend on the order in which the emulator
// happened to run the threads.
class shared_memory {
  public:
    static constexpr std::uint32_t PIECE = 16;
    // Addresses begin here, not at 0, so that a forgotten base is an error.
    static constexpr std::uint32_t BASE = 1024;

    void begin_block(std::uint32_t bytes, bool check_order);
    std::string end_block() const;

    char *piece(std::uint32_t address) { return &bytes[address - BASE]; }
    // These return "" or what is wrong. by_warp: all lanes get what is read, whoever reads.
    std::string check_address(std::uint32_t address) const;
    std::string read(std::uint32_t address, const moment &now, bool by_warp);
    std::string write(std::uint32_t address, const moment &now);
    std::string begin_copy(std::uint32_t address, const moment &now);
    void end_copy(std::uint32_t address, const moment &now);

  private:
    enum class state : std::uint8_t { never_written, written, in_flight };
    struct access {
        int thread = 0;
        int epoch = -1;       // -1: none
        bool by_many = false; // lanes of the thread's warp
    };
    struct record {
        state is = state::never_written;
        access last_write;
        std::array<access, 8> last_read; // per warp
    };

    static bool is_ordered(const access &before, const moment &now, bool by_warp);
    std::string check_overwrite(std::uint32_t address, const moment &now) const;
    std::string about(std::uint32_t address, const char *what, const access &other) const;
    record &record_of(std::uint32_t address) { return records[(address - BASE) / PIECE]; }
    const record &record_of(std::uint32_t address) const {
        return records[(address - BASE) / PIECE];
    }

    std::vector<char> bytes;
    std::vector<record> records;
    int in_flight = 0;
    bool check_order = true;
};

} // namespace emu
