# SPDX-License-Identifier: Apache-2.0
"""rows_sm90.py - the TILE_SM90 lines of csrc/cuda/sdpa_rows.def, and which of them a call gets."""

from __future__ import annotations

from wan_attn.cuda.rows import TileSm90, tiles_sm90

__all__ = ["ARCH", "TileSm90", "tile_for", "tiles_sm90"]

ARCH = 90


def tile_for(symbol: str, *, is_masked: bool, seqlen_q: int) -> TileSm90:
    """The tile that a call gets, of those that make this kernel: the loader's rule."""
    uses = ("MASKED", "ANY") if is_masked else ("ANY",)
    mine = (t for t in tiles_sm90() if t.symbol == symbol and t.use in uses)
    return next(tile for tile in mine if seqlen_q >= tile.from_q)
