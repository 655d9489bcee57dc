// SPDX-License-Identifier: Apache-2.0
// memory.cpp - the books of global and shared memory.
#include "memory.h"

#include <cstdio>

namespace emu {

void global_memory::add(const char *name, void *data, std::int64_t bytes, bool is_output) {
    auto *begin = static_cast<const char *>(data);
    tensors.push_back({name, begin, begin + bytes, is_output, {}});
    if (is_output)
        tensors.back().written.assign(static_cast<std::size_t>(bytes / 2 + 1), false);
}

std::string global_memory::check(const void *address, int bytes, bool is_write) {
    auto *at = static_cast<const char *>(address);
    const char *verb = is_write ? "store" : "load";
    if (reinterpret_cast<std::uintptr_t>(at) % static_cast<std::uintptr_t>(bytes) != 0)
        return std::string("misaligned global ") + verb + " of " + std::to_string(bytes) + " bytes";
    // The same words whatever lies there: that is up to whoever allocated the tensors.
    std::string outside =
        std::string("global ") + verb + " outside the " + (is_write ? "outputs" : "inputs");
    for (std::size_t i = 0; i < tensors.size(); i++) {
        tensor &t = tensors[(last_hit + i) % tensors.size()];
        if (at < t.begin || at + bytes > t.end)
            continue;
        last_hit = (last_hit + i) % tensors.size();
        if (is_write != t.is_output)
            return outside + ", in " + t.name;
        for (std::ptrdiff_t n = at - t.begin; is_write && n < at - t.begin + bytes; n += 2) {
            if (t.written[static_cast<std::size_t>(n / 2)])
                return t.name + " is written twice at byte " + std::to_string(n);
            t.written[static_cast<std::size_t>(n / 2)] = true;
        }
        return "";
    }
    for (const tensor &t : tensors)
        if (at + bytes > t.begin - 4096 && at < t.end + 4096)
            outside += ", near " + t.name + " at byte " + std::to_string(at - t.begin) + " of " +
                       std::to_string(t.end - t.begin);
    return outside;
}

void shared_memory::begin_block(std::uint32_t size, bool check) {
    bytes.assign(size, static_cast<char>(0xff)); // NaN in every float type
    records.assign(size / PIECE, record{});
    in_flight = 0;
    check_order = check;
}

std::string shared_memory::end_block() const {
    if (in_flight > 0)
        return "the block has ended with " + std::to_string(in_flight) +
               " asynchronous copies under way";
    return "";
}

std::string shared_memory::check_address(std::uint32_t address) const {
    char text[96];
    if (address < BASE || address - BASE + PIECE > bytes.size()) {
        std::snprintf(text, sizeof text, "shared address 0x%x is outside the block's %zu bytes",
                      address - BASE, bytes.size());
        return text;
    }
    if (address % PIECE != 0) {
        std::snprintf(text, sizeof text, "shared address 0x%x is misaligned", address - BASE);
        return text;
    }
    return "";
}

bool shared_memory::is_ordered(const access &before, const moment &now, bool by_warp) {
    if (before.epoch < now.epoch)
        return true;
    return before.thread == now.thread && !before.by_many && !by_warp;
}

std::string shared_memory::about(std::uint32_t address, const char *what,
                                 const access &other) const {
    char text[160];
    std::snprintf(text, sizeof text, "%s shared 0x%x (the other: thread %d)", what, address - BASE,
                  other.thread);
    return text;
}

std::string shared_memory::read(std::uint32_t address, const moment &now, bool by_warp) {
    record &r = record_of(address);
    access &mine = r.last_read[static_cast<std::size_t>(now.thread / 32)];
    std::string problem;
    if (r.is == state::never_written)
        problem = about(address, "read, but nobody has written,", r.last_write);
    else if (r.is == state::in_flight)
        problem = about(address, "read while an asynchronous copy is under way to", r.last_write);
    else if (!is_ordered(r.last_write, now, by_warp))
        problem = about(address, "read without synchronisation after a write of", r.last_write);
    bool other_lane = mine.epoch == now.epoch && mine.thread != now.thread;
    mine = {now.thread, now.epoch, by_warp || other_lane};
    return check_order ? problem : "";
}

std::string shared_memory::check_overwrite(std::uint32_t address, const moment &now) const {
    const record &r = record_of(address);
    if (!check_order)
        return "";
    if (r.is == state::in_flight)
        return about(address, "written while an asynchronous copy is under way to", r.last_write);
    if (r.is == state::written && !is_ordered(r.last_write, now, false))
        return about(address, "overwritten without synchronisation:", r.last_write);
    for (const access &read : r.last_read)
        if (!is_ordered(read, now, false))
            return about(address, "overwritten while it may still be read:", read);
    return "";
}

std::string shared_memory::write(std::uint32_t address, const moment &now) {
    std::string problem = check_overwrite(address, now);
    record &r = record_of(address);
    r.is = state::written;
    r.last_write = {now.thread, now.epoch, false};
    return problem;
}

std::string shared_memory::begin_copy(std::uint32_t address, const moment &now) {
    std::string problem = check_overwrite(address, now);
    record &r = record_of(address);
    in_flight += r.is != state::in_flight;
    r.is = state::in_flight;
    r.last_write = {now.thread, now.epoch, false};
    return problem;
}

void shared_memory::end_copy(std::uint32_t address, const moment &now) {
    record &r = record_of(address);
    in_flight -= r.is == state::in_flight;
    r.is = state::written;
    r.last_write = {now.thread, now.epoch, false};
}

} // namespace emu
