# SPDX-License-Identifier: Apache-2.0
"""test_emu_kernels.py - every CUDA kernel of the list, run on the CPU and held against the oracle.

The sources are those that GPUs get; behind their PTX wrappers stands tests/emu. Shapes are small:
tiles and their edges, not lengths, are what can go wrong.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from emu import cases
from emu.build import compiler
from emu.rows import Tile, tiles
from emu.run import DTYPES, Schedule, run
from nightly import every, unless
from tolerances import assert_close_to_oracle

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

CHANCES, PARTS = 72, 3  # cases by chance for each tile, in so many tests
each_tile = pytest.mark.parametrize("tile", tiles(), ids=lambda tile: tile.name)


def is_short(tile: Tile) -> bool:
    """Of two tiles that differ in their dtype alone, one."""
    return tile.dtype == "F16" or bool(tile.pv_sum_f16) or tile.gpu_class == "TURING"


@pytest.mark.parametrize("tile", unless(is_short, tiles()), ids=lambda tile: tile.name)
def test_cases_by_hand(tile: Tile) -> None:
    for number, case in enumerate(cases.by_hand(tile)):
        # Which copies land early must not matter: take turns.
        cases.check(replace(case, schedule=Schedule(number % 3, number)), tile)


@pytest.mark.parametrize("part", every(PARTS, range(PARTS)))
@each_tile
def test_cases_by_chance(tile: Tile, part: int) -> None:
    for case in cases.by_chance(tile, CHANCES // PARTS, seed=part):
        cases.check(case, tile)


def test_there_are_enough_cases() -> None:
    for tile in tiles():
        assert len(list(cases.by_hand(tile))) + CHANCES >= 150, tile.name


@each_tile
def test_one_key_takes_all_the_weight_wherever_it_is(tile: Tile) -> None:
    """Softmax forgives a wrong maximum unless one score is far ahead of those that were looked at:
    each sample has it in another column of the tile."""
    case = cases.Case(1, tile.block_n, batch=tile.block_n, values="one hot each")
    query, key, value = cases.operands(case, tile)
    out = run(tile, query, key, value).out
    assert torch.equal(out[:, 0], value[torch.arange(len(key)), torch.arange(len(key))])


@each_tile
def test_one_key_gives_exactly_its_value(tile: Tile) -> None:
    cases.check_one_key(tile)


@each_tile
def test_no_schedule_changes_a_bit(tile: Tile) -> None:
    cases.check_schedules(tile)


@pytest.mark.parametrize("dim", (0, 1, 2), ids=("batch", "row", "head"))
def test_offsets_beyond_two_to_the_31(dim: int) -> None:
    """The last element of each operand lies over 2^31 elements behind its first one. The views
    begin so far into the memory that an offset that has wrapped reads zeros from it."""
    tile = tiles()[0]
    memory = cases.reserved(2**32 + 2**16, DTYPES[tile.dtype])
    if memory is None:
        pytest.skip("this system does not lend address space without memory behind it")
    shape, stride = (
        [2, 3, 2, tile.head_dim],
        [6 * tile.head_dim, 2 * tile.head_dim, tile.head_dim, 1],
    )
    stride[dim] = 2**31 // (shape[dim] - 1) + tile.head_dim
    views = []
    for number in range(3):
        view = memory.as_strided(shape, stride, 2**31 + 4096 * number)
        views.append(view.copy_(torch.randn(shape)))
    out = run(tile, *views).out
    assert torch.equal(out, run(tile, *(view.contiguous() for view in views)).out)


@each_tile
def test_keys_whose_scores_are_minus_infinity(tile: Tile) -> None:
    """Whole tiles that weigh nothing, the one that comes first and those without a mask among
    them."""
    n = tile.block_n
    for hidden in ((3 * n, 4 * n), (0, 3 * n), (n, 2 * n)):
        query, key, value = cases.operands(cases.Case(20, 4 * n), tile)
        query[..., 0], key[..., 0] = 1.0, 0.0
        key[:, hidden[0] : hidden[1], :, 0] = -math.inf
        got = run(tile, query, key, value)
        assert_close_to_oracle(got.out, query, key, value, lse=got.lse)


@each_tile
def test_a_row_whose_scores_all_are_minus_infinity_is_nan(tile: Tile) -> None:
    """It is no row that sees no key: those are 0. Tiles with a mask and without."""
    query, key, value = cases.operands(cases.Case(20, 3 * tile.block_n + 1), tile)
    query[..., 0], key[..., 0] = 1.0, -math.inf
    for split_tiles in (0, 2):
        parts = run(tile, query, key, value, split_tiles=split_tiles)
        assert parts.out.isnan().all() and parts.lse is not None
        assert parts.lse.isnan().all() if not split_tiles else (parts.lse == -math.inf).all()


@each_tile
def test_nan_stays_visible(tile: Tile) -> None:
    for which in range(3):
        operands = cases.operands(cases.Case(20, tile.block_n + 6, heads_q=2, heads_k=2), tile)
        operands[which][0, 11, 1, 0] = float("nan")  # one element of one head
        out = run(tile, *operands).out
        assert out[:, :, 1].isnan().any(), f"operand {which}: the NaN got lost"
        assert not out[:, :, 0].isnan().any(), f"operand {which}: the other head saw it"
