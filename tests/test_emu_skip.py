# SPDX-License-Identifier: Apache-2.0
"""test_emu_skip.py - a skip_threshold in kernels that take lists of blocks, on the emulated GPU:
every tile, held against float64 (cases_skip.py), and against calls that leave nothing out.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blocks_oracle import BLOCK, random_lists
from emu import cases, cases_skip, run_listed
from emu.build import compiler
from emu.cases import Case
from emu.cases_skip import Skip, Told, rows_of_warp
from emu.rows import TileListed, tiles_listed
from emu.run import Result, Schedule
from nightly import unless

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

CHANCES, PARTS = 96, 8  # cases by chance for each tile, in so many tests
SHORT = ("sm80_listed_f16_d64_slim", "sm80_listed_bf16_d64_wide", "sm75_listed_bf16_d128_turing")


def is_short(tile: TileListed) -> bool:
    """A tile of each class."""
    return tile.name.removeprefix("sdpa_") in SHORT


def is_first(tile: TileListed, part: int) -> bool:
    return part == 0 and is_short(tile)


each_tile = pytest.mark.parametrize(
    "tile", unless(is_short, tiles_listed()), ids=lambda tile: tile.name
)
each_part = pytest.mark.parametrize(
    ("tile", "part"),
    unless(is_first, ((tile, part) for tile in tiles_listed() for part in range(PARTS))),
    ids=lambda x: getattr(x, "name", str(x)),
)


@each_part
def test_cases_by_hand(tile: TileListed, part: int) -> None:
    for number, (case, skip) in enumerate(cases_skip.by_hand(tile)):
        if number % PARTS == part:
            cases_skip.check(replace(case, schedule=Schedule(number % 3, number)), skip, tile)


@each_part
def test_cases_by_chance(tile: TileListed, part: int) -> None:
    told = [
        cases_skip.check(case, skip, tile)
        for case, skip in cases_skip.by_chance(tile, CHANCES // PARTS, seed=part)
    ]
    assert sum(one.is_sure for one in told) > len(told) * 0.7, "most must be known beforehand"


def test_there_are_enough_cases() -> None:
    for tile in tiles_listed():
        assert len(list(cases_skip.by_hand(tile))) + CHANCES >= 150, tile.name


def peaked(tile: TileListed, blocks: int = 5, score: float = 40.0) -> tuple[Tensor, ...]:
    """q, k and v: with a scale of 1 the last block of keys has scores of `score`, the others of 0;
    values name their blocks. float32 queries, so that out has numbers for small shares."""
    dtype, rows = cases.operands(Case(1, 1), tile)[1].dtype, tile.block_m
    query = torch.zeros(1, rows, 1, tile.head_dim)
    key, value = (torch.zeros(1, blocks * BLOCK, 1, tile.head_dim, dtype=dtype) for _ in "kv")
    query[..., 0] = 4.0
    key[:, -BLOCK:, :, 0] = score / 4
    value[0, torch.arange(blocks * BLOCK), 0, torch.arange(blocks * BLOCK) // BLOCK] = 1.0
    return query, key, value


def told(tile: TileListed, x: Any, threshold: float = 0.05, **how: Any) -> tuple[Result, float]:
    """The result, and what the guard is told; without lists and with a scale of 1, if `how` has
    none."""
    lost = torch.zeros(1)
    how = {"counts": None, "indices": None, "scale": 1.0, **how}
    result = run_listed.run(tile, *x, skip_threshold=threshold, lost_mass=lost, **how)
    return result, float(lost)


@each_tile
def test_it_leaves_out_what_it_says(tile: TileListed) -> None:
    """One block of five matters: the others go, and their share is what the scores say."""
    x = peaked(tile, score=20.0)
    result, lost = told(tile, x, 1e-6)
    assert torch.allclose(result.out[..., 4], torch.ones(())) and not result.out[..., :4].any()
    share = 4 * math.exp(-20.0) / (1 + 4 * math.exp(-20.0))
    assert share <= lost <= 1.002 * share
    assert result.lse is not None
    assert torch.allclose(result.lse, torch.tensor(20.0 + math.log(BLOCK)), rtol=1e-6)
    result, lost = told(tile, x, 1e-12)
    assert lost == 0.0 and (tile.dtype == "F16" or (result.out[..., :4] > 0).all())


@each_tile
def test_what_matters_in_the_first_tile_keeps_all(tile: TileListed) -> None:
    """Where the last block weighs least, the maxima grow with every tile."""
    x = peaked(tile)
    x[1][..., 0] = torch.arange(5).flip(0).repeat_interleave(BLOCK)[None, :, None]
    result, lost = told(tile, x, 1.0)
    assert lost == 0.0 and result.lse is not None
    assert torch.allclose(result.lse, torch.full_like(result.lse, 16.0 + math.log(BLOCK)), rtol=0.1)


@each_tile
def test_a_threshold_that_leaves_out_nothing_changes_no_bit(tile: TileListed) -> None:
    """Nor does one without lists beside a list of all blocks."""
    for case in (Case(150, 333, 2, 4, 2), Case(70, 290, 1, 2, 2, is_causal=True, k_lens=(280,))):
        x = cases.operands(case, tile)
        lists = random_lists(1, case.batch, case.heads_q, case.seqlen_q, case.seqlen_k, 1.1)
        counts, indices = lists.as_tensors()
        all_listed: Any = {"counts": counts, "indices": indices, **case.call()}
        want = run_listed.run(tile, *x, **all_listed)
        for how in (all_listed, case.call()):
            got, lost = told(tile, x, 1e-30, **how)
            assert torch.equal(got.out, want.out) and lost == 0.0
            assert got.lse is not None and want.lse is not None and torch.equal(got.lse, want.lse)
        sharp = cases_skip.operands(case, Skip(sharpness=8.0, alike=1.0), tile)
        one, two = told(tile, sharp, **all_listed), told(tile, sharp, **case.call())
        assert torch.equal(one[0].out, two[0].out) and one[1] == two[1] > 0.0


@each_tile
def test_rows_that_need_it_keep_a_block_for_those_beside_them(tile: TileListed) -> None:
    """Row by row: one that needs the first block keeps it for the rows of its warp, and no others.
    Rows behind the real length, which are filled with the block's first row, keep nothing."""
    rows = rows_of_warp(tile)
    for needs in (0, 5, rows + 8, tile.block_m - 1):
        x = peaked(tile)
        x[0][0, needs, 0, 1] = 8.0
        x[1][:, :BLOCK, :, 1] = 5.0
        for used_q in (tile.block_m, tile.block_m - 3):
            result, _ = told(tile, x, q_lens=torch.tensor([used_q]))
            kept = torch.zeros(tile.block_m, dtype=torch.bool)
            if needs < used_q:
                kept[needs // rows * rows : (needs // rows + 1) * rows] = True
            kept[used_q:] = False
            # What is kept there weighs exp(-40), or what little the row that needs it has.
            has_first = result.out[0, :, 0, 0] > 0
            if tile.dtype == "BF16" and not tile.bf16_as_f16 and not tile.pv_sum_f16:
                assert torch.equal(has_first, kept), (needs, used_q)
            else:  # such weights are none in f16
                assert not (has_first & ~kept).any()
                assert needs >= used_q or has_first[needs]
            assert not result.out[0, :, 0, 1:4].any()


@each_tile
def test_what_is_lost_shrinks_as_the_maximum_rises(tile: TileListed) -> None:
    """Blocks from the last to the first: scores of 0, then one of -8 that is left out, then 12. Its
    share is in the end that of exp(-20), whether the maximum rises in a tile or in a mean."""
    for pools in (False, True):
        x = peaked(tile, 3)
        scores = torch.tensor([12.0, -8.0, 0.0]).repeat_interleave(BLOCK)
        x[1][..., 0] = (scores / 4)[None, :, None]
        named = random_lists(0, 1, 1, tile.block_m, 3 * BLOCK, 1.1)
        named.named[..., 0] = not pools
        counts, indices = named.as_tensors()
        _, lost = told(tile, x, 0.01, counts=counts, indices=indices, pools_others=pools)
        weights = torch.exp(scores.double())
        share = float(weights[BLOCK : 2 * BLOCK].sum() / weights.sum())
        assert share <= lost <= 1.002 * share, (pools, share, lost)


@each_tile
def test_the_guard_keeps_the_largest(tile: TileListed) -> None:
    x = peaked(tile, score=20.0)
    small = told(tile, x)[1]
    how: Any = {"counts": None, "indices": None, "scale": 1.0, "skip_threshold": 0.05}
    for before in (0.25, small / 2):
        lost = torch.full((1,), before)
        run_listed.run(tile, *x, **how, lost_mass=lost)
        assert float(lost) == max(before, small)
    nobody = run_listed.run(tile, *x, **how)
    assert torch.equal(nobody.out, told(tile, x)[0].out)


@each_tile
def test_what_is_not_finite_is_never_left_out(tile: TileListed) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for where in (1, 2):
            x = peaked(tile)
            x[0][..., 3] = 1.0
            x[where][0, 70, 0, 3] = bad
            result, lost = told(tile, x, 0.5)
            if where == 2:  # a weight of 0 makes NaN of an infinity
                assert not result.out[..., 3].isfinite().any()
                assert result.out[..., :3].isfinite().all() and lost > 0.0
            elif bad == -math.inf:  # the block is there, without this key
                share = 3 * math.exp(-40.0)
                assert share <= lost <= 1.002 * share
            else:
                assert result.out.isnan().all()


@each_tile
def test_a_block_that_any_row_sees_in_part_is_kept(tile: TileListed) -> None:
    x = peaked(tile)
    x[1][..., 0] = x[1][..., 0].flip(1)  # the first block matters
    seen_in_part, lost = told(tile, x, 0.5, is_causal=True)
    if tile.dtype == "BF16" and not tile.bf16_as_f16 and not tile.pv_sum_f16:
        assert (seen_in_part.out[0, -1, 0, 4] > 0).all(), "the diagonal's block"
    assert lost == 0.0, "maxima rise up to the first block"


@each_tile
def test_no_schedule_changes_a_bit(tile: TileListed) -> None:
    case = Case(tile.block_m + 70, 6 * BLOCK - 7, is_causal=True)
    x = cases_skip.operands(case, Skip(sharpness=4.0), tile)
    first: tuple[Result, float] | None = None
    for landing in range(3):
        got = told(tile, x, schedule=Schedule(landing, landing + 9), **case.call())
        first = first or got
        assert torch.equal(first[0].out, got[0].out) and first[1] == got[1] > 0.0


def test_told_is_what_a_call_says() -> None:
    """Of calls by chance a fourth leave out something."""
    tile = next(filter(is_short, tiles_listed()))
    found: list[Told] = [
        cases_skip.check(case, skip, tile) for case, skip in cases_skip.by_chance(tile, 20, seed=99)
    ]
    assert sum(one.left_out > 0 for one in found) >= 5
