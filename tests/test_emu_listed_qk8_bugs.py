# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (each bug is a line of a table)
"""test_emu_listed_qk8_bugs.py - plants a bug where lists of blocks meet 8-bit scores, and demands
that it is found by calls like those of test_emu_listed_qk8.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blocks_oracle import Lists
from emu import cases, cases_listed_qk8, cases_qk8, planting, run_qk8
from emu.build import compiler
from emu.planting import must_be_found, named
from emu.rows import TileListedQk8, tiles_listed_qk8
from nightly import every

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

KERNEL, WALK, MEANS, SCORES, OUTPUT = (
    f"cuda/{name}.cuh"
    for name in (
        *("sdpa_sm80", "tile/walk_listed", "tile/means"),
        *("tile/scores_int8", "tile/output"),
    )
)
SLIM, WIDE, TURING = (
    f"sdpa_{name}"
    for name in (
        *("sm80_qk8_listed_f16_d64_slim", "sm80_qk8_listed_bf16_d128_wide"),
        "sm75_qk8_listed_bf16_d64_turing",
    )
)


@dataclass(frozen=True)
class Bug(planting.Bug):
    """tile: the one that shows it."""

    tile: str = SLIM


# fmt: off
BUGS = (
    Bug("K does not skip tiles", SCORES, "    source = stepped_back(source, (i64)tiles * K_TILE_BYTES);\n", ""),
    Bug("K does not skip tiles: one buffer", SCORES, "    source = stepped_back(source, (i64)tiles * K_TILE_BYTES);\n", "", WIDE),
    Bug("K goes back by tiles of V", SCORES, "(i64)tiles * K_TILE_BYTES", "(i64)tiles * TILE_BYTES"),
    Bug("K goes back without its steps", SCORES, "(i64)tiles * K_TILE_BYTES", "(i64)tiles * (BLOCK_N * K_ROW_BYTES)"),
    Bug("a copy goes on to the tile before", SCORES, "    if (!LISTED)\n        source = stepped", "    if (true)\n        source = stepped"),
    Bug("K begins at the head's first tile", SCORES, "(head * tiles + first_key / BLOCK_N) * K_TILE_BYTES", "(head * tiles + first_key / BLOCK_N * 0) * K_TILE_BYTES"),
    Bug("keys of another head", SCORES, "(head * tiles + first_key / BLOCK_N)", "(head_k * tiles + first_key / BLOCK_N)"),
    Bug("steps of the first buffer", SCORES, "shared_base() + stage + BLOCK_N * K_ROW_BYTES", "shared_base() + TILE_BYTES + BLOCK_N * K_ROW_BYTES"),
    Bug("V does not skip tiles", KERNEL, "    go_back(tiles.v, back);\n", ""),
    Bug("V does not skip tiles: one buffer", KERNEL, "    go_back(tiles.v, back);\n", "", WIDE),
    Bug("one buffer: the last tile of K is not copied", KERNEL, "if (STAGES == 1 && next >= 0)", "if (STAGES == 1 && next > 0)", WIDE),
    Bug("one buffer: K is copied while it is read", KERNEL, "    cp_async_wait<STAGES - 1>();\n    block_barrier();\n", "    cp_async_wait<STAGES - 1>();\n    if (STAGES == 2)\n        block_barrier();\n", WIDE),
    Bug("one buffer: K is not waited for", KERNEL, "    cp_async_wait<0>();\n    block_barrier();\n    mask_bounds", "    cp_async_wait<1>();\n    block_barrier();\n    mask_bounds", WIDE),
    Bug("both buffers are one", WALK, "DEVICE int turn_of(const tile_walk &walk, int) { return walk.turn; }", "DEVICE int turn_of(const tile_walk &, int n) { return n; }"),
    Bug("a warp takes the other block's tiles", WALK, "return LISTS == 1 ||", "return true ||", WIDE),
    Bug("a warp has the other block's list", WALK, "if (i == thread_index_again() / 32 / (NUM_WARPS / LISTS))", "if (i != thread_index_again() / 32 / (NUM_WARPS / LISTS))", WIDE),
    Bug("one list is walked along, not both", WALK, "bits.any |= named;", "bits.any = named;", WIDE),
    Bug("a tile is taken twice", WALK, "    if (mine == n)\n        walk.bits &=", "    if (mine == n + 1)\n        walk.bits &="),
    Bug("the next group is forgotten", KERNEL, "n = resume_walk(walk, args, n);", "n = -1;"),
    Bug("K of the next group is not copied", KERNEL, "            if (n >= 0)\n                copy_k", "            if (n >= 1 << 30)\n                copy_k"),
    Bug("K of the next group is not copied: one buffer", KERNEL, "            if (n >= 0)\n                copy_k", "            if (n >= 1 << 30)\n                copy_k", WIDE),
    Bug("K stays in the group before", KERNEL, "            go_back(tiles.k, before - n);\n", ""),
    Bug("rows that see no listed key are NaN", OUTPUT, "end.sees_none || !sees_walk(", "end.sees_none && !sees_walk("),
    Bug("a row of NaN sees what it may not", MEANS, "if (row_sum > 0.0f ||", "if (row_sum != 0.0f ||"),
    Bug("such a row sees the block behind its own", MEANS, "sees = n >= begin && n < end;", "sees = n >= begin && n <= end;"),
    Bug("such a row sees the block before its own", MEANS, "sees = n >= begin && n < end;", "sees = n >= begin - 1 && n < end;"),
    Bug("lse without K's mean", OUTPUT, "lse += load_global_f32(args.q_rows + 2 * at + 1);", "lse += 0 * at;"),
    Bug("the factor of one row for two", SCORES, "scale[i / 2][i % 2] = q.scale[i / 2][i % 2];", "scale[i / 2][i % 2] = q.scale[i / 2][0];"),
    Bug("factors of one m tile", SCORES, "scale[i / 2][i % 2] = q.scale[i / 2][i % 2];", "scale[i / 2][i % 2] = q.scale[0][i % 2];", WIDE),
    Bug("sums that overflow", KERNEL, "QK_INT8 ? 7 : 9", "QK_INT8 ? 12 : 9"),
    Bug("Turing: V's scale is forgotten", KERNEL, "scale = load_global_f32(args.v_scale", "scale = 1.0f + 0.0f * load_global_f32(args.v_scale", TURING),
)
# fmt: on


def suspicious(tile: TileListedQk8) -> Iterator[cases_listed_qk8.Listed]:
    """Calls that between them meet every bug of the list."""
    m = tile.block_m
    yield cases.Case(m + 70, 333, 2, 4, 2, values="biased"), 0.5, "strided"
    yield cases.Case(m + 9, 333, 1, 2, 1, window=(90, 40)), 0.4, "garbage"
    yield cases.Case(m, 290, 2, 2, 2, k_lens=(290, 70), is_causal=True), 0.5, "counts"
    yield cases.Case(m + 5, 700, values="outliers"), 0.6, "plain"


def check_what_is_seen(tile: TileListedQk8, **how: Any) -> None:
    """Rows that see none of their listed block; and rows whose scores are NaN."""
    query, key, value = cases.operands(cases.Case(64, 200), tile)
    query[0, 3, 0, 5] = torch.nan
    for listed, window in ((0, (-1, -1)), (0, (9, 0)), (3, (9, -1)), (1, (9, 9))):
        named = np.zeros((1, 1, 1, 4), dtype=bool)
        named[..., listed] = True
        counts, indices = Lists(named).as_tensors()
        call: dict[str, Any] = {"counts": counts, "indices": indices, "window": window, **how}
        got = run_qk8.run(tile, query, key, value, **call)
        cases_qk8.check_result(tile, got, query, key, value, Lists(named), window=window)


def check_groups(tile: TileListedQk8, **how: Any) -> None:
    """Tiles in three groups, against the same tiles in one."""
    chosen = (3, 500, 1030, 1031, 2060)
    operands, got = cases_listed_qk8.far_apart(tile, chosen, 2061 * 64, **how)
    named = np.ones((1, 1, tile.block_m // 64, len(chosen)), dtype=bool)
    counts, indices = Lists(named).as_tensors()
    want = run_qk8.run(tile, *operands, counts=counts, indices=indices)
    assert torch.equal(got.out, want.out)


def check_largest_sums(tile: TileListedQk8, **how: Any) -> None:
    """As cases_qk8 has it, in a list of all blocks."""
    counts, indices = Lists(np.ones((1, 1, 1, 3), dtype=bool)).as_tensors()
    cases_qk8.check_largest_sums(tile, counts=counts, indices=indices, **how)


def check_all(tile: TileListedQk8, **how: Any) -> None:
    check_what_is_seen(tile, **how)
    check_largest_sums(tile, **how)
    for case, density, form in suspicious(tile):
        cases_listed_qk8.check(case, tile, density, form, **how)
    check_groups(tile, **how)


@pytest.mark.parametrize("bug", every(8, BUGS), ids=lambda bug: bug.name)
def test_the_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    must_be_found(bug, partial(check_all, named(tiles_listed_qk8(), bug.tile)), tmp_path)


def test_without_a_bug_nothing_is_found() -> None:
    for name in (SLIM, WIDE, TURING):
        check_all(named(tiles_listed_qk8(), name))
