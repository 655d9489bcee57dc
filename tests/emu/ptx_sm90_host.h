// SPDX-License-Identifier: Apache-2.0
// ptx_sm90_host.h - what lies behind csrc/cuda/ptx/ptx_sm90.cuh on the CPU. The work is done in
// bulk.cpp and warpgroup.cpp.
#pragma once

#include "emu/ptx_host.h"

#define WAN_ATTN_CLUSTER_KERNEL(name, threads, cluster, type, args)                                \
    extern "C" void name(const type &args);                                                        \
    extern "C" void name(const type &args)

namespace emu {
using box_at = std::array<int, 4>; // innermost first

void mbarrier_init(u32 at, int count, site where);
void mbarrier_init_fence();
void mbarrier_arrive(u32 at, int block_rank, u32 bytes, site where);
void mbarrier_wait(u32 at, u32 parity, site where);
void bulk_load(u32 to, const void *map, u32 barrier, u32 blocks, const box_at &at, site where);
void bulk_store(const void *map, u32 from, const box_at &at, site where);
void bulk_store_commit();
void bulk_store_wait_read();

void warp_barrier(site where);
void store_matrices(u32 row_address, const u32 x[4], site where);
void set_registers(int registers, bool takes, site where);
void warpgroup_fence(site where);
void warpgroup_commit(site where);
void warpgroup_wait(int pending, site where);
// d: the 64xn accumulators of this lane. a: registers of A, or nullptr: a_matrix describes it.
void warpgroup_multiply(float (*d)[4], int n, bool is_bf16, const u32 *a, u64 a_matrix,
                        u64 b_matrix, bool adds, site where);
void check_held(float x, site where);
void check_computed(float x, float y, u32 at, site where);
} // namespace emu

DEVICE u32 cluster_rank() { return static_cast<u32>(emu::the_machine().rank()); }
DEVICE void cluster_arrive() { emu::the_machine().cluster_arrive(true); }
DEVICE void cluster_wait(emu::site at = {}) { emu::the_machine().cluster_wait(at); }
DEVICE void warp_barrier(emu::site at = {}) { emu::warp_barrier(at); }
DEVICE void named_barrier_sync(int id, int threads, emu::site at = {}) {
    emu::the_machine().named_barrier(id, threads, true, at);
}
DEVICE void named_barrier_arrive(int id, int threads, emu::site at = {}) {
    emu::the_machine().named_barrier(id, threads, false, at);
}
template <int registers> DEVICE void take_registers(emu::site at = {}) {
    emu::set_registers(registers, true, at);
}
template <int registers> DEVICE void give_registers(emu::site at = {}) {
    emu::set_registers(registers, false, at);
}
DEVICE void fence_async_proxy() { emu::the_machine().fence_async_proxy(); }
DEVICE void stmatrix_x4(u32 row_address, const u32 x[4], emu::site at = {}) {
    emu::store_matrices(own_shared(row_address, at), x, at);
}

DEVICE void mbarrier_init(u32 barrier, int count, emu::site at = {}) {
    emu::mbarrier_init(own_shared(barrier, at), count, at);
}
DEVICE void mbarrier_init_fence() { emu::mbarrier_init_fence(); }
DEVICE void mbarrier_arrive_and_expect(u32 barrier, u32 bytes, emu::site at = {}) {
    emu::mbarrier_arrive(own_shared(barrier, at), emu::the_machine().rank(), bytes, at);
}
DEVICE void mbarrier_arrive(u32 barrier, emu::site at = {}) {
    emu::mbarrier_arrive(own_shared(barrier, at), emu::the_machine().rank(), 0, at);
}
DEVICE void mbarrier_arrive_at(u32 barrier, u32 rank, emu::site at = {}) {
    emu::mbarrier_arrive(own_shared(barrier, at), static_cast<int>(rank), 0, at);
}
DEVICE void mbarrier_wait(u32 barrier, u32 parity, emu::site at = {}) {
    emu::mbarrier_wait(own_shared(barrier, at), parity, at);
}

DEVICE void tma_prefetch_map(const void *) {}
DEVICE void tma_load(u32 to, const void *map, u32 barrier, int column, int row, int head,
                     int sample, emu::site at = {}) {
    emu::bulk_load(own_shared(to, at), map, own_shared(barrier, at), 1u << cluster_rank(),
                   {column, row, head, sample}, at);
}
DEVICE void tma_load_multicast(u32 to, const void *map, u32 barrier, u32 blocks, int column,
                               int row, int head, int sample, emu::site at = {}) {
    emu::bulk_load(own_shared(to, at), map, own_shared(barrier, at), blocks,
                   {column, row, head, sample}, at);
}
DEVICE void tma_store(const void *map, u32 from, int column, int row, int head, int sample,
                      emu::site at = {}) {
    emu::bulk_store(map, own_shared(from, at), {column, row, head, sample}, at);
}
DEVICE void tma_store_commit() { emu::bulk_store_commit(); }
DEVICE void tma_store_wait_read() { emu::bulk_store_wait_read(); }

DEVICE void wgmma_fence(emu::site at = {}) { emu::warpgroup_fence(at); }
DEVICE void wgmma_commit(emu::site at = {}) { emu::warpgroup_commit(at); }
template <int pending> DEVICE void wgmma_wait(emu::site at = {}) {
    emu::warpgroup_wait(pending, at);
}
DEVICE void hold(float &x, emu::site at = {}) { emu::check_held(x, at); }
DEVICE void computed(float x, float y, u32 to, emu::site at = {}) {
    emu::check_computed(x, y, own_shared(to, at), at);
}

#define WGMMA_SS(n, type, is_bf16)                                                                 \
    DEVICE void wgmma_ss_n##n##_##type(float d[][4], u64 a, u64 b, bool adds, emu::site at = {}) { \
        emu::warpgroup_multiply(d, n, is_bf16, nullptr, a, b, adds, at);                           \
    }
#define WGMMA_RS(n, type, is_bf16)                                                                 \
    DEVICE void wgmma_rs_n##n##_##type(float d[][4], const u32 a[4], u64 b, emu::site at = {}) {   \
        emu::warpgroup_multiply(d, n, is_bf16, a, 0, b, true, at);                                 \
    }

WGMMA_SS(80, bf16, true)
WGMMA_SS(80, f16, false)
WGMMA_SS(128, bf16, true)
WGMMA_SS(128, f16, false)
WGMMA_SS(176, bf16, true)
WGMMA_SS(176, f16, false)
WGMMA_RS(64, bf16, true)
WGMMA_RS(64, f16, false)
WGMMA_RS(128, bf16, true)
WGMMA_RS(128, f16, false)
WGMMA_RS(256, bf16, true)
WGMMA_RS(256, f16, false)
