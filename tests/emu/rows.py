# SPDX-License-Identifier: Apache-2.0
"""rows.py - the kernels of sdpa_rows.def as the package reads them, and what the emulator adds."""

from __future__ import annotations

from typing import overload

from wan_attn.cuda import sources
from wan_attn.cuda.rows import (
    Helper,
    Job,
    RopeKernel,
    Tile,
    TileBackward,
    TileListed,
    TileListedQk8,
    TileQk8,
    TileSm90,
    gpus,
    half_rate,
    helpers,
    rope_kernels,
    tiles,
    tiles_backward,
    tiles_backward_for,
    tiles_for,
    tiles_listed,
    tiles_listed_for,
    tiles_listed_qk8,
    tiles_listed_qk8_for,
    tiles_qk8,
    tiles_qk8_for,
    tiles_sm90,
)

__all__ = [
    "CSRC",
    "Helper",
    "Job",
    "RopeKernel",
    "Tile",
    "TileBackward",
    "TileListed",
    "TileListedQk8",
    "TileQk8",
    "TileSm90",
    "dense_of",
    "emulated_arch",
    "gpus",
    "half_rate",
    "helpers",
    "rope_kernels",
    "tiles",
    "tiles_backward",
    "tiles_backward_for",
    "tiles_for",
    "tiles_listed",
    "tiles_listed_for",
    "tiles_listed_qk8",
    "tiles_listed_qk8_for",
    "tiles_qk8",
    "tiles_qk8_for",
    "tiles_sm90",
]

CSRC = sources.root()


@overload
def dense_of(tile: TileListedQk8) -> TileQk8: ...
@overload
def dense_of(tile: TileListed) -> Tile: ...
def dense_of(tile: TileListed) -> Tile:
    """The same tile without lists of blocks."""
    name = tile.name.replace("_listed", "")
    return next(dense for dense in (*tiles(), *tiles_qk8()) if dense.name == name)


def emulated_arch(kernel: Tile | Helper | TileBackward | TileSm90 | RopeKernel) -> int:
    """Whose instructions the emulator offers; all from sm_80 on are alike to most kernels."""
    if isinstance(kernel, TileSm90):
        return 90
    return 75 if getattr(kernel, "gpu_class", "") == "TURING" else 80
