/* SPDX-License-Identifier: Apache-2.0
 * tma.cuh - bulk copies of boxes of a tensor, by one thread. The map (made by the host,
 * args_sm90.h) says where the tensor is, how large a box, and how it is swizzled; coordinates count
 * elements and come innermost first: column, row, head, sample.
 *
 * Elements outside of the tensor become 0 when loaded and are not stored, but count as bytes.
 * SWIZZLE_128B: a box row is 128 bytes; of its eight 16-byte chunks, chunk c of row r lies at place
 * c ^ r % 8, if the box begins at a multiple of 1024.
 */
#ifndef WAN_ATTN_CUDA_PTX_TMA_H
#define WAN_ATTN_CUDA_PTX_TMA_H

/* Fetches the map itself ahead of its first use. */
DEVICE void tma_prefetch_map(const void *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* The bytes are counted by the mbarrier. */
DEVICE void tma_load(u32 to, const void *map, u32 barrier, int column, int row, int head,
                     int sample) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(sample)
                 : "memory");
}

/* To the same place in each block whose bit is set, counted by the mbarrier at the same place. */
DEVICE void tma_load_multicast(u32 to, const void *map, u32 barrier, u32 blocks, int column,
                               int row, int head, int sample) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(to),
                 "l"(map), "r"(barrier), "h"((unsigned short)blocks), "r"(column), "r"(row),
                 "r"(head), "r"(sample)
                 : "memory");
}

/* From shared to global memory; part of this thread's current group. */
DEVICE void tma_store(const void *map, u32 from, int column, int row, int head, int sample) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
                 "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(from), "r"(column), "r"(row), "r"(head), "r"(sample)
                 : "memory");
}

DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/* Until all of this thread's stores have read shared memory, which may then be reused or given up.
 */
DEVICE void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

#endif /* WAN_ATTN_CUDA_PTX_TMA_H */
