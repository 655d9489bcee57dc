# SPDX-License-Identifier: Apache-2.0
"""checks_skip.py - calls with a skip_threshold of which is known what they leave out: each is a
function of a tile, and of what else goes to run_listed.run (a planted bug's sources, a schedule).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from blocks_oracle import BLOCK, random_lists
from emu import cases, cases_skip
from emu.cases import Case
from emu.cases_skip import Skip, rows_of_warp
from emu.rows import TileListed
from emu.run import Result, Schedule
from emu.run_listed import run

UNLISTED: dict[str, Any] = {"counts": None, "indices": None}


def weights_are_bf16(tile: TileListed) -> bool:
    """As small as float32's; f16 has none below 2^-24 of what it calls 1."""
    return tile.dtype == "BF16" and not tile.bf16_as_f16 and not tile.pv_sum_f16


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
    """The result, and what the guard is told; without lists, if `how` has none."""
    lost = torch.zeros(1)
    result = run(tile, *x, **{**UNLISTED, **how}, skip_threshold=threshold, lost_mass=lost)
    return result, float(lost)


def assert_same(one: Result, other: Result) -> None:
    assert torch.equal(one.out, other.out)
    assert one.lse is not None and other.lse is not None and torch.equal(one.lse, other.lse)


def it_leaves_out_what_it_says(tile: TileListed, **how: Any) -> None:
    """One block of five matters: the others go, and their share is what the scores say."""
    x = peaked(tile, score=20.0)
    result, lost = told(tile, x, 1e-6, scale=1.0, **how)
    assert torch.allclose(result.out[..., 4], torch.ones(())) and not result.out[..., :4].any()
    share = 4 * math.exp(-20.0) / (1 + 4 * math.exp(-20.0))
    assert share <= lost <= 1.002 * share
    assert result.lse is not None
    assert torch.allclose(result.lse, torch.tensor(20.0 + math.log(BLOCK)), rtol=1e-6)
    result, lost = told(tile, x, 1e-12, scale=1.0, **how)
    assert lost == 0.0 and ((result.out[..., :4] > 0).all() or not weights_are_bf16(tile))


def a_large_share(tile: TileListed, **how: Any) -> None:
    """Twenty blocks of which each weighs 0.9 of the one that is kept; for all but the last row
    0.8."""
    x = peaked(tile, 21, 0.0)
    x[1][:, :-BLOCK, :, 0] = -0.03125
    x[0][:, :-1] *= 2.0
    _, lost = told(tile, x, 1.0, scale=1.0, **how)
    share = 20 * math.exp(-0.125) / (1 + 20 * math.exp(-0.125))
    assert share <= lost <= 1.002 * share


def what_weighs_least_comes_first(tile: TileListed, **how: Any) -> None:
    """The maxima grow with every tile, and nothing is left out."""
    x = peaked(tile)
    x[1][..., 0] = torch.arange(5).flip(0).repeat_interleave(BLOCK)[None, :, None]
    result, lost = told(tile, x, 1.0, scale=1.0, **how)
    assert lost == 0.0 and result.lse is not None
    lse = math.log(BLOCK * sum(math.exp(4 * n) for n in range(5)))
    assert torch.allclose(result.lse, torch.tensor(lse), rtol=1e-6)


def a_tiny_threshold_changes_no_bit(tile: TileListed, **how: Any) -> None:
    """Nor does having no lists, beside a list of all blocks."""
    for case in (Case(150, 333, 2, 4, 2), Case(70, 290, 1, 2, 2, is_causal=True, k_lens=(280,))):
        x = cases.operands(case, tile)
        query, key, value = x
        lists = random_lists(1, case.batch, case.heads_q, case.seqlen_q, case.seqlen_k, 1.1)
        listed = dict(zip(UNLISTED, lists.as_tensors(), strict=True))
        call = {**case.call(), **how}
        want = run(tile, query, key, value, **listed, **call)
        for given in (listed, UNLISTED):
            got, lost = told(tile, x, 1e-30, **given, **call)
            assert_same(got, want)
            assert lost == 0.0
        assert_same(run(tile, query, key, value, **UNLISTED, **call), want)
        sharp = cases_skip.operands(case, Skip(sharpness=8.0, alike=1.0), tile)
        one, two = told(tile, sharp, **listed, **call), told(tile, sharp, **call)
        assert_same(one[0], two[0])
        assert one[1] == two[1] > 0.0


