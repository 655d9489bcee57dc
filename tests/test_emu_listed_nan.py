# SPDX-License-Identifier: Apache-2.0
"""test_emu_listed_nan.py - a NaN or infinity in V, in a block that is not listed: its mean reaches
the rows that count it, and none of a block of rows that sees nothing of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blocks_oracle import BLOCK, Lists
from emu import cases, run_listed
from emu.build import compiler
from emu.cases_listed import as_tensors
from emu.rows import CSRC, TileListed, tiles_listed
from nightly import unless
from planted import Bug
from test_emu_listed import is_short

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

# Keys that a row sees: how far before and behind its own.
MASKS: tuple[tuple[dict[str, Any], int, int], ...] = (
    ({"is_causal": True}, 1 << 20, 0),
    ({"window": (200, 70)}, 200, 70),
    ({"window": (130, 0)}, 130, 0),
    ({}, 1 << 20, 1 << 20),
)
SEQLEN_Q, SEQLEN_K = 5 * BLOCK + 9, 6 * BLOCK + 30
MEANS, KERNEL = "cuda/tile/means.cuh", "cuda/sdpa_sm80.cuh"


def seen(before: int, behind: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    distance = np.arange(SEQLEN_K) - (np.arange(SEQLEN_Q)[:, None] + SEQLEN_K - SEQLEN_Q)
    return np.asarray((distance >= -before) & (distance <= behind))


def check(tile: TileListed, value: float, csrc: Path = CSRC) -> None:
    """Every block of keys in turn, where no list names it and where one of two blocks of queries
    does."""
    case = cases.Case(SEQLEN_Q, SEQLEN_K)
    q, k, v = cases.operands(case, tile)
    blocks = (-(-SEQLEN_Q // BLOCK), -(-SEQLEN_K // BLOCK))
    for call, before, behind in MASKS:
        visible = seen(before, behind)
        for at in range(blocks[1]):
            named = np.random.default_rng(at).random((1, 1, *blocks)) < 0.4
            named[..., at] = np.arange(blocks[0]) % 2 == 1 if at % 2 else False
            counts, indices = as_tensors(Lists(named), "roomy")
            how: dict[str, Any] = {"counts": counts, "indices": indices, "pools_others": True}
            how |= {"csrc": csrc, **call}
            mine = slice(at * BLOCK, min((at + 1) * BLOCK, SEQLEN_K))
            clean = v.clone()
            clean[0, mine, 0, 3] = 0.0
            want = run_listed.run(tile, q, k, clean, **how)
            bad = clean.clone()
            bad[0, mine.stop - 1, 0, 3] = value
            got = run_listed.run(tile, q, k, bad, **how)
            assert want.lse is not None and got.lse is not None
            assert torch.equal(got.lse, want.lse), "lse is no matter of V"
            for row in range(0, SEQLEN_Q, tile.block_m):
                rows = slice(row, min(row + tile.block_m, SEQLEN_Q))
                outs = got.out[0, rows, 0], want.out[0, rows, 0]
                if not visible[rows, mine].any():
                    assert torch.equal(*outs), f"{call} block {at} reaches rows from {row} on"
                others = torch.arange(tile.head_dim) != 3
                assert torch.equal(outs[0][:, others], outs[1][:, others])
                of_row = np.arange(rows.start, rows.stop) // BLOCK
                counted = visible[rows, mine].all(1) & ~named[0, 0, of_row, at]
                finite = outs[0][torch.from_numpy(counted), 3].isfinite()
                assert not finite.any(), f"{call} block {at} is lost to rows from {row} on"


@pytest.mark.parametrize(
    "tile", unless(is_short, tiles_listed()), ids=lambda tile: tile.name.removeprefix("sdpa_")
)
def test_it_reaches_who_counts_it_and_nobody_far_from_it(tile: TileListed) -> None:
    for value in (math.nan, -math.inf):
        check(tile, value)


BUGS = (
    Bug(
        "all means are read",
        KERNEL,
        "v_rows = seen_means(args, bounds.num_keys, bounds.diagonal);",
        "v_rows.end = blocks_of(bounds.num_keys);",
    ),
    Bug("means before the window are read", KERNEL, "v_rows.begin - n * BLOCK_N : 0", "0 : 0"),
    Bug(
        "the first row ends it",
        MEANS,
        "visible_keys(args, diagonal + BLOCK_M - 1, num_keys)",
        "visible_keys(args, diagonal, num_keys)",
    ),
    Bug(
        "one block more",
        MEANS,
        "whole_blocks(bottom, num_keys).end}",
        "whole_blocks(bottom, num_keys).end + 1}",
    ),
    Bug(
        "one block fewer",
        MEANS,
        "return {whole_blocks(top, num_keys).begin,",
        "return {whole_blocks(top, num_keys).begin + 1,",
    ),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    csrc = bug.plant(CSRC, tmp_path)
    tile = next(tile for tile in tiles_listed() if "listed_f16_d64_slim" in tile.name)
    with pytest.raises(AssertionError):
        check(tile, math.nan, csrc)
