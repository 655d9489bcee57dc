# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (each bug is a line of a table)
"""test_emu_bugs_sm90.py - plants a bug of Hopper's kind and demands that the emulator finds it.

As test_emu_bugs.py: each must be found whatever the schedule, also those that leave every result
right on one (a stage freed too early, a fence that is missing).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from emu import cases_sm90
from emu.build import compiler
from emu.cases import Case
from emu.rows import CSRC
from emu.rows_sm90 import TileSm90, tiles_sm90
from emu.run import Schedule
from nightly import every
from planted import plant

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

KERNEL, PRODUCER, RING, WORK = (
    f"cuda/{name}.cuh" for name in ("sdpa_sm90", "tile/producer", "tile/ring", "tile/cluster_work")
)


@dataclass(frozen=True)
class Bug:
    """Replace `right` by `wrong` in `file`; the first failure must contain `finding`."""

    name: str
    right: str
    wrong: str
    finding: str
    row: str = "sdpa_sm90_bf16_d64"
    file: str = KERNEL
    cluster: int | None = None  # a tile of the row with so many blocks; None: its first tile


BUGS = (
    # mbarriers and rings
    Bug("producer waits for the wrong parity", "EMPTY_K, r.stage), r.parity ^ 1", "EMPTY_K, r.stage), r.parity", "deadlock", file=PRODUCER),
    Bug("producer does not wait for K's place", "mbarrier_wait(barrier_at(EMPTY_K, r.stage), r.parity ^ 1);\n", "\n", "", file=PRODUCER),
    Bug("producer does not wait for V's place", "mbarrier_wait(barrier_at(EMPTY_V, r.stage), r.parity ^ 1);\n", "\n", "", file=PRODUCER),
    Bug("half the bytes are announced", "mbarrier_arrive_and_expect(full, KV_BYTES);", "mbarrier_arrive_and_expect(full, KV_BYTES / 2);", "", file=PRODUCER),
    Bug("too many bytes are announced", "mbarrier_arrive_and_expect(full, Q_BYTES);", "mbarrier_arrive_and_expect(full, Q_BYTES + 16);", "deadlock", file=PRODUCER),
    Bug("Q is not waited for", "mbarrier_wait(barrier_at(FULL_Q, 0), 0);\n", "\n", "line"),
    Bug("K is not waited for", "    mbarrier_wait(barrier_at(FULL_K, c.k.stage), c.k.parity);\n    wait_for_turn(c);", "    wait_for_turn(c);", "line"),
    Bug("V is not waited for", "    mbarrier_wait(barrier_at(FULL_V, c.v.stage), c.v.parity);\n    start_pv(c);\n    if (n > 0", "    start_pv(c);\n    if (n > 0", "line"),
    Bug("parity does not turn", "        r.parity ^= 1;\n", "\n", "", file=RING),
    Bug("V of the same tile, not of the one before", "        if (i > 0)\n            load_v(args, a, v, row + BLOCK_N);", "        if (i > 0)\n            load_v(args, a, v, row);", "is wrong", file=PRODUCER),
    Bug("no fence after the barriers' initialisation", "        mbarrier_init_fence();\n", "\n", "initialisation", file=PRODUCER),
    Bug("no meeting after the barriers' initialisation", "    assignment a = find_assignment(args.call, BLOCK_M, BLOCK_N);\n    meet();", "    assignment a = find_assignment(args.call, BLOCK_M, BLOCK_N);", "line"),
    Bug("one arrival too few expected", "mbarrier_init(barrier_at(EMPTY_V, stage), 4 * CONSUMERS * CLUSTER)", "mbarrier_init(barrier_at(EMPTY_V, stage), 4 * CONSUMERS * CLUSTER - 1)", "", file=PRODUCER),
    # clusters
    Bug("the other block is not told", "        if (lane < CLUSTER)\n            mbarrier_arrive_at(empty, lane);", "        if (lane == 0)\n            mbarrier_arrive(empty);", "deadlock"),
    Bug("a block leaves before the other one has done", "stage < STAGES && CLUSTER > 1; stage++", "stage < 0; stage++", "", file=PRODUCER),
    Bug("a block leaves before the other one has done with V", "        mbarrier_wait(barrier_at(EMPTY_V, v.stage), v.parity ^ 1);\n        advance(k);", "        advance(k);", "", file=PRODUCER),
    Bug("a block waits for one stage only", "stage < STAGES && CLUSTER > 1; stage++", "stage < 1 && CLUSTER > 1; stage++", "", file=PRODUCER),
    Bug("both blocks load the first half", "u32 first = CLUSTER > 1 ? cluster_rank() * LOADED_ROWS : 0;", "u32 first = 0;", "", file=PRODUCER),
    Bug("only to the own block", "(1u << CLUSTER) - 1", "1u << cluster_rank()", "", file=PRODUCER),
    Bug("the surplus block loads nothing", "    a.num_loaded = all.num_tiles;", "    a.num_loaded = a.work.num_tiles;", "", file=WORK),
    Bug("tiles that only the other block sees are not passed on", "    skip_tiles(c, a.skipped_before);\n", "\n", ""),
    Bug("nor those at the other end", "    skip_tiles(c, a.skipped_after);\n", "\n", ""),
    Bug("the tile that comes first is its own last one", "a.first_row = end - block_n;", "a.first_row = a.work.first_key + (a.work.num_tiles - 1) * block_n;", "", file=WORK),
    # wgmma
    Bug("S is used before it is there", "    wgmma_wait<1>();\n", "\n", "under way"),
    Bug("S is not waited for in the first tile", "    start_qk(c, s);\n    wgmma_wait<0>();\n    hold", "    start_qk(c, s);\n    wgmma_wait<1>();\n    hold", "under way"),
    Bug("O is not waited for", "    wgmma_wait<0>();\n    hold_tiles(c.o, O_TILES);\n    hold_tiles(s", "    hold_tiles(s", ""),
    Bug("no fence before Q K^T", "    wgmma_fence();\n    u64 k =", "    u64 k =", "without wgmma.fence"),
    Bug("V is freed before it has been read", "    wgmma_wait<0>();\n    hold_tiles(c.o, O_TILES);\n    hold_tiles(s, S_TILES);\n    release(barrier_at(EMPTY_V, c.v.stage));", "    release(barrier_at(EMPTY_V, c.v.stage));\n    wgmma_wait<0>();\n    hold_tiles(c.o, O_TILES);\n    hold_tiles(s, S_TILES);", "wgmma may still read"),
    Bug("K is freed before it has been read", "    wgmma_wait<1>();\n    hold_tiles(s, S_TILES);\n    release(barrier_at(EMPTY_K, c.k.stage));", "    release(barrier_at(EMPTY_K, c.k.stage));\n    wgmma_wait<1>();\n    hold_tiles(s, S_TILES);", "wgmma may still read"),
    Bug("P is packed while it is read", "    computed(c.row_sum[0], c.row_sum[1], shared_base());\n", "    pack_weights(c, s);\n", "registers of A"),
    Bug("a K step of 64 bytes", "(u64)(step / 4 * KV_PANEL + step % 4 * 32) >> 4", "(u64)(step / 4 * KV_PANEL + step % 4 * 64) >> 4", ""),
    Bug("a V step of 8 rows", "step * 2048 >> 4", "step * 1024 >> 4", ""),
    Bug("offsets of a descriptor exchanged", "matrix_field(1024) << 32 | matrix_field(panel_bytes) << 16", "matrix_field(1024) << 16 | matrix_field(panel_bytes) << 32", "", "sdpa_sm90_bf16_d128", RING),
    Bug("the block's rank stands in V's descriptor", "(u64)((x & 0x3ffff) >> 4)", "(u64)(x >> 4)", "", "sdpa_sm90_bf16_d128", RING, 2),
    Bug("the block's rank stands in V's descriptor (d256)", "(u64)((x & 0x3ffff) >> 4)", "(u64)(x >> 4)", "", "sdpa_sm90_bf16_d256", RING),
    Bug("P V's columns in one panel", "matrix_descriptor(shared_base() + V_SMEM, KV_PANEL)", "matrix_descriptor(shared_base() + V_SMEM, 128)", "", "sdpa_sm90_bf16_d128"),
    Bug("S is added to what was there", "k + k_step, step > 0);", "k + k_step, true);", "out "),
    # fences and named barriers
    Bug("zeros of V without a fence", "store_shared_b32x4(tile + (u32)(panel * KV_PANEL + i * 16), zeros);\n    fence_async_proxy();", "store_shared_b32x4(tile + (u32)(panel * KV_PANEL + i * 16), zeros);", "without fence.proxy.async"),
    Bug("zeros of V not waited for", "    fence_async_proxy();\n    named_barrier_sync(ALL_CONSUMERS, 128 * CONSUMERS);", "    fence_async_proxy();", "without"),
    Bug("V's tail is not zeroed", "    if (tail < BLOCK_N)\n        zero_v_tail(c, tail);\n", "\n", ""),
    Bug("V's tail begins a row late", "i / 8 >= begin", "i / 8 > begin", ""),
    Bug("V's tail begins a row early", "i / 8 >= begin", "i / 8 >= begin - 1", "out "),
    Bug("O without a fence", "    fence_async_proxy();\n    named_barrier_sync(WARPGROUP + c.number, 128);\n    if (thread", "    named_barrier_sync(WARPGROUP + c.number, 128);\n    if (thread", "without fence.proxy.async"),
    Bug("O is fenced only by the thread that stores it", "    fence_async_proxy();\n    named_barrier_sync(WARPGROUP + c.number, 128);\n    if (thread", "    if (thread_index() % 128 == 0)\n        fence_async_proxy();\n    named_barrier_sync(WARPGROUP + c.number, 128);\n    if (thread", "without fence.proxy.async"),
    Bug("O is stored before all have written", "    fence_async_proxy();\n    named_barrier_sync(WARPGROUP + c.number, 128);\n    if (thread", "    fence_async_proxy();\n    if (thread", ""),
    Bug("O overwrites Q that others still read", "    named_barrier_sync(WARPGROUP + c.number, 128);\n    int lane", "    int lane", "line"),
    Bug("the block ends while its stores read", "        tma_store_wait_read();\n", "\n", "may still read"),
    Bug("stores that nobody has committed", "        tma_store_commit();\n", "\n", "may still read"),
    Bug("Q's sign without a fence", "store_shared_b32x4(at, x);\n        }\n    fence_async_proxy();", "store_shared_b32x4(at, x);\n        }", "without fence.proxy.async"),
    Bug("no first turn", "    if (n >= 0 && c.number == CONSUMERS - 1)\n        pass_turn(c); /* the first consumer begins */", "", "deadlock"),
    Bug("the turn is kept", "        pass_turn(c);\n    wgmma_wait<1>();", "        ;\n    wgmma_wait<1>();", "deadlock"),
    Bug("a turn that nobody takes", "    if (n > 0 || c.number < CONSUMERS - 1)", "    if (true)", "arrivals"),
    Bug("turns of another number of threads", "{ named_barrier_sync(TURN + c.number, 256); }", "{ named_barrier_sync(TURN + c.number, 384); }", ""),
    Bug("registers that are not there", "take_registers<REGS_CONSUMER>();", "take_registers<REGS_CONSUMER + 8>();", "registers"),
    Bug("only one warp gives registers back", "        give_registers<REGS_PRODUCER>();\n", "        if (thread_index() < 32)\n            give_registers<REGS_PRODUCER>();\n", "registers"),
    # arithmetic
    Bug("the last key is masked", "n * BLOCK_N + thread_index() % 4 * 2);", "n * BLOCK_N + 1 + thread_index() % 4 * 2);", "out "),
    Bug("row sums are not rescaled", "c.row_sum[r] = fused_multiply_add(c.row_sum[r], factor[r], sum);", "c.row_sum[r] += sum;", "is wrong"),
    Bug("half of O is not rescaled", "*= factor[i % 4 / 2];", "*= factor[0];", "is wrong"),
    Bug("O is never rescaled", "    if (has_grown)\n        rescale(c, factor);\n", "", "is wrong"),
    Bug("only one row's maximum rescales", " || new_max[1] > c.row_max[1]);", ");", ""),
    Bug("P forgets a tile", "&s[2 * (i / 4) + i % 4 / 2]", "&s[2 * (i / 4)]", "is wrong"),
    Bug("no swizzle on the way out", "(chunk ^ line % 8) * 16", "chunk * 16", ""),
    Bug("rows without a key", "c.row_max[r] = lowest();", "c.row_max[r] = minus_infinity();", ""),
    Bug("wrong head of K", "a.place.head / args.call.heads_per_key_head, a.place.sample);\n    advance(r);\n}\n\nDEVICE void load_v", "a.place.head, a.place.sample);\n    advance(r);\n}\n\nDEVICE void load_v", "", file=PRODUCER),
    Bug("both warpgroups have the same rows", "return c.number * 64 + thread_index() % 128 / 32 * 16", "return thread_index() % 128 / 32 * 16", ""),
)  # fmt: skip


def tile_of(bug: Bug) -> TileSm90:
    mine = (tile for tile in tiles_sm90() if tile.symbol == bug.row)
    return next(tile for tile in mine if bug.cluster in (None, tile.cluster))


def suspicious(tile: TileSm90) -> Iterator[Case]:
    """A few cases that between them meet every bug of the list."""
    m, n = tile.block_m, tile.block_n
    yield Case(m + 9, 4 * n + 5, 1, 4, 2)
    yield Case(2 * m, 5 * n, values="rising", window=(n + 20, 40))
    yield Case(2 * m - 7, 3 * n, is_causal=True, scale=-0.2)
    yield Case(m + 5, n - 1, 2, q_lens=(m - 5, 3), k_lens=(n - 9, 0), is_causal=True)
    yield Case(40, 3 * n - 1, values="rising", layout="surrounded", k_lens=(3 * n - 5,))
    yield Case(2 * m, 3 * n, window=(0, 0))
    yield Case(70, n, values="outliers")


@pytest.mark.parametrize("bug", every(3, BUGS), ids=lambda bug: bug.name)
def test_the_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    plant(CSRC, csrc, bug.file, bug.right, bug.wrong)
    tile = tile_of(bug)
    for landing in range(3):
        found = ""
        for case in suspicious(tile):
            try:
                cases_sm90.check(case, tile, Schedule(landing, seed=landing), csrc=csrc)
            except AssertionError as error:
                found = str(error)
                break
        assert found, f"not found with copies landing {landing}"
        assert bug.finding in found
        print(found.partition("): ")[2])
