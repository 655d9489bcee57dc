# SPDX-License-Identifier: Apache-2.0
"""test_emu_skip.py - a skip_threshold in kernels that take lists of blocks, on the emulated GPU:
every tile, held against float64 (cases_skip.py), and against calls that leave nothing out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from emu import cases_skip, checks_skip
from emu.build import compiler
from emu.cases_skip import Told
from emu.rows import TileListed, tiles_listed
from emu.run import Schedule
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


@pytest.mark.parametrize("check", checks_skip.ALL, ids=lambda check: check.__name__)
@each_tile
def test_calls_of_which_all_is_known(tile: TileListed, check: Callable[..., None]) -> None:
    check(tile)


def test_calls_by_chance_leave_something_out() -> None:
    """Of calls by chance a fourth leave out something."""
    tile = next(filter(is_short, tiles_listed()))
    found: list[Told] = [
        cases_skip.check(case, skip, tile) for case, skip in cases_skip.by_chance(tile, 20, seed=99)
    ]
    assert sum(one.left_out > 0 for one in found) >= 5
