/* SPDX-License-Identifier: Apache-2.0
 * swizzle.cuh - how a tile of K or V lies in shared memory, and how it gets there. Includer sets
 * HEAD_DIM, BLOCK_N, NUM_THREADS and LISTED.
 *
 * A row of C = HEAD_DIM / 8 chunks of 16 bytes lies after the row before it, without padding. Where
 * C is even, the rows that one ldmatrix reads together (8 rows, one chunk column) would fall on the
 * same banks. With G = gcd(C, 8), rows repeat their banks every 8 / G rows, and
 *
 *     chunk c of row r lies at place c ^ (r / (8 / G) % G) of its row
 *
 * puts them on eight different ones: for any C, and without leaving the row. (learn-cuda's XOR, for
 * C = 8 and more; the G is ours.) Everything that changes inside a tile then is a constant: rows in
 * steps of 8 keep their pattern, and chunks in steps of G only add.
 */
#ifndef WAN_ATTN_CUDA_TILE_SWIZZLE_H
#define WAN_ATTN_CUDA_TILE_SWIZZLE_H

#include "cuda/ptx/ptx.cuh"

enum {
    CHUNKS = HEAD_DIM / 8,
    GROUP = CHUNKS % 8 == 0 ? 8
    : CHUNKS % 4 == 0       ? 4
                            : 2, /* G: gcd(CHUNKS, 8) */
    ROW_BYTES = HEAD_DIM * 2,
    TILE_BYTES = BLOCK_N * ROW_BYTES,
    GROUP_BYTES = GROUP * 16,
    /* Threads of a pass copy GROUP chunks of a row at a time. */
    ROWS_PER_PASS = NUM_THREADS / GROUP,
    PASSES = BLOCK_N / ROWS_PER_PASS
};
static_assert(HEAD_DIM % 16 == 0, "a tensor core step is 16 elements of head_dim");
static_assert(PASSES * ROWS_PER_PASS == BLOCK_N, "threads must fill the tile in whole passes");
static_assert(ROWS_PER_PASS % 8 == 0, "a thread's rows must share their swizzle pattern");

/* Byte offset of a chunk in its tile. */
DEVICE u32 swizzled(u32 row, u32 chunk) {
    return row * ROW_BYTES + (chunk ^ row / (8 / GROUP) % GROUP) * 16;
}

/* From the offset of chunk 0 or 1 of a row to that of the chunk 2 * step further on: the XOR stays
 * within a group, the rest is added. `step` is a constant wherever this is used. */
DEVICE u32 advanced(u32 address, int step) {
    return (address ^ (u32)(step % (GROUP / 2) * 32)) + (u32)(step / (GROUP / 2) * GROUP_BYTES);
}

/* One thread's share of all copies of K or of V: the same chunks of every ROWS_PER_PASS-th row,
 * from the last row to the first. */
typedef struct tile_source {
    const char *from; /* this thread's last row of the tile to be copied next */
    i64 pass_bytes;   /* ROWS_PER_PASS rows in global memory */
} tile_source;

DEVICE int copied_row() { return thread_index() / GROUP; }
DEVICE u32 copied_to() { return swizzled((u32)copied_row(), (u32)thread_index() % GROUP); }

/* head: key 0 of the head; first_key: of the tile to begin with. */
DEVICE tile_source source_of(const char *head, i64 row_stride, int first_key) {
    tile_source source;
    i64 row = first_key + BLOCK_N - ROWS_PER_PASS + copied_row();
    source.from = head + row * row_stride * 2 + thread_index() % GROUP * 16;
    source.pass_bytes = row_stride * (ROWS_PER_PASS * 2);
    return source;
}

/* Starts the copy of the source's tile to `to` and turns the source to the tile before it, unless a
 * list says which one that is. With a tail, only rows from `begin` to `rows` - 1 are read, the
 * others become zero: 0 * NaN would be NaN. */
DEVICE void copy_tile(u32 to, tile_source &source, bool has_tail, int rows, int begin = 0) {
    const char *row = source.from;
#pragma unroll
    for (int pass = PASSES - 1; pass >= 0; pass--) {
#pragma unroll
        for (int group = 0; group < CHUNKS / GROUP; group++) {
            u32 place = to + (u32)(pass * ROWS_PER_PASS * ROW_BYTES + group * GROUP_BYTES);
            const char *from = row + group * GROUP_BYTES;
            int at = copied_row() + pass * ROWS_PER_PASS;
            if (has_tail)
                cp_async_16_or_zero(place, from, at >= rows || (begin > 0 && at < begin));
            else
                cp_async_16(place, from);
        }
        row = stepped_back(row, source.pass_bytes);
    }
    if (!LISTED)
        source.from = stepped_back(source.from, source.pass_bytes * PASSES);
}

#endif /* WAN_ATTN_CUDA_TILE_SWIZZLE_H */
