# SPDX-License-Identifier: Apache-2.0
"""test_emu_qk8_rows.py - attention over 8-bit scores on the emulated GPU: every tile, held against
the definition (qk8_oracle.py) and, where the calls are harmless, against float64.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import oracle
import qk8_oracle
from emu import cases, cases_qk8, qk8
from emu.build import compiler
from emu.rows import TileQk8, tiles_qk8
from emu.run import DTYPES, Schedule
from emu.run_qk8 import packed, run
from nightly import unless

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

CHANCES, PARTS = 72, 3  # cases by chance for each tile, in so many tests
SHORT = ("sm80_qk8_f16_d64_slim", "sm80_qk8_bf16_d128_wide", "sm75_qk8_bf16_d64_turing")


def is_short(tile: TileQk8) -> bool:
    """A tile of each class."""
    return tile.name.removeprefix("sdpa_") in SHORT


def is_first(tile: TileQk8, part: int) -> bool:
    """The first part of its cases, of a tile of each class."""
    return part == 0 and is_short(tile)


@pytest.mark.parametrize("tile", unless(is_short, tiles_qk8()), ids=lambda tile: tile.name)
def test_cases_by_hand(tile: TileQk8) -> None:
    for number, case in enumerate(cases.by_hand(tile)):
        # Which copies land early must not matter: take turns.
        cases_qk8.check(replace(case, schedule=Schedule(number % 3, number)), tile)


@pytest.mark.parametrize(
    ("tile", "part"),
    unless(is_first, ((tile, part) for tile in tiles_qk8() for part in range(PARTS))),
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_cases_by_chance(tile: TileQk8, part: int) -> None:
    for case in cases.by_chance(tile, CHANCES // PARTS, seed=part):
        cases_qk8.check(case, tile)


each_tile = pytest.mark.parametrize(
    "tile", unless(is_short, tiles_qk8()), ids=lambda tile: tile.name
)


def test_there_are_enough_cases() -> None:
    for tile in tiles_qk8():
        assert len(list(cases.by_hand(tile))) + CHANCES >= 150, tile.name


@each_tile
def test_integer_scores_are_the_definitions(tile: TileQk8) -> None:
    """Every integer of 64 rows and keys, read back from lse: under a window of one key it is the
    integer times two factors, where q is orthogonal to K's mean, as in test_qk8.py."""
    half, rows, head_dim = tile.head_dim // 2, 64, tile.head_dim
    made = torch.Generator().manual_seed(head_dim)
    key = torch.randn(1, rows, 1, head_dim, generator=made) * torch.logspace(-1, 1, head_dim)
    key[:, 1::2, :, :half] = -key[:, ::2, :, :half]
    query = torch.randn(1, rows, 1, head_dim, generator=made)
    query[..., half:] = 0.0
    query, key = query.to(DTYPES[tile.dtype]), key.to(DTYPES[tile.dtype])
    value = torch.randn(1, rows, 1, head_dim, generator=made).to(DTYPES[tile.dtype])
    k, q = (oracle.as_float64(x)[0, :, 0].astype(np.float32) for x in (key, query))
    mean = qk8_oracle.mean_of(k)
    k8, k_step = qk8_oracle.quantised(k - mean)
    q8, q_step = qk8_oracle.quantised(q)
    want = q8 @ k8.T
    assert np.abs(want).max() > 10000
    factor = q_step.astype(np.float64) * head_dim**-0.5 / head_dim
    for shift in range(0, rows, 7):
        got = run(tile, query.roll(shift, 1), key, value, window=(0, 0))
        # Scaled, a value of f16 may be subnormal and lose bits.
        torch.testing.assert_close(got.out, value, rtol=0.0, atol=2.0**-22)
        assert got.lse is not None
        at, n = (np.arange(rows) - shift) % rows, np.arange(rows)
        # float32 holds such an lse with room for a tenth of one integer.
        integers = got.lse[0, 0].double().numpy() / (factor[at] * k_step[n].astype(np.float64))
        assert np.abs(integers - want[at, n]).max() <= 0.1


