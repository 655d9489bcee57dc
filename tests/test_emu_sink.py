# SPDX-License-Identifier: Apache-2.0
"""test_emu_sink.py - one key has nearly all of a row's weight and a V of 0 (an attention sink).

The result then is what the other keys bring, each with a weight that f16 does not hold, unless
weights are scaled (P_SHIFT). In float32 output, so that its rounding hides nothing.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracle
from emu.build import compiler
from emu.rows import Tile, tiles
from emu.rows_sm90 import TileSm90, tiles_sm90
from emu.run import run
from emu.run_sm90 import run_sm90

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

KEYS = 600
# With a cluster or without, weights are the same.
HOPPER = {(t.symbol, t.block_n): t for t in tiles_sm90() if t.head_dim != 256}


def operands(tile: Tile | TileSm90, at: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the others are about 0, that of key `at` is 27 above them in base 2."""
    made = torch.Generator().manual_seed(at)
    sizes = (40, KEYS, KEYS)
    query, key, value = (torch.randn(1, n, 1, tile.head_dim, generator=made) for n in sizes)
    query[..., 0] = 1.0
    key[..., 0] = 0.0
    key[:, at] = 0.0
    key[:, at, :, 0] = 27.0 * math.log(2.0) * tile.head_dim**0.5
    value[:, at] = 0.0
    dtype = torch.bfloat16 if tile.dtype == "BF16" else torch.float16
    return query.to(dtype), key.to(dtype), value.to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float(((got - want).square().sum() / want.square().sum()).sqrt())


def bound(tile: Tile | TileSm90) -> float:
    """f16 weights of 2^-27 have eleven bits after 2^13, and seven after pv16's 2^9."""
    if getattr(tile, "pv_sum_f16", 0):
        return 2e-2
    return 3e-3 if tile.dtype == "BF16" and not getattr(tile, "bf16_as_f16", 0) else 1e-3


@pytest.mark.parametrize("at", (0, KEYS - 1), ids=("first", "last"))
@pytest.mark.parametrize("tile", [*tiles(), *HOPPER.values()], ids=lambda tile: tile.name)
def test_what_is_left_beside_the_sink(tile: Tile | TileSm90, at: int) -> None:
    query, key, value = operands(tile, at)
    want, want_lse = (torch.from_numpy(x) for x in oracle.attention(query, key, value))
    if isinstance(tile, TileSm90):
        result = run_sm90(tile, query, key, value, out=torch.full(query.shape, math.nan))
    else:
        result = run(tile, query.float(), key, value)
    assert result.lse is not None
    found = error(result.out.double(), want)
    print(f"{tile.name:34} {found:.1e}")
    assert found < bound(tile)
    torch.testing.assert_close(result.lse.double(), want_lse, rtol=2e-6, atol=2e-6)
