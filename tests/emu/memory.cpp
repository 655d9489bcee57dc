// SPDX-License-Identifier: Apache-2.0
// memory.cpp - the books of global and shared memory.
#include "memory.h"

#include <cstdio>

namespace emu {

void global_memory::add(const char *name, void *data, std::int64_t bytes, bool is_output,
                        bool in_place) {
    auto *begin = static_cast<const char *>(data);
    tensors.push_back({name, begin, begin + bytes, is_output, in_place, {}});
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
        if (is_write != t.is_output && !t.in_place)
            return outside + ", in " + t.name;
        for (std::ptrdiff_t n = at - t.begin; t.is_output && n < at - t.begin + bytes; n += 2) {
            if (t.written[static_cast<std::size_t>(n / 2)])
                return t.name + (is_write ? " is written twice" : " is read where it was written") +
                       " at byte " + std::to_string(n);
            t.written[static_cast<std::size_t>(n / 2)] = is_write;
        }
        return "";
    }
    for (const tensor &t : tensors)
        if (at + bytes > t.begin - 4096 && at < t.end + 4096)
            outside += ", near " + t.name + " at byte " + std::to_string(at - t.begin) + " of " +
                       std::to_string(t.end - t.begin);
    return outside;
}

std::string global_memory::check_atomic(const void *address) const {
    auto *at = static_cast<const char *>(address);
    if (reinterpret_cast<std::uintptr_t>(at) % 4 != 0)
        return "misaligned atomic operation";
    for (const tensor &t : tensors)
        if (t.is_output && at >= t.begin && at + 4 <= t.end)
            return "";
    return "atomic operation outside the outputs";
}

void shared_memory::begin_block(std::uint32_t size, int warp_entity, bool check) {
    bytes.assign(size, static_cast<char>(0xff)); // NaN in every float type
    records.assign(size / PIECE, record{});
    in_flight = 0;
    first_warp = warp_entity;
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

bool shared_memory::is_ordered(const access &before, const moment &now, bool by_many,
                               bool is_async) {
    if (before.at < 0)
        return true;
    if (is_async && !before.is_async) // stores of threads need a fence before wgmma or TMA
        return now.knows->async.at(before.entity) >= before.at;
    if (before.entity == now.entity && !before.by_many && !by_many)
        return true;
    return now.knows->generic.at(before.entity) >= before.at &&
           (before.entity != now.entity || now.knows->generic.at(now.entity) > before.at);
}

std::string shared_memory::about(std::uint32_t address, const char *what,
                                 const access &other) const {
    char text[160];
    if (other.is_async)
        std::snprintf(text, sizeof text, "%s shared 0x%x (the other: a bulk copy)", what,
                      address - BASE);
    else
        std::snprintf(text, sizeof text, "%s shared 0x%x (the other: thread %d)", what,
                      address - BASE, other.entity);
    return text;
}

std::string shared_memory::check_read(std::uint32_t address, const moment &now, bool by_many,
                                      bool is_async) {
    const record &r = record_of(address);
    if (r.is == state::never_written)
        return about(address, "read, but nobody has written,", r.last_write);
    if (r.is == state::in_flight)
        return about(address, "read while an asynchronous copy is under way to", r.last_write);
    if (is_ordered(r.last_write, now, by_many, is_async))
        return "";
    if (is_async && is_ordered(r.last_write, now, by_many, false))
        return about(address, "read by wgmma or TMA without fence.proxy.async after a write of",
                     r.last_write);
    return about(address, "read without synchronisation after a write of", r.last_write);
}

std::string shared_memory::read(std::uint32_t address, const moment &now, bool by_warp) {
    std::string problem = check_read(address, now, by_warp, false);
    access &mine = record_of(address).last_read[static_cast<std::size_t>(now.warp)];
    access reading = access_of(now, by_warp);
    if (mine.at == reading.at && mine.entity != reading.entity)
        reading.by_many = true;
    mine = reading;
    return check_order ? problem : "";
}

std::string shared_memory::check_overwrite(std::uint32_t address, const moment &now,
                                           bool is_async) const {
    const record &r = record_of(address);
    if (!check_order)
        return "";
    if (r.is == state::in_flight)
        return about(address, "written while an asynchronous copy is under way to", r.last_write);
    if (r.stores > 0)
        return about(address, "overwritten while a bulk store reads", r.last_write);
    if (r.is == state::written && !is_ordered(r.last_write, now, false, is_async))
        return about(address, "overwritten without synchronisation:", r.last_write);
    for (const access &read : r.last_read)
        if (!is_ordered(read, now, false, false))
            return about(address, "overwritten while it may still be read:", read);
    for (int warp = 0; warp < MAX_WARPS; warp++) {
        tick number = r.last_product[static_cast<std::size_t>(warp)];
        if (number > 0 && now.knows->generic.at(first_warp + warp) < number)
            return about(address, "overwritten while a wgmma may still read", r.last_write) +
                   ", of warp " + std::to_string(warp);
    }
    return "";
}

std::string shared_memory::write(std::uint32_t address, const moment &now) {
    std::string problem = check_overwrite(address, now, false);
    record &r = record_of(address);
    r.is = state::written;
    r.last_write = access_of(now, false);
    return problem;
}

std::string shared_memory::begin_copy(std::uint32_t address, const moment &now) {
    std::string problem = check_overwrite(address, now, false);
    record &r = record_of(address);
    in_flight += r.is != state::in_flight;
    r.is = state::in_flight;
    r.last_write = access_of(now, false);
    return problem;
}

void shared_memory::end_copy(std::uint32_t address, const moment &now) {
    record &r = record_of(address);
    in_flight -= r.is == state::in_flight;
    r.is = state::written;
    r.last_write = access_of(now, false);
}

std::string shared_memory::read_product(std::uint32_t address, const moment &now, tick number) {
    std::string problem = check_read(address, now, false, true);
    record_of(address).last_product[static_cast<std::size_t>(now.warp)] = number;
    return check_order ? problem : "";
}

std::string shared_memory::begin_bulk(std::uint32_t address, const moment &now) {
    std::string problem = check_overwrite(address, now, true);
    record &r = record_of(address);
    in_flight += r.is != state::in_flight;
    r.is = state::in_flight;
    return problem;
}

void shared_memory::end_bulk(std::uint32_t address, int mbarrier, tick phase) {
    record &r = record_of(address);
    in_flight -= r.is == state::in_flight;
    r.is = state::written;
    r.last_write = {static_cast<std::int16_t>(mbarrier), phase, false, true};
}

std::string shared_memory::begin_store(std::uint32_t address, const moment &now) {
    std::string problem = check_read(address, now, false, true);
    record_of(address).stores++;
    return check_order ? problem : "";
}

void shared_memory::end_store(std::uint32_t address, const moment &now) {
    record &r = record_of(address);
    r.stores--;
    r.last_read[static_cast<std::size_t>(now.warp)] = access_of(now, false);
}

} // namespace emu
