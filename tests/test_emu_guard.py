# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (each bug is a line of a table)
"""test_emu_guard.py - a GPU's guard (guard.cuh) on the emulated GPU, against numpy: calls by chance,
and bugs planted in it that they must find."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from emu.args import GuardArgs
from emu.build import compiler, library
from emu.qk8 import NUMBER
from emu.rows import CSRC, helpers
from emu.run import Memory, Schedule, _lengths, _view, launch
from nightly import every
from planted import plant

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

SOURCE, ROWS = "cuda/guard.cuh", 64
BAD = (math.nan, math.inf, -math.inf)
# fmt: off
BUGS = (
    ("values behind the real length count", "length_at(args.seqused_k, l.sample, args.seqlen_k)", "args.seqlen_k"),
    ("a warp too many looks", "if (l.sample < args.batch)", "if (l.sample <= args.batch)"),
    ("infinity is finite", "size >= 0x7f800000u", "size > 0x7f800000u"),
    ("a sign makes a value large", "bits_from_float(x) & 0x7fffffffu", "bits_from_float(x)"),
    ("a lane counts alone", "nonfinite += shfl_xor_bits(nonfinite, lane_mask);", ""),
    ("the largest of a lane", "largest = other > largest ? other : largest;", ""),
    ("a full count begins again", "raise_global_u32(at, 0xffffffffu)", "raise_global_u32(at, 0u)"),
    ("out counts as a value", "if (!l.is_out && largest)", "if (largest)"),
    ("a row too few", "l.end = smaller_int(l.begin + rows, l.end);", "l.end = smaller_int(l.begin + rows - 1, l.end);"),
    ("the first block alone", "l.begin = at % blocks * rows;", "l.begin = 0 * rows;"),
    ("heads of the other operand", "l.head = at / blocks;", "l.head = 0 * blocks;"),
    ("values and results swapped", "l.is_out ? NONFINITE_RESULTS : NONFINITE_VALUES", "l.is_out ? NONFINITE_VALUES : NONFINITE_RESULTS"),
    ("the dtype of v for out", "l.dtype = l.is_out ? args.out_dtype : args.v_dtype;", "l.dtype = args.v_dtype;"),
)
# fmt: on


def operand(dice: random.Random, batch: int, rows: int, heads: int, head_dim: int) -> Tensor:
    """Amid NaN, with a few numbers that are not finite."""
    around = torch.full((batch, rows + 2, heads + 1, head_dim + 3), math.nan)
    made = torch.Generator().manual_seed(dice.randrange(1 << 30))
    around[:, 1:-1, :-1, 2:-1] = torch.randn(batch, rows, heads, head_dim, generator=made)
    view = around.to(dice.choice(list(NUMBER)))[:, 1:-1, :-1, 2:-1]
    for _ in range(dice.choice((0, 0, 1, 40)) if view.numel() else 0):
        view[tuple(dice.randrange(n) for n in view.shape)] = dice.choice((*BAD, 1e4, -3e4))
    return view


def check(number: int, csrc: Path = CSRC) -> None:
    """One call, twice, with the same guard."""
    dice = random.Random(f"guard {number}")
    batch, heads_k, head_dim = (
        dice.choice((1, 2, 3)),
        dice.choice((1, 2)),
        dice.choice((48, 64, 80)),
    )
    seqlen_q, seqlen_k = (dice.choice((1, 3, 63, 64, 65, 130)) for _ in range(2))
    seqlen_k *= dice.random() < 0.9
    heads_q = heads_k * dice.choice((1, 2))
    out = operand(dice, batch, seqlen_q, heads_q, head_dim)
    value = operand(dice, batch, seqlen_k, heads_k, head_dim)
    real = [dice.randrange(-2, seqlen_k + 3) for _ in range(batch)]
    kind = dice.choice((torch.int32, torch.int64, None))
    lens = None if kind is None else torch.tensor(real, dtype=kind)
    before = [0, 7, dice.choice((0, 5, -2, -1)), dice.choice((0, 9, -3))]
    words, memory = torch.tensor(before, dtype=torch.int32), Memory()
    v, o, words = memory.add("v", value), memory.add("out", out), memory.add("guard", words, 1)
    args = GuardArgs(
        *(_view(v), _view(o), _lengths(memory.maybe("lens", lens)), words.data_ptr()),
        *(batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim),
        *(NUMBER[value.dtype], NUMBER[out.dtype]),
    )
    warps = batch * sum(h * -(-n // ROWS) for h, n in ((heads_q, seqlen_q), (heads_k, seqlen_k)))
    used = [seqlen_k if kind is None else min(max(n, 0), seqlen_k) for n in real]
    seen = np.concatenate([value[b, :n].float().numpy().ravel() for b, n in enumerate(used)])
    counts = [int((~np.isfinite(x)).sum()) for x in (seen, out.float().numpy())]
    largest = float(np.abs(seen).max(initial=0.0))
    for times in (1, 2):
        kernel = library(helpers()["wan_attn_watch"], csrc)
        launch(kernel, args, -(-warps // 4), memory.tensors, Schedule(seed=number))
        want = [
            min((old % 2**32) + times * n, 2**32 - 1)
            for old, n in zip(before[2:], counts, strict=True)
        ]
        np.testing.assert_equal(words[:1].view(torch.float32).item(), largest)
        assert words[1].item() == before[1], "nothing is ever clipped"
        assert [n % 2**32 for n in words[2:].tolist()] == want


@pytest.mark.parametrize("part", range(4))
def test_calls_by_chance(part: int) -> None:
    for number in range(part * 40, part * 40 + 40):
        check(number)


@pytest.mark.parametrize("bug", every(4, BUGS), ids=lambda bug: bug[0])
def test_the_bug_is_found(bug: tuple[str, str, str], tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    plant(CSRC, csrc, SOURCE, *bug[1:])
    with pytest.raises(AssertionError):
        for number in range(40):
            check(number, csrc)
