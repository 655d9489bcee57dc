# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (each bug is a line of a table)
"""test_emu_nonfinite.py - which blocks of V have an infinity or NaN (pool.cuh) on the emulated GPU,
against torch: calls by chance, and bugs planted in it that they must find."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emu.build import compiler
from emu.rows import CSRC
from emu.run_listed import BLOCK, nonfinite
from nightly import every
from planted import plant

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

SOURCE = "cuda/pool.cuh"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BAD = (math.nan, math.inf, -math.inf)
# fmt: off
BUGS = (
    ("infinity is finite", "any_lane(largest >= 0x7f800000u)", "any_lane(largest > 0x7f800000u)"),
    ("the largest number is not", "any_lane(largest >= 0x7f800000u)", "any_lane(largest >= 0x7f7fffffu)"),
    ("what is large in float16 is not", "any_lane(largest >= 0x7f800000u)", "any_lane(largest >= 0x477fe000u)"),
    ("minus infinity is a small number", "bits &= 0x7fffffffu;", "bits = bits >> 31 ? 0 : bits;"),
    ("a lane says it alone", "any_lane(largest >= 0x7f800000u)", "largest >= 0x7f800000u"),
    ("the last row alone", "largest = bits > largest ? bits : largest;", "largest = bits;"),
    ("the channels of one warp's width", "d < args.head_dim; d += 32", "d < 32; d += 32"),
    ("a channel too many", "d < args.head_dim; d += 32", "d <= args.head_dim; d += 32"),
    ("two of three channels", "for (int d = thread_index() % 32; d <", "for (int d = thread_index() % 22; d <"),
    ("a row too few", "block.end = smaller_int(block.begin + keys, block.end);", "block.end = smaller_int(block.begin + keys - 1, block.end);"),
    ("values behind the real length count", "length_at(args.seqused, sample, args.seqlen)", "args.seqlen"),
    ("the sample's first head", "sample * args.from.batch_stride + block.head % args.heads * args.from.head_stride", "sample * args.from.batch_stride"),
    ("the first sample", "block.at = sample * args.from.batch_stride +", "block.at ="),
    ("the head's first block", "block.begin = block.number % blocks * keys;", "block.begin = 0;"),
    ("a warp too many writes", "if (block.head < args.batch * args.heads)", "if (block.head <= args.batch * args.heads)"),
    ("of a block without keys nothing is said", "if (block.head < args.batch * args.heads)", "if (block.begin < block.end)"),
    ("the place of the head, not of its block", "store_global_b32((int *)args.to + block.number,", "store_global_b32((int *)args.to + block.head,"),
)
# fmt: on


def values(dice: random.Random, batch: int, rows: int, heads: int, head_dim: int) -> Tensor:
    """Amid NaN; with a few numbers that are not finite, and the largest that are."""
    dtype = dice.choice(DTYPES)
    around = torch.full((batch, rows + 2, heads + 1, head_dim + 3), math.nan, dtype=dtype)
    view = around[:, 1:-1, :-1, 2:-1]
    made = torch.Generator().manual_seed(dice.randrange(1 << 30))
    view.copy_(torch.randn(view.shape, generator=made))
    most = torch.finfo(dtype).max
    for _ in range(dice.choice((0, 1, 3, 9)) if view.numel() else 0):
        view[tuple(dice.randrange(n) for n in view.shape)] = dice.choice((*BAD, most, -most))
    return view


def check(number: int, csrc: Path = CSRC) -> None:
    """One call."""
    dice = random.Random(f"nonfinite {number}")
    batch, heads = dice.choice((1, 2, 3)), dice.choice((1, 2, 3))
    head_dim = dice.choice((2, 34, 64, 80, 128))
    seqlen = dice.choice((1, 63, 64, 65, 130, 200))
    value = values(dice, batch, seqlen, heads, head_dim)
    real = [dice.randrange(-2, seqlen + 3) for _ in range(batch)]
    kind = dice.choice((torch.int32, torch.int64, None))
    found = nonfinite(value, None if kind is None else torch.tensor(real, dtype=kind), csrc)
    for b, used in enumerate(real):
        seen = value[b, : seqlen if kind is None else min(max(used, 0), seqlen)]
        bad = (~seen.isfinite()).any(-1)
        blocks = range(0, seqlen, BLOCK)
        want = torch.stack([bad[n : n + BLOCK].any(0) for n in blocks], -1)
        assert torch.equal(found[b], want.int()), (b, real, kind)


@pytest.mark.parametrize("part", range(4))
def test_calls_by_chance(part: int) -> None:
    for number in range(part * 40, part * 40 + 40):
        check(number)


@pytest.mark.parametrize("bug", every(4, BUGS), ids=lambda bug: bug[0])
def test_the_bug_is_found(bug: tuple[str, str, str], tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    plant(CSRC, csrc, SOURCE, *bug[1:])
    with pytest.raises(AssertionError):
        for number in range(80):
            check(number, csrc)
