# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (each bug is a line of a table)
"""test_emu_listed_bugs.py - plants a bug in what walks lists of blocks, or counts blocks as their
means, and demands that it is found by calls like those of test_emu_listed.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blocks_oracle import Lists
from emu import cases, cases_listed, run_listed
from emu.build import compiler
from emu.planting import Bug, must_be_found, named
from emu.rows import TileListed, tiles_listed
from nightly import every

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

KERNEL, WALK, MEANS, OUTPUT, POOL = (
    f"cuda/{name}.cuh"
    for name in ("sdpa_sm80", "tile/walk_listed", "tile/means", "tile/output", "pool")
)
SLIM, WIDE = Bug.tile, "sdpa_sm80_listed_bf16_d64_wide"


# fmt: off
BUGS = (
    Bug("a count may be more than there is room for", WALK, "smaller_int(load_global_i32(lists.counts + at), lists.capacity)", "load_global_i32(lists.counts + at)"),
    Bug("indices are neighbours", WALK, "list.at + (first + lane) * lists.index_stride", "list.at + (first + lane)"),
    Bug("one index too many is read", WALK, "if (first + lane < list.count)", "if (first + lane <= list.count)"),
    Bug("the first 32 indices alone", WALK, "first < list.count; first += 32", "first < 1 && first < list.count; first += 32"),
    Bug("the list of another head", WALK, "place.sample * lists.batch_stride + place.head * lists.head_stride", "place.sample * lists.batch_stride"),
    Bug("the counts of another block", WALK, "block * lists.count_block_stride;", "0;"),
    Bug("half of the lanes' indices", WALK, "lane_mask < 32; lane_mask++", "lane_mask < 16; lane_mask++"),
    Bug("a tile is taken twice", WALK, "    if (mine == n)\n        walk.bits &=", "    if (mine == n + 1)\n        walk.bits &="),
    Bug("the copy goes one tile too far", WALK, "(u32)tiles * (source", "(u32)(tiles + 1) * (source"),
    Bug("V does not skip tiles", KERNEL, "    go_back(tiles.v, back);\n", ""),
    Bug("K does not skip tiles", KERNEL, "    go_back(tiles.k, back);\n", ""),
    Bug("both buffers are one", WALK, "DEVICE int turn_of(const tile_walk &walk, int) { return walk.turn; }", "DEVICE int turn_of(const tile_walk &, int n) { return n; }"),
    Bug("a warp takes the other block's tiles", WALK, "return LISTS == 1 ||", "return true ||", WIDE),
    Bug("a warp has the other block's list", WALK, "if (i == thread_index_again() / 32 / (NUM_WARPS / LISTS))", "if (i != thread_index_again() / 32 / (NUM_WARPS / LISTS))", WIDE),
    Bug("one list is walked along, not both", WALK, "bits.any |= named;", "bits.any = named;", WIDE),
    Bug("a list where there is no block of queries", WALK, "if (row >= work.used_q)", "if (row >= 1 << 20)", WIDE),
    Bug("the next group is forgotten", KERNEL, "n = resume_walk(walk, args, n);", "n = -1;"),
    Bug("the next group is the same", WALK, "return enter_group(walk, args, last_tile(n) / GROUP_TILES);", "return enter_group(walk, args, last_tile(n) / GROUP_TILES - 1);"),
    Bug("bits of another group", WALK, "args, --group * GROUP_TILES", "args, --group * 0"),
    Bug("K of the next group is not copied", KERNEL, "            if (n >= 0)\n                copy_k", "            if (n >= 1 << 30)\n                copy_k"),
    Bug("sources stay in the group before", KERNEL, "            go_back(tiles.k, before - n);\n", ""),
    Bug("rows that see no listed key are NaN", OUTPUT, "end.sees_none || !sees_walk(", "end.sees_none && !sees_walk("),
    Bug("such a row sees the block before its own", MEANS, "sees = n >= begin && n < end;", "sees = n >= begin - 1 && n < end;"),
    Bug("a row of -inf counts as one that sees nothing", MEANS, "sees = n >= begin && n < end;", "sees = false;"),
    Bug("listed blocks count as their means, too", MEANS, "& ~listed;", "& ~(listed & 0);"),
    Bug("means that a row may not see", MEANS, "blocks.end = keys.end == num_keys ? blocks_of(num_keys) : keys.end / BLOCK_N;", "blocks.end = blocks_of(keys.end);"),
    Bug("a ragged last block is no whole one", MEANS, "keys.end == num_keys ? blocks_of(num_keys) :", "keys.end == -1 ? blocks_of(num_keys) :"),
    Bug("a mean counts as one key", MEANS, "#define LOG2_OF_BLOCK 6.0f", "#define LOG2_OF_BLOCK 0.0f"),
    Bug("the last block counts as a full one", KERNEL, "score_last_mean(s[m], bounds.num_keys);", "(void)0;"),
    Bug("bits of the other half", MEANS, "((2 * n + half) & 31)", "((2 * n + 1 - half) & 31)"),
    Bug("columns are off by one pair", MEANS, ">> (lane % 4 * 2);", ">> (lane % 4);"),
    Bug("means of another head", MEANS, "place.head / args.heads_per_key_head;", "place.head % args.heads_per_key_head;"),
    Bug("means behind the last are read", KERNEL, "v_rows = seen_means(args, bounds.num_keys, bounds.diagonal);", "v_rows.begin = 0;"),
    Bug("a mean of all 64, real or not", POOL, "float count = (float)(block.end - block.begin);", "float count = 64.0f;"),
    Bug("a mean forgets a key", POOL, "int row = block.begin; row < block.end; row++)\n#pragma", "int row = block.begin + 1; row < block.end; row++)\n#pragma"),
    Bug("padding is in a mean", POOL, "block.end = length_at(args.seqused, sample, args.seqlen);", "block.end = args.seqlen;"),
)
# fmt: on


def suspicious(tile: TileListed) -> Iterator[tuple[cases.Case, float, str, bool]]:
    """Calls that between them meet every bug of the list."""
    m = tile.block_m
    yield cases.Case(m + 70, 333, 2, 4, 2), 0.5, "strided", False
    yield cases.Case(m + 9, 333, 1, 2, 1, window=(90, 40)), 0.4, "garbage", False
    yield cases.Case(m, 290, 2, 2, 2, k_lens=(290, 70), is_causal=True), 0.5, "counts", False
    yield cases.Case(20, 2900), 0.9, "plain", False
    yield cases.Case(200, 333, 2, 4, 2, q_lens=(200, 60)), 0.4, "roomy", True
    yield cases.Case(70, 300, 1, 2, 2, is_causal=True), 0.4, "plain", True
    yield cases.Case(70, 290, 2, 2, 2, k_lens=(290, 130)), 0.3, "plain", True


def check_groups(tile: TileListed, **how: Any) -> None:
    """Tiles in three groups, against the same tiles in one."""
    chosen, seqlen_k = (3, 500, 1030, 1031, 2060), 2061 * 64
    query, keys, values = cases.operands(cases.Case(20, 64 * len(chosen)), tile)
    rows = [n for b in chosen for n in range(b * 64, b * 64 + 64)]
    long = [torch.full((1, seqlen_k, 1, tile.head_dim), torch.nan, dtype=keys.dtype) for _ in "kv"]
    long[0][:, rows], long[1][:, rows] = keys, values
    named = np.zeros((1, 1, 1, 2061), dtype=bool)
    named[..., list(chosen)] = True
    counts, indices = Lists(named).as_tensors()
    got = run_listed.run(tile, query, *long, counts=counts, indices=indices, **how)
    counts, indices = Lists(named[..., list(chosen)]).as_tensors()
    want = run_listed.run(tile, query, keys, values, counts=counts, indices=indices)
    assert torch.equal(got.out, want.out)


def check_infinite(tile: TileListed, **how: Any) -> None:
    """Rows whose listed scores all are -inf, and rows that see none of their listed block."""
    query, key, value = cases.operands(cases.Case(64, 200), tile)
    query[..., 0], key[..., 0] = 1.0, 0.0
    key[:, :64, :, 0] = -torch.inf
    for listed, window in ((0, (-1, -1)), (0, (9, 0))):
        named = np.zeros((1, 1, 1, 4), dtype=bool)
        named[..., listed] = True
        counts, indices = Lists(named).as_tensors()
        call: dict[str, Any] = {"counts": counts, "indices": indices, "window": window, **how}
        got = run_listed.run(tile, query, key, value, **call)
        cases_listed.assert_close(got, query, key, value, Lists(named), window=window)


def check_all(tile: TileListed, **how: Any) -> None:
    check_infinite(tile, **how)
    for case, density, form, pools in suspicious(tile):
        cases_listed.check(case, tile, density, form, pools, **how)
    check_groups(tile, **how)


@pytest.mark.parametrize("bug", every(10, BUGS), ids=lambda bug: bug.name)
def test_the_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    must_be_found(bug, partial(check_all, named(tiles_listed(), bug.tile)), tmp_path)


def test_without_a_bug_nothing_is_found() -> None:
    for name in (SLIM, WIDE):
        check_all(named(tiles_listed(), name))
