# SPDX-License-Identifier: Apache-2.0
"""test_emu_listed.py - kernels that take lists of blocks, on the emulated GPU: every tile, held
against float64, and against the dense row of the same tile, bit by bit.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import blocks_oracle
from blocks_oracle import BLOCK, Lists
from emu import cases, cases_listed, run, run_listed
from emu.build import compiler
from emu.cases_listed import as_tensors
from emu.rows import TileListed, dense_of, tiles_listed
from emu.run import Schedule
from nightly import unless

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

CHANCES, PARTS = 84, 4  # cases by chance for each tile, in so many tests
SHORT = ("sm80_listed_f16_d64_slim", "sm80_listed_bf16_d64_wide", "sm75_listed_bf16_d128_turing")


def is_short(tile: TileListed) -> bool:
    """A tile of each class."""
    return tile.name.removeprefix("sdpa_") in SHORT


def is_first(tile: TileListed, part: int) -> bool:
    return part == 0 and is_short(tile)


each_tile = pytest.mark.parametrize(
    "tile", unless(is_short, tiles_listed()), ids=lambda tile: tile.name
)


@each_tile
def test_cases_by_hand(tile: TileListed) -> None:
    for number, (case, density, form, pools) in enumerate(cases_listed.by_hand(tile)):
        case = replace(case, schedule=Schedule(number % 3, number))
        cases_listed.check(case, tile, density, form, pools)


@pytest.mark.parametrize(
    ("tile", "part"),
    unless(is_first, ((tile, part) for tile in tiles_listed() for part in range(PARTS))),
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_cases_by_chance(tile: TileListed, part: int) -> None:
    for case, density, form, pools in cases_listed.by_chance(tile, CHANCES // PARTS, seed=part):
        cases_listed.check(case, tile, density, form, pools)


def test_there_are_enough_cases() -> None:
    for tile in tiles_listed():
        assert len(list(cases_listed.by_hand(tile))) + CHANCES >= 150, tile.name


def test_tiles_are_those_of_the_dense_rows() -> None:
    for tile in tiles_listed():
        dense = dense_of(tile)
        for column in ("block_m", "block_n", "num_warps", "stages", "q_in_regs", "min_ctas"):
            assert getattr(tile, column) == getattr(dense, column), (tile.name, column)


MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True, "k_lens": torch.tensor([333, 70])},
    {"window": (90, 40), "q_lens": torch.tensor([64, 150])},
)


@each_tile
def test_a_full_list_gives_the_bits_of_the_dense_row(tile: TileListed) -> None:
    """In every head, and in one of two heads."""
    q, k, v = cases.operands(cases.Case(150, 333, 2, 2, 2, values="peaky"), tile)
    for mask in MASKS:
        want = run.run(dense_of(tile), q, k, v, **mask)
        full = Lists(np.ones((2, 2, 3, 6), dtype=bool))
        half = Lists(full.named.copy())
        half.named[:, 1, 1, ::2] = False
        assert want.lse is not None
        for lists in (full, half):
            counts, indices = as_tensors(lists, "roomy")
            got = run_listed.run(tile, q, k, v, counts=counts, indices=indices, **mask)
            heads = 1 if lists is half else 2
            assert got.lse is not None
            assert torch.equal(got.out[:, :, :heads], want.out[:, :, :heads])
            assert torch.equal(got.lse[:, :heads], want.lse[:, :heads])
            assert torch.equal(got.out[:, 128:, heads - 1], want.out[:, 128:, heads - 1])
            assert heads == 2 or not torch.equal(got.out[1, 64:128, 1], want.out[1, 64:128, 1])


@each_tile
def test_lists_over_several_groups_of_tiles(tile: TileListed) -> None:
    """More tiles than a warp has bits for: the bits are those of a short call with the same tiles,
    the last of them ragged, groups without any among them."""
    seqlen_k, rows = 3 * 65536 + 20, tile.block_m
    last = seqlen_k // BLOCK
    for chosen in ((0, 5, 1023, 1024, 2047, 2500, last), (3, 31, 32, 1055), (2049,), (last - 1,)):
        key_rows = [n for b in chosen for n in range(b * BLOCK, min((b + 1) * BLOCK, seqlen_k))]
        short = cases.operands(cases.Case(rows, len(key_rows), values="peaky"), tile)
        query, keys, values = short
        long_k, long_v = (
            torch.full((1, seqlen_k, 1, tile.head_dim), math.nan, dtype=keys.dtype)
            for _ in range(2)
        )
        long_k[:, key_rows], long_v[:, key_rows] = keys, values
        named = np.zeros((1, 1, blocks_oracle.blocks_of(rows), last + 1), dtype=bool)
        named[..., list(chosen)] = True
        counts, indices = as_tensors(Lists(named), "plain")
        got = run_listed.run(tile, query, long_k, long_v, counts=counts, indices=indices)
        want = run.run(dense_of(tile), *short)
        assert got.lse is not None and want.lse is not None
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse), chosen


@each_tile
def test_no_schedule_changes_a_bit(tile: TileListed) -> None:
    case = cases.Case(tile.block_m + 70, 5 * BLOCK - 7, is_causal=True)
    query, key, value = cases.operands(case, tile)
    counts, indices = as_tensors(cases_listed.lists_of(case, 0.5), "plain")
    first = None
    for landing in range(3):
        how: dict[str, Any] = {
            "schedule": Schedule(landing, landing + 9),
            "counts": counts,
            "indices": indices,
        }
        got = run_listed.run(tile, query, key, value, **case.call(), **how)
        first = first or got
        assert torch.equal(first.out, got.out)
        assert first.lse is not None and got.lse is not None and torch.equal(first.lse, got.lse)


@each_tile
def test_rows_whose_listed_scores_all_are_minus_infinity(tile: TileListed) -> None:
    """They are NaN; rows whose listed blocks hold no key that they see are 0."""
    query, key, value = cases.operands(cases.Case(130, 200), tile)
    query[..., 0], key[..., 0] = 1.0, 0.0
    key[:, BLOCK : 2 * BLOCK, :, 0] = -math.inf
    named = np.zeros((1, 1, 3, 4), dtype=bool)
    named[..., 1] = True
    counts, indices = as_tensors(Lists(named), "roomy")
    got = run_listed.run(tile, query, key, value, counts=counts, indices=indices, window=(64, 64))
    cases_listed.assert_close(got, query, key, value, Lists(named), window=(64, 64))
    assert got.lse is not None
    assert got.lse[0, 0, 100].isnan() and got.out[0, 100, 0].isnan().all()
    lists = Lists(np.roll(named, 2, axis=3))
    counts, indices = as_tensors(lists, "roomy")
    got = run_listed.run(tile, query, key, value, counts=counts, indices=indices, window=(9, 9))
    assert got.lse is not None and got.lse[0, 0, 20] == -math.inf and not got.out[0, 20].any()
