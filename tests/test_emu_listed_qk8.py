# SPDX-License-Identifier: Apache-2.0
"""test_emu_listed_qk8.py - kernels of 8-bit scores that take lists of blocks, on the emulated GPU:
every tile, held against the definition, and against the dense row of the same tile, bit by bit.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import blocks_oracle
import oracle
from blocks_oracle import BLOCK, Lists
from emu import cases, cases_listed, cases_listed_qk8, cases_qk8, qk8, run_qk8
from emu.build import compiler
from emu.cases_listed import as_tensors
from emu.rows import TileListedQk8, dense_of, tiles_listed_qk8
from emu.run import Schedule
from nightly import unless
from test_emu_listed import MASKS

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

CHANCES, PARTS = 84, 4  # cases by chance for each tile, in so many tests
SHORT = (
    *("sm80_qk8_listed_f16_d64_slim", "sm80_qk8_listed_bf16_d128_wide"),
    "sm75_qk8_listed_bf16_d64_turing",
)


def is_short(tile: TileListedQk8) -> bool:
    """A tile of each class."""
    return tile.name.removeprefix("sdpa_") in SHORT


def is_first(tile: TileListedQk8, part: int) -> bool:
    return part == 0 and is_short(tile)


each_tile = pytest.mark.parametrize(
    "tile", unless(is_short, tiles_listed_qk8()), ids=lambda tile: tile.name
)


@each_tile
def test_cases_by_hand(tile: TileListedQk8) -> None:
    for number, (case, density, form) in enumerate(cases_listed_qk8.by_hand(tile)):
        case = replace(case, schedule=Schedule(number % 3, number))
        cases_listed_qk8.check(case, tile, density, form)


@pytest.mark.parametrize(
    ("tile", "part"),
    unless(is_first, ((tile, part) for tile in tiles_listed_qk8() for part in range(PARTS))),
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_cases_by_chance(tile: TileListedQk8, part: int) -> None:
    for case, density, form in cases_listed_qk8.by_chance(tile, CHANCES // PARTS, seed=part):
        cases_listed_qk8.check(case, tile, density, form)


def test_there_are_enough_cases() -> None:
    for tile in tiles_listed_qk8():
        assert len(list(cases_listed_qk8.by_hand(tile))) + CHANCES >= 150, tile.name


def test_tiles_are_those_of_the_dense_rows() -> None:
    for tile in tiles_listed_qk8():
        dense = dense_of(tile)
        for column in ("block_m", "block_n", "num_warps", "stages", "q_in_regs", "min_ctas"):
            assert getattr(tile, column) == getattr(dense, column), (tile.name, column)
        assert tile.smem_bytes == dense.smem_bytes and tile.pv_sum_f16 == dense.pv_sum_f16


@each_tile
def test_a_full_list_gives_the_bits_of_the_dense_row(tile: TileListedQk8) -> None:
    """In every head, and in one of two heads: K's mean is that of all keys, listed or not."""
    q, k, v = cases.operands(cases.Case(150, 333, 2, 2, 2, values="biased"), tile)
    for mask in MASKS:
        want = run_qk8.run(dense_of(tile), q, k, v, **mask)
        full = Lists(np.ones((2, 2, 3, 6), dtype=bool))
        half = Lists(full.named.copy())
        half.named[:, 1, 1, ::2] = False
        assert want.lse is not None
        for lists in (full, half):
            counts, indices = as_tensors(lists, "roomy")
            got = run_qk8.run(tile, q, k, v, counts=counts, indices=indices, **mask)
            heads = 1 if lists is half else 2
            assert got.lse is not None
            assert torch.equal(got.out[:, :, :heads], want.out[:, :, :heads])
            assert torch.equal(got.lse[:, :heads], want.lse[:, :heads])
            assert torch.equal(got.out[:, 128:, heads - 1], want.out[:, 128:, heads - 1])
            assert heads == 2 or not torch.equal(got.out[1, 64:128, 1], want.out[1, 64:128, 1])


