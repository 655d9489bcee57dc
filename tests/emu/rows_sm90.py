# SPDX-License-Identifier: Apache-2.0
"""rows_sm90.py - the TILE_SM90 lines of csrc/cuda/sdpa_rows.def, and which of them a call gets."""

from __future__ import annotations

from wan_attn.cuda.rows import TileSm90, tiles_sm90

__all__ = ["ARCH", "TileSm90", "tile_for", "tiles_sm90"]

ARCH = 90


def tile_for(row: str, *, is_masked: bool, seqlen_q: int) -> TileSm90:
    """The line of the row that a call gets: the loader's rule."""
    uses = ("MASKED", "ANY") if is_masked else ("ANY",)
    fits = (t for t in tiles_sm90() if t.row == row and t.use in uses and seqlen_q >= t.from_q)
    return next(fits)
