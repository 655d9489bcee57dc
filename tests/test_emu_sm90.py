# SPDX-License-Identifier: Apache-2.0
"""test_emu_sm90.py - the Hopper kernels, run on the CPU and held against the oracle.

As test_emu_kernels.py, with Hopper's units emulated: TMA, mbarriers, wgmma, clusters.
"""

from __future__ import annotations

import math

import pytest
import torch

from emu import cases, cases_sm90
from emu.build import compiler
from emu.cases import Case
from emu.rows_sm90 import TileSm90, tiles_sm90
from emu.run import DTYPES, Schedule
from emu.run_sm90 import run_sm90
from nightly import every
from tolerances import assert_close_to_oracle

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

CHANCES, PARTS = 40, 2  # cases by chance for each tile, in so many tests
each_tile = pytest.mark.parametrize("tile", tiles_sm90(), ids=lambda tile: tile.name)
# The two dtypes share all of the source but two instructions.
bf16_tiles = [tile for tile in tiles_sm90() if tile.dtype == "BF16"]
# Of the instances for head_dim 128 that differ in cluster or stages alone, one.
different = {(tile.head_dim, tile.block_n): tile for tile in reversed(bf16_tiles)}
each_geometry = pytest.mark.parametrize("tile", different.values(), ids=lambda tile: tile.name)
each_shape = pytest.mark.parametrize("tile", bf16_tiles, ids=lambda tile: tile.name)


@each_geometry
def test_cases_by_hand(tile: TileSm90) -> None:
    for number, case in enumerate(cases_sm90.by_hand(tile)):
        # Which copies land early must not matter: take turns.
        cases_sm90.check(case, tile, Schedule(number % 3, number))


@pytest.mark.parametrize("part", every(PARTS, range(PARTS)))
@each_tile
def test_cases_by_chance(tile: TileSm90, part: int) -> None:
    for case in cases_sm90.by_chance(tile, CHANCES // PARTS, seed=part):
        cases_sm90.check(case, tile)


def test_there_are_enough_cases() -> None:
    for tile in different.values():
        assert len(list(cases_sm90.by_hand(tile))) + 2 * CHANCES >= 150, tile.name


@each_tile
def test_one_key_takes_all_the_weight_wherever_it_is(tile: TileSm90) -> None:
    """Softmax forgives a wrong maximum unless one score is far ahead of those that were looked at:
    each sample has it in another column of the tile."""
    case = Case(1, tile.block_n, batch=tile.block_n, values="one hot each")
    query, key, value = cases.operands(case, tile)  # type: ignore[arg-type]
    out = run_sm90(tile, query, key, value).out
    assert torch.equal(out[:, 0], value[torch.arange(len(key)), torch.arange(len(key))])


@each_shape
def test_no_schedule_changes_a_bit(tile: TileSm90) -> None:
    case = Case(tile.block_m + 1, 3 * tile.block_n - 7, q_lens=(tile.block_m,), is_causal=True)
    operands = cases.operands(case, tile)  # type: ignore[arg-type]
    first = run_sm90(tile, *operands, **case.call())
    for landing in range(3):
        again = run_sm90(tile, *operands, **case.call(), schedule=Schedule(landing, landing + 9))
        assert torch.equal(first.out, again.out)
        assert first.lse is not None and again.lse is not None
        assert torch.equal(first.lse, again.lse)


@each_shape
def test_out_of_any_kind(tile: TileSm90) -> None:
    """Through TMA, straight from registers, in f32: the same numbers."""
    m = tile.block_m
    case = Case(m + 13, tile.block_n + 9, 2, 2, 1, q_lens=(m + 5, 3), k_lens=(0, tile.block_n))
    query, key, value = cases.operands(case, tile)  # type: ignore[arg-type]
    by_tma = run_sm90(tile, query, key, value, **case.call()).out
    around = torch.full((2, m + 13, 3, tile.head_dim + 4), math.nan, dtype=query.dtype)
    view = around[:, :, 1:, :-4]  # 8 bytes past a multiple of 16
    assert torch.equal(run_sm90(tile, query, key, value, out=view, **case.call()).out, by_tma)
    assert around[:, :, 0].isnan().all() and around[..., -4:].isnan().all()
    wide = torch.full(query.shape, math.nan)
    run_sm90(tile, query, key, value, out=wide, **case.call())
    assert torch.equal(wide.to(query.dtype), by_tma)


@each_shape
def test_keys_whose_scores_are_minus_infinity(tile: TileSm90) -> None:
    """Whole tiles that weigh nothing, the one that comes first and those without a mask among
    them."""
    n = tile.block_n
    for hidden in ((3 * n, 4 * n), (0, 3 * n), (n, 2 * n)):
        query, key, value = cases.operands(cases.Case(20, 4 * n), tile)  # type: ignore[arg-type]
        query[..., 0], key[..., 0] = 1.0, 0.0
        key[:, hidden[0] : hidden[1], :, 0] = -math.inf
        got = run_sm90(tile, query, key, value)
        assert_close_to_oracle(got.out, query, key, value, lse=got.lse)


@each_shape
def test_a_row_whose_scores_all_are_minus_infinity_is_nan(tile: TileSm90) -> None:
    """It is no row that sees no key: those are 0. Tiles with a mask and without."""
    query, key, value = cases.operands(cases.Case(20, 3 * tile.block_n + 1), tile)  # type: ignore[arg-type]
    query[..., 0], key[..., 0] = 1.0, -math.inf
    got = run_sm90(tile, query, key, value)
    assert got.out.isnan().all() and got.lse is not None and got.lse.isnan().all()


@each_shape
def test_nan_stays_visible(tile: TileSm90) -> None:
    for which in range(3):
        case = Case(20, tile.block_n + 6, heads_q=2, heads_k=2)
        operands = cases.operands(case, tile)  # type: ignore[arg-type]
        operands[which][0, 11, 1, 0] = math.nan  # one element of one head
        out = run_sm90(tile, *operands).out
        assert out[:, :, 1].isnan().any(), f"operand {which}: the NaN got lost"
        assert not out[:, :, 0].isnan().any(), f"operand {which}: the other head saw it"


@pytest.mark.parametrize("dim", (0, 1, 2), ids=("batch", "row", "head"))
def test_offsets_beyond_two_to_the_31(dim: int) -> None:
    """The last element of each operand lies over 2^31 elements behind its first one."""
    tile = bf16_tiles[0]
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
    out = run_sm90(tile, *views).out
    assert torch.equal(out, run_sm90(tile, *(view.contiguous() for view in views)).out)