def a_row_keeps_a_block_for_its_warp(tile: TileListed, **how: Any) -> None:
    """And for no others. Rows behind the real length, which are filled with the block's first row,
    keep nothing."""
    rows = rows_of_warp(tile)
    for needs in (0, 5, rows + 8, tile.block_m - 1):
        x = peaked(tile)
        x[0][0, needs, 0, 1] = 8.0
        x[1][:, :BLOCK, :, 1] = 5.0
        for used_q in (tile.block_m, tile.block_m - 3):
            lens = torch.tensor([used_q])
            result, lost = told(tile, x, q_lens=lens, scale=1.0, **how)
            kept = torch.zeros(tile.block_m, dtype=torch.bool)
            if needs < used_q:
                kept[needs // rows * rows : (needs // rows + 1) * rows] = True
            kept[used_q:] = False
            has_first = result.out[0, :, 0, 0] > 0
            if weights_are_bf16(tile):
                assert torch.equal(has_first, kept), (needs, used_q)
            else:  # where only that row notices what is kept
                assert not (has_first & ~kept).any() and has_first[needs] == kept[needs]
            assert not result.out[0, :, 0, 1:4].any()
            share = 4 * math.exp(-40.0)
            assert 0.99 * share <= lost <= 1.002 * share


def one_key_keeps_its_block(tile: TileListed, **how: Any) -> None:
    """Wherever it is, and whichever row sees it."""
    for row, at in ((0, 0), (9, 17), (tile.block_m - 1, 63), (tile.block_m - 9, 57)):
        x = peaked(tile)
        x[0][0, row, 0, 1] = 8.0
        x[1][0, BLOCK + at, 0, 1] = 5.0
        result, _ = told(tile, x, scale=1.0, **how)
        assert result.out[0, row, 0, 1] > 0.01 and not result.out[0, :, 0, 2:4].any()


def what_is_lost_shrinks_as_the_maximum_rises(tile: TileListed, **how: Any) -> None:
    """Blocks from the last to the first: scores of 0, then -8, which is left out, then 12. Its
    share is in the end that of exp(-20), whether the maximum rises in a tile or in a mean."""
    for pools in (False, True):
        x = peaked(tile, 3)
        scores = torch.tensor([12.0, -8.0, 0.0]).repeat_interleave(BLOCK)
        x[1][..., 0] = (scores / 4)[None, :, None]
        lists = random_lists(0, 1, 1, tile.block_m, 3 * BLOCK, 1.1)
        lists.named[..., 0] = not pools
        listed = dict(zip(UNLISTED, lists.as_tensors(), strict=True))
        _, lost = told(tile, x, 0.01, pools_others=pools, scale=1.0, **listed, **how)
        weights = torch.exp(scores.double())
        share = float(weights[BLOCK : 2 * BLOCK].sum() / weights.sum())
        assert share <= lost <= 1.002 * share, (pools, share, lost)


def the_guard_keeps_the_largest(tile: TileListed, **how: Any) -> None:
    x = peaked(tile, score=20.0)
    want, small = told(tile, x, scale=1.0, **how)
    call: dict[str, Any] = {**UNLISTED, "scale": 1.0, "skip_threshold": 0.05, **how}
    for before in (0.25, small / 2):
        lost = torch.full((1,), before)
        run(tile, *x, lost_mass=lost, **call)
        assert float(lost) == max(before, small)
    assert_same(run(tile, *x, **call), want)  # nobody wants to know


def what_is_not_finite_is_kept(tile: TileListed, **how: Any) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = peaked(tile)
        x[2][0, 70, 0, 3] = bad
        result, lost = told(tile, x, 0.5, scale=1.0, **how)
        assert not result.out[..., 3].isfinite().any() and result.out[..., :3].isfinite().all()
        assert lost > 0.0
        x = peaked(tile)
        x[0][..., 3] = 1.0
        x[1][0, 70, 0, 3] = bad
        result, lost = told(tile, x, 0.5, scale=1.0, **how)
        if bad == -math.inf:  # the block is there, without this key
            share = 3 * math.exp(-40.0)
            assert share <= lost <= 1.002 * share
        else:
            assert result.out.isnan().all() and lost == 1.0, "such rows may have lost anything"


def what_is_not_finite_is_of_its_head(tile: TileListed, **how: Any) -> None:
    """Of eight pairs of samples and heads of keys one has a NaN: the others leave out its block."""
    x = peaked(tile)
    query, key, value = (part.expand(2, -1, 4, -1).clone() for part in x)
    query = query.repeat_interleave(2, dim=2)
    key, value = (part[:, : 4 * BLOCK + 9] for part in (key, value))
    lens = torch.tensor([4 * BLOCK + 3, 4 * BLOCK + 9])
    for sample in range(2):
        for head in range(4):
            spoilt = value.clone()
            spoilt[sample, 70, head, 3] = math.nan
            result, _ = told(tile, (query, key, spoilt), scale=1.0, k_lens=lens, **how)
            is_nan = torch.zeros(2, 8, dtype=torch.bool)
            is_nan[sample, 2 * head : 2 * head + 2] = True
            assert torch.equal(result.out[:, 0, :, 3].isnan(), is_nan)


def what_a_row_sees_in_part_is_kept(tile: TileListed, **how: Any) -> None:
    """Of all blocks that the mask cuts: the last tiles, where all keys weigh next to nothing but
    those of block 1, which every row sees whole."""
    rows, cut = tile.block_m, -(-tile.block_m // BLOCK)
    x = peaked(tile, 2 + cut + 1)
    x[1][..., 0] = 0.0
    x[1][:, 2 * BLOCK : 3 * BLOCK, :, 0] = 10.0
    result, _ = told(tile, x, 0.5, scale=1.0, window=(-1, 5), **how)
    last = 2 + cut
    seen = result.out[0, rows - 1, 0, last] > 0
    assert seen or not weights_are_bf16(tile), "the diagonal's block"
    assert not result.out[..., :2].any()


def what_no_row_sees_is_not_met(tile: TileListed, **how: Any) -> None:
    """Without lists: NaN in tiles before the window, and behind the last key of the mask."""
    x = peaked(tile, 8 + tile.block_m // BLOCK)
    for part in x[1:]:
        part[:, :BLOCK], part[:, -BLOCK:] = math.nan, math.nan
    lens = torch.tensor([part.shape[1] - BLOCK])
    call: Any = {"window": (2 * BLOCK, 0), "k_lens": lens, "scale": 1.0}
    result, _ = told(tile, x, **call, **how)
    assert result.out.isfinite().all()


def scores_that_all_are_minus_infinity(tile: TileListed, **how: Any) -> None:
    """Give NaN, also without lists; rows that see no key are 0."""
    x = peaked(tile, 2)
    x[1][..., 0] = -math.inf
    lens = torch.tensor([BLOCK - 20])
    result, lost = told(tile, x, 0.5, is_causal=True, k_lens=lens, **how)
    sees = torch.arange(tile.block_m) >= tile.block_m - (BLOCK - 20)
    assert torch.equal(result.out[0, :, 0, 0].isnan(), sees) and lost == 0.0
    assert not result.out[0, ~sees].any()


def no_schedule_changes_a_bit(tile: TileListed, **how: Any) -> None:
    case = Case(tile.block_m + 70, 6 * BLOCK - 7, is_causal=True)
    x = cases_skip.operands(case, Skip(sharpness=4.0), tile)
    first = told(tile, x, **case.call(), **how)
    for landing in range(3):
        call = {**case.call(), **how, "schedule": Schedule(landing, landing + 9)}
        got = told(tile, x, **call)
        assert_same(first[0], got[0])
        assert first[1] == got[1] > 0.0


ALL = (
    it_leaves_out_what_it_says,
    a_large_share,
    what_weighs_least_comes_first,
    a_tiny_threshold_changes_no_bit,
    a_row_keeps_a_block_for_its_warp,
    one_key_keeps_its_block,
    what_is_lost_shrinks_as_the_maximum_rises,
    the_guard_keeps_the_largest,
    what_is_not_finite_is_kept,
    what_is_not_finite_is_of_its_head,
    what_a_row_sees_in_part_is_kept,
    what_no_row_sees_is_not_met,
    scores_that_all_are_minus_infinity,
    no_schedule_changes_a_bit,
)