@each_tile
def test_the_whole_chain_and_the_error(tile: TileQk8) -> None:
    """The passes make what the kernel reads; the result is 1.1 % from float64's."""
    case = cases.Case(tile.block_m + 3, 300, 1, 2, 1)
    query, key, value = cases.operands(case, tile)
    got = run(tile, query, key, value, integers=qk8.quantised)
    cases_qk8.check_result(tile, got, query, key, value)
    want, _ = oracle.attention(query, key, value)
    error = oracle.as_float64(got.out) - want
    assert np.linalg.norm(error) <= 0.011 * np.linalg.norm(want)
    known, made = packed(query, key), qk8.quantised(query, key)
    steps = [qk8.split_tile(x.keys, tile.head_dim) for x in (known, made)]
    assert torch.equal(steps[0][0], steps[1][0]) and torch.equal(steps[0][1], steps[1][1])


@each_tile
def test_one_key_gives_exactly_its_value(tile: TileQk8) -> None:
    cases.check_one_key(tile, run)


@each_tile
def test_no_schedule_changes_a_bit(tile: TileQk8) -> None:
    cases.check_schedules(tile, run)


@each_tile
def test_what_is_not_finite_stays_visible(tile: TileQk8) -> None:
    """A bad key makes NaN of who sees it, and of no other row; a bad query of itself."""
    for bad in (math.nan, math.inf, -math.inf):
        query, key, value = cases.operands(cases.Case(90, 90, heads_q=2, heads_k=2), tile)
        key[0, 40, 1, 3] = bad
        query[0, 5, 0, 7] = bad
        got = run(tile, query, key, value, is_causal=True)
        cases_qk8.check_result(tile, got, query, key, value, is_causal=True)
        rows = got.out[0].isnan().all(dim=2)
        assert rows[40:, 1].all() and not rows[:40, 1].any()
        assert rows[:, 0].nonzero().flatten().tolist() == [5]
        value[0, 3, 0, 9] = bad
        assert not run(tile, query, key, value).out[0, :, 0].isfinite().all()


@each_tile
def test_a_bad_value_stays_in_its_channel(tile: TileQk8) -> None:
    """In every place of the pipeline, a key of the first tile being far ahead: what is not finite
    has gone through maxima, rescaling and parts of sums. All other channels keep their bits."""
    n = tile.block_n
    places = ((3 * n + 9, 3 * n + 8), (2 * n, n), (2 * n, 7), (n - 5, n - 6))
    for bad, (seqlen_k, at) in zip((math.nan, math.inf, -math.inf, math.nan), places, strict=True):
        case = cases.Case(tile.block_m + 5, seqlen_k, 1, 2, 1)
        query, key, value = cases.operands(case, tile)
        key[0, 5] *= 4.0
        spoilt = value.clone()
        spoilt[0, at, 0, 3] = bad
        cases_qk8.check_result(tile, run(tile, query, key, spoilt), query, key, spoilt)
        masks: tuple[dict[str, Any], ...] = ({}, {"is_causal": True}, {"window": (n, n // 2)})
        for mask in masks:
            got, want = (run(tile, query, key, v, **mask) for v in (spoilt, value))
            assert got.lse is not None and want.lse is not None
            assert torch.equal(got.lse, want.lse)
            got.out[..., 3] = want.out[..., 3]
            assert torch.equal(got.out, want.out)


@each_tile
def test_sums_of_the_largest_weights_and_values_do_not_overflow(tile: TileQk8) -> None:
    cases_qk8.check_largest_sums(tile)


@each_tile
def test_values_of_every_size(tile: TileQk8) -> None:
    """Sums of P V in f16 must neither overflow nor vanish: V comes scaled."""
    for factor in (1e-30, 1e-3, 3e2, 6e4, 1e30):
        if tile.dtype == "F16" and not 1e-4 < factor < 1e3:
            continue
        query, key, value = cases.operands(cases.Case(20, 200, values="peaky"), tile)
        value = (value.float().sign() * factor).to(value.dtype)
        got = run(tile, query, key, value)
        assert got.out.isfinite().all()
        cases_qk8.check_result(tile, got, query, key, value)
