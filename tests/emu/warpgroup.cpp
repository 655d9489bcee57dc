// SPDX-License-Identifier: Apache-2.0
// warpgroup.cpp - wgmma, setmaxnreg, stmatrix, bar.warp. Each warp of a warpgroup multiplies its
// own 16 rows, when it likes between issue and wait; accumulators hold a NaN of their own until
// then. Layouts of registers and descriptors: PTX manual, "wgmma".
#include <cstring>
#include <deque>

#include "cuda/ptx/ptx_sm90.cuh"
#include "units.h"

namespace emu {

namespace {

constexpr u32 UNDER_WAY = 0xffc0deadu; // a NaN that no product makes

struct matrix {
    u32 start, leading, stride; // bytes
};

struct product {
    int n;
    bool is_bf16, adds;
    std::array<float (*)[4], WARP> d;
    std::array<const u32 *, WARP> a; // in registers, or nullptr
    std::array<std::array<u32, 4>, WARP> a_before;
    u64 a_matrix, b_matrix;
    bool is_multiplied;
    std::vector<double> sum; // [16][n]
    site at;
};

// The accumulators of one or more products under way.
struct chain {
    float (*d)[4]; // lane 0's
    int under_way;
    std::vector<float> value; // [16][n]
};

struct warp_state {
    std::deque<std::vector<product>> groups; // the last one is open
    std::vector<chain> chains;
    bool needs_fence = true;
    tick issued = 0;
    u64 history = 0; // of what it has issued: the same in all warps of a group
    int registers = 0;
};

std::vector<warp_state> warps;

machine &gpu() { return the_machine(); }

std::string line_of(site at) { return "line " + std::to_string(at.line) + ": "; }

template <typename Pack> Pack &pack_of(const std::array<void *, WARP> &lanes, int lane) {
    return *static_cast<Pack *>(lanes[static_cast<std::size_t>(lane)]);
}

matrix matrix_of(u64 descriptor, site at) {
    matrix m;
    m.start = static_cast<u32>(descriptor & 0x3fff) << 4;
    m.leading = static_cast<u32>(descriptor >> 16 & 0x3fff) << 4;
    m.stride = static_cast<u32>(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
        gpu().fail(line_of(at) + "this descriptor is not one of 128-byte swizzle");
    return m;
}

// Byte address of element (row of M or N, k), before the swizzle.
u32 k_major(const matrix &m, int row, int k) {
    return m.start + static_cast<u32>(row / 8) * m.stride + static_cast<u32>(row % 8 * 128 + k * 2);
}
u32 mn_major(const matrix &m, int column, int k) {
    return m.start + static_cast<u32>(column / 64) * m.leading +
           static_cast<u32>(column % 64 * 2 + k % 8 * 128) + static_cast<u32>(k / 8) * m.stride;
}
u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

// Calls visit(address of 8 elements) for both operands in shared memory; all 64 rows of A, though
// this warp multiplies only 16.
template <typename Visit> void each_piece(const product &p, const Visit &visit) {
    if (!p.a[0]) {
        matrix a = matrix_of(p.a_matrix, p.at);
        for (int row = 0; row < 64; row++)
            for (int k = 0; k < 16; k += 8)
                visit(swizzled(k_major(a, row, k)));
    }
    matrix b = matrix_of(p.b_matrix, p.at);
    for (int i = 0; i < p.n * 2; i++)
        visit(swizzled(p.a[0] ? mn_major(b, i / 16 * 8, i % 16) : k_major(b, i / 2, i % 2 * 8)));
}

template <float (*VALUE)(std::uint16_t)> void multiply(product &p, int warp) {
    static float b[16][256]; // [k][column]
    float a[16][16];
    shared_memory &memory = gpu().shared_of(warp * WARP / gpu().threads());
    std::uint16_t piece[8];
    auto load = [&](u32 address) { std::memcpy(piece, memory.piece(swizzled(address)), 16); };
    matrix mb = matrix_of(p.b_matrix, p.at);
    if (p.a[0]) {
        for (int l = 0; l < WARP; l++)
            for (int i = 0; i < 4; i++)
                for (int e = 0; e < 2; e++)
                    a[l / 4 + 8 * (i % 2)][l % 4 * 2 + 8 * (i / 2) + e] =
                        VALUE(static_cast<std::uint16_t>(p.a_before[l][i] >> 16 * e));
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < p.n; column += 8) {
                load(mn_major(mb, column, k));
                for (int e = 0; e < 8; e++)
                    b[k][column + e] = VALUE(piece[e]);
            }
    } else {
        matrix ma = matrix_of(p.a_matrix, p.at);
        for (int row = 0; row < 16; row++)
            for (int k = 0; k < 16; k += 8) {
                load(k_major(ma, warp % 4 * 16 + row, k));
                for (int e = 0; e < 8; e++)
                    a[row][k + e] = VALUE(piece[e]);
            }
        for (int column = 0; column < p.n; column++)
            for (int k = 0; k < 16; k += 8) {
                load(k_major(mb, column, k));
                for (int e = 0; e < 8; e++)
                    b[k + e][column] = VALUE(piece[e]);
            }
    }
    p.sum.assign(static_cast<std::size_t>(16 * p.n), 0.0);
    for (int row = 0; row < 16; row++) {
        double *sum = &p.sum[static_cast<std::size_t>(row * p.n)];
        for (int k = 0; k < 16; k++) {
            auto x = static_cast<double>(a[row][k]);
            for (int column = 0; column < p.n; column++)
                sum[column] += x * static_cast<double>(b[k][column]);
        }
    }
    p.is_multiplied = true;
}

void multiply(product &p, int warp) {
    if (p.is_bf16)
        multiply<from_bf16>(p, warp);
    else
        multiply<from_f16>(p, warp);
}

// Calls visit(lane, j, e, place in [16][n]) for every accumulator.
template <typename Visit> void each_accumulator(int n, const Visit &visit) {
    for (int l = 0; l < WARP; l++)
        for (int j = 0; j < n / 8; j++)
            for (int e = 0; e < 4; e++)
                visit(l, j, e,
                      static_cast<std::size_t>((l / 4 + 8 * (e / 2)) * n + 8 * j + l % 4 * 2 +
                                               e % 2));
}

chain *chain_of(warp_state &w, float (*d)[4]) {
    for (chain &c : w.chains)
        if (c.d == d)
            return &c;
    return nullptr;
}

void begin(product &p, warp_state &w) {
    chain *c = chain_of(w, p.d[0]);
    if (w.needs_fence && (!c || p.a[0]))
        gpu().fail(line_of(p.at) + "wgmma without wgmma.fence, after registers may have changed");
    if (!c) {
        w.chains.push_back({p.d[0], 0, std::vector<float>(static_cast<std::size_t>(16 * p.n))});
        c = &w.chains.back();
        each_accumulator(p.n, [&](int l, int j, int e, std::size_t place) {
            c->value[place] = p.d[l][j][e];
            p.d[l][j][e] = float_of_bits(UNDER_WAY);
        });
    }
    c->under_way++;
}

// The end of a product: its sum, rounded once, joins the accumulators.
void finish(product &p, warp_state &w, int warp) {
    if (!p.is_multiplied)
        multiply(p, warp);
    for (int l = 0; l < WARP && p.a[0]; l++)
        if (std::memcmp(p.a[l], p.a_before[l].data(), 16) != 0)
            gpu().fail(line_of(p.at) + "registers of A have changed while a wgmma reads them");
    chain &c = *chain_of(w, p.d[0]);
    for (std::size_t i = 0; i < p.sum.size(); i++)
        c.value[i] =
            static_cast<float>(p.adds ? static_cast<double>(c.value[i]) + p.sum[i] : p.sum[i]);
    if (--c.under_way > 0)
        return;
    each_accumulator(p.n, [&](int l, int j, int e, std::size_t place) {
        if (bits_of_float(p.d[l][j][e]) != UNDER_WAY)
            gpu().fail(line_of(p.at) + "an accumulator has changed while its wgmma is under way");
        p.d[l][j][e] = c.value[place];
    });
    w.chains.erase(w.chains.begin() + (&c - w.chains.data()));
}

} // namespace

void begin_warpgroups() {
    int threads = gpu().threads();
    warps.assign(static_cast<std::size_t>(threads * gpu().cluster_size() / WARP), warp_state{});
    for (warp_state &w : warps) {
        w.groups.emplace_back();
        w.registers = std::min(255, 65536 / threads / 8 * 8);
    }
}

std::string warpgroup_leftovers(int block_rank) {
    int count = gpu().threads() / WARP, registers = 0;
    for (int i = 0; i < count; i++) {
        const warp_state &w = warps[static_cast<std::size_t>(block_rank * count + i)];
        const warp_state &first = warps[static_cast<std::size_t>(block_rank * count + i / 4 * 4)];
        if (w.groups.size() > 1 || !w.groups.front().empty())
            return "a block has ended with a wgmma under way";
        if (w.history != first.history)
            return "the warps of a warpgroup have issued different products";
        if (w.registers != first.registers)
            return "the warps of a warpgroup have different numbers of registers";
        registers += w.registers * WARP;
    }
    return registers <= 65536 ? "" : "warps ask for " + std::to_string(registers) + " registers";
}

void warp_barrier(site where) {
    int none = 0;
    gpu().together("bar.warp", where, &none, [](int warp, const std::array<void *, WARP> &) {
        knowledge all = gpu().knows(warp * WARP);
        for (int l = warp * WARP; l < (warp + 1) * WARP; l++)
            gpu().release(l, all);
        for (int l = warp * WARP; l < (warp + 1) * WARP; l++)
            gpu().knows(l).join(all);
    });
}

void store_matrices(u32 row_address, const u32 x[4], site where) {
    struct pack {
        u32 row_address;
        const u32 *x;
        site at;
    } mine = {row_address, x, where};
    gpu().together("stmatrix", where, &mine, [](int warp, const std::array<void *, WARP> &lanes) {
        for (int l = 0; l < WARP; l++) {
            const pack &self = pack_of<pack>(lanes, l);
            shared_memory &memory = gpu().shared();
            std::string problem = memory.check_address(self.row_address);
            // Each row is one lane's, as far as order is concerned.
            moment now = {warp * WARP + l, warp % (gpu().threads() / WARP),
                          &gpu().knows(warp * WARP + l)};
            if (problem.empty())
                problem = memory.write(self.row_address, now);
            if (!problem.empty())
                gpu().fail(line_of(self.at) + problem);
            for (int other = l / 8 * 8; other < l; other++) {
                u32 address = pack_of<pack>(lanes, other).row_address;
                gpu().bank_conflicts += address % 128 == self.row_address % 128;
            }
            u32 row[4];
            for (int t = 0; t < 4; t++)
                row[t] = pack_of<pack>(lanes, l % 8 * 4 + t).x[l / 8];
            std::memcpy(memory.piece(self.row_address), row, 16);
        }
    });
}

void set_registers(int registers, bool takes, site where) {
    struct pack {
        int registers;
        bool takes;
    } mine = {registers, takes};
    gpu().together("setmaxnreg", where, &mine, [](int warp, const std::array<void *, WARP> &lanes) {
        const pack &self = pack_of<pack>(lanes, 0);
        int &now = warps[static_cast<std::size_t>(warp)].registers;
        if (self.registers % 8 != 0 || self.registers < 24 || self.registers > 256 ||
            (self.takes ? self.registers < now : self.registers > now))
            gpu().fail("setmaxnreg from " + std::to_string(now) + " to " +
                       std::to_string(self.registers));
        now = self.registers;
    });
}

void warpgroup_fence(site where) {
    int none = 0;
    gpu().together("wgmma.fence", where, &none, [](int warp, const std::array<void *, WARP> &) {
        warps[static_cast<std::size_t>(warp)].needs_fence = false;
    });
}

void warpgroup_commit(site where) {
    int none = 0;
    gpu().together("wgmma.commit", where, &none, [](int warp, const std::array<void *, WARP> &) {
        warps[static_cast<std::size_t>(warp)].groups.emplace_back();
    });
}

void warpgroup_wait(int pending, site where) {
    gpu().together(
        "wgmma.wait", where, &pending, [](int warp, const std::array<void *, WARP> &all) {
            warp_state &w = warps[static_cast<std::size_t>(warp)];
            w.needs_fence = true;
            while (static_cast<int>(w.groups.size()) - 1 > pack_of<int>(all, 0)) {
                for (product &p : w.groups.front())
                    finish(p, w, warp);
                w.groups.pop_front();
            }
            // Products are numbered as they were issued; those of the groups left still read.
            int left = 0;
            for (const auto &group : w.groups)
                left += static_cast<int>(group.size());
            for (int l = 0; l < WARP; l++)
                gpu()
                    .knows(warp * WARP + l)
                    .generic.set(gpu().entity_of_warp(warp), static_cast<tick>(w.issued - left));
        });
}

void warpgroup_multiply(float (*d)[4], int n, bool is_bf16, const u32 *a, u64 a_matrix,
                        u64 b_matrix, bool adds, site where) {
    struct pack {
        float (*d)[4];
        const u32 *a;
        product p;
    } mine = {d, a, {}};
    product &p = mine.p;
    p.n = n;
    p.is_bf16 = is_bf16;
    p.adds = adds;
    p.a_matrix = a_matrix;
    p.b_matrix = b_matrix;
    p.at = where;
    gpu().together("wgmma", where, &mine, [](int warp, const std::array<void *, WARP> &lanes) {
        warp_state &w = warps[static_cast<std::size_t>(warp)];
        product p = pack_of<pack>(lanes, 0).p;
        for (int l = 0; l < WARP; l++) {
            const pack &self = pack_of<pack>(lanes, l);
            if (self.p.a_matrix != p.a_matrix || self.p.b_matrix != p.b_matrix)
                gpu().fail(line_of(p.at) + "lanes bring different descriptors");
            p.d[l] = self.d;
            p.a[l] = self.a;
            if (self.a)
                std::memcpy(p.a_before[l].data(), self.a, 16);
        }
        begin(p, w);
        w.issued++;
        w.history = (w.history ^ p.a_matrix ^ p.b_matrix << 1 ^ static_cast<u64>(p.at.line)) *
                    1099511628211u;
        each_piece(p, [&](u32 piece) {
            std::string problem = gpu().shared().check_address(piece);
            if (problem.empty())
                problem = gpu().shared().read_product(piece, gpu().now(), w.issued);
            if (!problem.empty())
                gpu().fail(line_of(p.at) + "wgmma: " + problem);
        });
        landing when = gpu().settings().copies;
        if (when == landing::early || (when == landing::random && gpu().coin()))
            multiply(p, warp);
        w.groups.back().push_back(std::move(p));
    });
}

void check_held(float x, site where) {
    if (bits_of_float(x) == UNDER_WAY)
        gpu().fail(line_of(where) + "an accumulator is used while its wgmma is under way");
}

// The store must not happen, but if it did, it should not hit anything beside the block's memory.
void check_computed(float x, float y, u32 at, site where) {
    if (x < 0.0f || y < 0.0f)
        gpu().fail(line_of(where) + "a sum of weights is below 0");
    std::string problem = gpu().shared().check_address(at);
    if (!problem.empty())
        gpu().fail(line_of(where) + problem);
    check_held(x, where);
    check_held(y, where);
}

} // namespace emu