@each_tile
def test_lists_over_several_groups_of_tiles(tile: TileListedQk8) -> None:
    """More tiles than a warp has bits for: the bits are those of a short call with the same tiles,
    the last of them ragged, groups without any among them."""
    seqlen_k = 3 * 65536 + 20
    last = seqlen_k // BLOCK
    for chosen in ((0, 5, 1023, 1024, 2047, 2500, last), (3, 31, 32, 1055), (2049,), (last - 1,)):
        operands, got = cases_listed_qk8.far_apart(tile, chosen, seqlen_k)
        want = run_qk8.run(dense_of(tile), *operands)
        assert got.lse is not None and want.lse is not None
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse), chosen


@each_tile
def test_no_schedule_changes_a_bit(tile: TileListedQk8) -> None:
    case = cases.Case(tile.block_m + 70, 5 * BLOCK - 7, is_causal=True)
    query, key, value = cases.operands(case, tile)
    counts, indices = as_tensors(cases_listed.lists_of(case, 0.5), "plain")
    found = []
    for landing in range(3):
        schedule = Schedule(landing, landing + 9)
        how: dict[str, Any] = {"schedule": schedule, "counts": counts, "indices": indices}
        found.append(run_qk8.run(tile, query, key, value, **case.call(), **how))
    for got in found[1:]:
        assert torch.equal(found[0].out, got.out)
        assert found[0].lse is not None and got.lse is not None
        assert torch.equal(found[0].lse, got.lse)


@each_tile
def test_the_whole_chain_and_the_error(tile: TileListedQk8) -> None:
    """The passes make what the kernel reads, of all keys; the result is 1.1 % from float64's."""
    case = cases.Case(tile.block_m + 3, 400, 1, 2, 1, values="biased")
    query, key, value = cases.operands(case, tile)
    lists = blocks_oracle.random_lists(5, 1, 2, case.seqlen_q, 400, 0.5)
    counts, indices = as_tensors(lists, "plain")
    how: dict[str, Any] = {"counts": counts, "indices": indices, "integers": qk8.quantised}
    got = run_qk8.run(tile, query, key, value, **how)
    cases_qk8.check_result(tile, got, query, key, value, lists)
    value -= 2.0
    got = run_qk8.run(tile, query, key, value, **how)
    want, _ = blocks_oracle.attention(query, key, value, lists)
    error = oracle.as_float64(got.out) - want
    assert np.linalg.norm(error) <= 0.011 * np.linalg.norm(want)


@each_tile
def test_what_is_not_finite(tile: TileListedQk8) -> None:
    """A bad key or value makes NaN of the rows that see its block, and of no other row."""
    query, key, value = cases.operands(cases.Case(3 * BLOCK, 4 * BLOCK, heads_q=2), tile)
    named = np.ones((1, 2, 3, 4), dtype=bool)
    named[0, 0, 1, 2] = named[0, 1, :2, 2] = False
    counts, indices = as_tensors(Lists(named), "plain")
    sees = torch.from_numpy(np.repeat(named[0, :, :, 2], BLOCK, axis=1)).T

    def is_spoilt(key: Tensor, value: Tensor) -> Tensor:
        got = run_qk8.run(tile, query, key, value, counts=counts, indices=indices)
        cases_qk8.check_result(tile, got, query, key, value, Lists(named))
        return ~got.out[0].isfinite().all(dim=2)

    for bad in (math.nan, math.inf, -math.inf):
        keys, values = key.clone(), value.clone()
        keys[0, 2 * BLOCK + 9, 0, 3] = bad
        assert torch.equal(is_spoilt(keys, value), sees)
        values[0, 2 * BLOCK + 9, 0, 3] = bad
        assert torch.equal(is_spoilt(key, values), sees)


@each_tile
def test_rows_that_see_no_listed_key(tile: TileListedQk8) -> None:
    """They are 0, also where a mask hides all of a listed block, and where the query is NaN."""
    query, key, value = cases.operands(cases.Case(130, 200), tile)
    query[0, 20, 0, 3] = math.nan
    named = np.zeros((1, 1, 3, 4), dtype=bool)
    named[..., 3] = True
    counts, indices = as_tensors(Lists(named), "roomy")
    for window in ((9, 9), (64, 64), (-1, 0)):
        how: dict[str, Any] = {"window": window}
        got = run_qk8.run(tile, query, key, value, counts=counts, indices=indices, **how)
        cases_qk8.check_result(tile, got, query, key, value, Lists(named), **how)
        assert got.lse is not None and got.lse[0, 0, 20] == -math.inf and not got.out[0, 20].any()
