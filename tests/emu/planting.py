# SPDX-License-Identifier: Apache-2.0
"""planting.py - planted bugs of kernels, each with a tile that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

import planted
from emu.rows import CSRC, Tile
from emu.run import Schedule

AnyTile = TypeVar("AnyTile", bound=Tile)


@dataclass(frozen=True)
class Bug(planted.Bug):
    """tile: the name of the one that shows it."""

    tile: str = "sdpa_sm80_listed_f16_d64_slim"


def named(tiles: Iterable[AnyTile], name: str) -> AnyTile:
    return next(tile for tile in tiles if tile.name == name)


def must_be_found(bug: planted.Bug, check: Callable[..., None], folder: Path) -> None:
    """`check` must fail, whether copies land at once or as late as they may."""
    csrc = bug.plant(CSRC, folder)
    for landing in range(2):
        with pytest.raises(AssertionError):
            check(csrc=csrc, schedule=Schedule(landing, landing))
