// SPDX-License-Identifier: Apache-2.0
// instructions.cpp - the instructions of ptx_host.h. Fragment layouts: csrc/cuda/ptx/mma.cuh; the
// rules of asynchronous copies: PTX manual, cp.async and its memory consistency.
#include <algorithm>
#include <deque>

#include "cuda/ptx/ptx.cuh"

namespace emu {

namespace {

void demand(const std::string &problem, site at) {
    if (!problem.empty())
        the_machine().fail("line " + std::to_string(at.line) + ": " + problem);
}

template <typename Pack> Pack &pack_of(const std::array<void *, WARP> &lanes, int lane) {
    return *static_cast<Pack *>(lanes[static_cast<std::size_t>(lane)]);
}

constexpr u32 NOWHERE = 0xffffffff; // a lane that takes no part

// Shared memory serves 8 lanes' 16 bytes at a time, if they are on different banks: addresses that
// differ, but not modulo 128, take turns.
void count_conflicts(const std::array<u32, WARP> &address) {
    for (int phase = 0; phase < WARP; phase += 8)
        for (int i = phase; i < phase + 8; i++)
            for (int j = phase; j < i; j++)
                if (address[i] != address[j] && address[i] != NOWHERE && address[j] != NOWHERE &&
                    address[i] % 128 == address[j] % 128) {
                    the_machine().bank_conflicts++;
                    break;
                }
}

} // namespace

// The largest error that ex2.approx and rcp.approx are allowed, 2 ulp, in a direction that depends
// on the value alone. Powers of two come out exactly on the hardware, too.
float rough(float x) {
    u32 bits = bits_of_float(x);
    if ((bits & 0x7fffff) < 2 || x != x || std::isinf(x))
        return x;
    return float_of_bits(bits * 2654435761u >> 31 ? bits + 2 : bits - 2);
}

u32 shuffle(u32 x, int lane_mask, site at) {
    struct pack {
        u32 x, result;
        int lane_mask;
    } mine = {x, 0, lane_mask};
    the_machine().together("shfl", at, &mine, [](int, const std::array<void *, WARP> &lanes) {
        for (int l = 0; l < WARP; l++) {
            pack &self = pack_of<pack>(lanes, l);
            self.result = pack_of<pack>(lanes, l ^ self.lane_mask).x;
        }
    });
    return mine.result;
}

int reduce_or(int x, site at) {
    int mine = x;
    the_machine().together("redux", at, &mine, [](int, const std::array<void *, WARP> &lanes) {
        int all = 0;
        for (int l = 0; l < WARP; l++)
            all |= pack_of<int>(lanes, l);
        for (int l = 0; l < WARP; l++) {
            if (pack_of<int>(lanes, l) != all)
                the_machine().fail("a number that should be uniform differs between lanes");
            pack_of<int>(lanes, l) = all;
        }
    });
    return mine;
}

int reduce_max(int x, site at) {
    int mine = x;
    the_machine().together("redux.max", at, &mine, [](int, const std::array<void *, WARP> &lanes) {
        int most = pack_of<int>(lanes, 0);
        for (int l = 1; l < WARP; l++)
            most = std::max(most, pack_of<int>(lanes, l));
        for (int l = 0; l < WARP; l++)
            pack_of<int>(lanes, l) = most;
    });
    return mine;
}

bool vote_any(bool condition, site at) {
    bool mine = condition;
    the_machine().together("vote", at, &mine, [](int, const std::array<void *, WARP> &lanes) {
        bool any = false;
        for (int l = 0; l < WARP; l++)
            any = any || pack_of<bool>(lanes, l);
        for (int l = 0; l < WARP; l++)
            pack_of<bool>(lanes, l) = any;
    });
    return mine;
}

void load_global(void *to, const void *from, int bytes) {
    demand(the_machine().global.check(from, bytes, false), {});
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

void store_global(void *to, const void *from, int bytes) {
    demand(the_machine().global.check(to, bytes, true), {});
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

// On the hardware each lane loads for itself; here they meet, so that bank conflicts can be seen.
void load_shared(u32 x[4], u32 at, bool is_zero, site where) {
    machine &gpu = the_machine();
    u32 mine = is_zero ? NOWHERE : at;
    gpu.together("ld.shared", where, &mine, [](int, const std::array<void *, WARP> &lanes) {
        std::array<u32, WARP> address{};
        for (int l = 0; l < WARP; l++)
            address[l] = pack_of<u32>(lanes, l);
        count_conflicts(address);
    });
    if (is_zero) {
        std::memset(x, 0, 16);
        return;
    }
    demand(gpu.shared().check_address(at), where);
    demand(gpu.shared().read(at, gpu.now(), false), where);
    std::memcpy(x, gpu.shared().piece(at), 16);
}

void store_shared(u32 at, const u32 x[4], site where) {
    machine &gpu = the_machine();
    demand(gpu.shared().check_address(at), where);
    demand(gpu.shared().write(at, gpu.now()), where);
    std::memcpy(gpu.shared().piece(at), x, 16);
}

namespace {

struct copy {
    u32 to;
    const void *from;
    bool is_zero, has_landed;
};

void land(copy &c) {
    if (c.is_zero)
        std::memset(the_machine().shared().piece(c.to), 0, 16);
    else
        std::memcpy(the_machine().shared().piece(c.to), c.from, 16);
    c.has_landed = true;
}

// One thread's copies: the group being filled is the last one.
using copy_groups = std::deque<std::vector<copy>>;

copy_groups &groups_of_this_thread() {
    static std::vector<copy_groups> groups;
    static int block = -1;
    machine &gpu = the_machine();
    if (block != gpu.block_serial()) {
        groups.assign(2048, copy_groups(1));
        block = gpu.block_serial();
    }
    return groups[static_cast<std::size_t>(gpu.lane_number())];
}

} // namespace

void start_copy(u32 to, const void *from, bool is_zero, site at) {
    machine &gpu = the_machine();
    u32 mine = to;
    gpu.together("cp.async", at, &mine, [](int, const std::array<void *, WARP> &lanes) {
        std::array<u32, WARP> address{};
        for (int l = 0; l < WARP; l++)
            address[l] = pack_of<u32>(lanes, l);
        count_conflicts(address);
    });
    demand(gpu.shared().check_address(to), at);
    if (!is_zero)
        demand(gpu.global.check(from, 16, false), at);
    demand(gpu.shared().begin_copy(to, gpu.now()), at);
    std::memset(gpu.shared().piece(to), 0xff, 16); // whoever reads too early gets NaN
    copy c = {to, from, is_zero, false};
    landing when = gpu.settings().copies;
    if (when == landing::early || (when == landing::random && gpu.coin()))
        land(c);
    groups_of_this_thread().back().push_back(c);
}

void end_group() { groups_of_this_thread().emplace_back(); }

void wait_for_copies(int pending) {
    machine &gpu = the_machine();
    copy_groups &groups = groups_of_this_thread();
    while (static_cast<int>(groups.size()) - 1 > pending) {
        for (copy &c : groups.front()) {
            if (!c.has_landed)
                land(c);
            gpu.shared().end_copy(c.to, gpu.now());
        }
        groups.pop_front();
    }
}

void load_matrices(u32 x[4], u32 row_address, bool is_transposed, site at) {
    struct pack {
        u32 *x, row_address;
        bool is_transposed;
        site at;
    } mine = {x, row_address, is_transposed, at};
    the_machine().together("ldmatrix", at, &mine, [](int, const std::array<void *, WARP> &lanes) {
        machine &gpu = the_machine();
        std::array<u32, WARP> address{};
        std::uint16_t element[WARP][8];
        for (int l = 0; l < WARP; l++) {
            pack &self = pack_of<pack>(lanes, l);
            address[l] = self.row_address;
            demand(gpu.shared().check_address(self.row_address), self.at);
            demand(gpu.shared().read(self.row_address, gpu.now(), true), self.at);
            std::memcpy(element[l], gpu.shared().piece(self.row_address), 16);
        }
        count_conflicts(address);
        for (int l = 0; l < WARP; l++) {
            pack &self = pack_of<pack>(lanes, l);
            for (int i = 0; i < 4; i++) {
                const auto *matrix = &element[8 * i];
                int g = l / 4, t = l % 4;
                u32 low = self.is_transposed ? matrix[2 * t][g] : matrix[g][2 * t];
                u32 high = self.is_transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
                self.x[i] = low | high << 16;
            }
        }
    });
}

namespace {

struct product {
    float *d;
    const u32 *a;
    u32 b[2];
};

// Sums of products are kept exactly (or nearly: 53 bits) and rounded once; a tensor core drops some
// bits earlier, which is what tolerances are for.
template <float (*VALUE)(std::uint16_t)>
void multiply_tiles(int, const std::array<void *, WARP> &lanes) {
    double a[16][16], b[16][8], d[16][8];
    auto value = [](u32 bits) {
        return static_cast<double>(VALUE(static_cast<std::uint16_t>(bits)));
    };
    for (int l = 0; l < WARP; l++) {
        const product &self = pack_of<product>(lanes, l);
        int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++)
            for (int e = 0; e < 2; e++) {
                a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + e] = value(self.a[i] >> 16 * e);
                d[g + 8 * (i / 2)][2 * t + i % 2] = static_cast<double>(self.d[i]);
            }
        for (int i = 0; i < 2; i++)
            for (int e = 0; e < 2; e++)
                b[2 * t + 8 * i + e][g] = value(self.b[i] >> 16 * e);
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++)
                d[row][column] += a[row][k] * b[k][column];
    for (int l = 0; l < WARP; l++)
        for (int i = 0; i < 4; i++)
            pack_of<product>(lanes, l).d[i] =
                static_cast<float>(d[l / 4 + 8 * (i / 2)][l % 4 * 2 + i % 2]);
}

} // namespace

void multiply(float d[4], const u32 a[4], u32 b0, u32 b1, bool is_bf16, site at) {
    product mine = {d, a, {b0, b1}};
    if (is_bf16)
        the_machine().together("mma bf16", at, &mine, multiply_tiles<from_bf16>);
    else
        the_machine().together("mma f16", at, &mine, multiply_tiles<from_f16>);
}

// Sixteen products and the sum so far, rounded to f16 once: as the f32 one, then packed.
void multiply_sum_f16(u32 d[2], const u32 a[4], u32 b0, u32 b1, site at) {
    float sum[4];
    for (int i = 0; i < 4; i++)
        sum[i] = from_f16(static_cast<std::uint16_t>(d[i / 2] >> 16 * (i % 2)));
    multiply(sum, a, b0, b1, false, at);
    for (int i = 0; i < 2; i++)
        d[i] = to_f16(sum[2 * i]) | static_cast<u32>(to_f16(sum[2 * i + 1])) << 16;
}

namespace {

struct product_s8 {
    int *d;
    const u32 *a;
    u32 b[2];
};

int byte_of(u32 x, int i) { return static_cast<std::int8_t>(x >> 8 * i & 0xff); }

} // namespace

void multiply_s8(int d[4], const u32 a[4], u32 b0, u32 b1, site at) {
    product_s8 mine = {d, a, {b0, b1}};
    the_machine().together("mma s8", at, &mine, [](int, const std::array<void *, WARP> &lanes) {
        int left[16][32], right[32][8];
        for (int l = 0; l < WARP; l++) {
            const product_s8 &self = pack_of<product_s8>(lanes, l);
            int g = l / 4, t = l % 4;
            for (int i = 0; i < 4; i++)
                for (int e = 0; e < 4; e++)
                    left[g + 8 * (i % 2)][4 * t + 16 * (i / 2) + e] = byte_of(self.a[i], e);
            for (int i = 0; i < 2; i++)
                for (int e = 0; e < 4; e++)
                    right[4 * t + 16 * i + e][g] = byte_of(self.b[i], e);
        }
        for (int l = 0; l < WARP; l++)
            for (int i = 0; i < 4; i++) {
                int row = l / 4 + 8 * (i / 2), column = l % 4 * 2 + i % 2;
                for (int k = 0; k < 32; k++)
                    pack_of<product_s8>(lanes, l).d[i] += left[row][k] * right[k][column];
            }
    });
}

u32 change_global(void *at, u32 x, bool is_max) {
    machine &gpu = the_machine();
    std::string problem = gpu.global.check_atomic(at);
    if (!problem.empty())
        gpu.fail(problem);
    u32 before;
    std::memcpy(&before, at, 4);
    u32 after = is_max ? std::max(before, x) : before + x;
    std::memcpy(at, &after, 4);
    return before;
}

} // namespace emu
