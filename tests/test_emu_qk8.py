# SPDX-License-Identifier: Apache-2.0
"""test_emu_qk8.py - q and k in INT8 on the emulated GPU: the passes (qk8.cuh), bit by bit."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from emu import cases, qk8
from emu.build import compiler
from emu.run import DTYPES

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

FLOATS = (torch.float32, *DTYPES.values())
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def operands(
    seqlen_q: int, seqlen_k: int, dtype: torch.dtype, head_dim: int = 128, **shape: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads_q, heads_k = (shape.get(n, 1) for n in ("batch", "heads_q", "heads_k"))
    made = torch.Generator().manual_seed(seqlen_q * 1000 + seqlen_k)
    query = torch.randn(batch, seqlen_q, heads_q, head_dim, generator=made)
    key = torch.randn(batch, seqlen_k, heads_k, head_dim, generator=made)
    key = key * torch.logspace(-1, 1, head_dim) + 3.0
    return query.to(dtype), key.to(dtype)


@each_dtype
@pytest.mark.parametrize("head_dim", (64, 128))
def test_integers_steps_and_means_are_the_definitions(head_dim: int, dtype: torch.dtype) -> None:
    for seqlen_q, seqlen_k in ((1, 1), (5, 63), (3, 64), (2, 65), (7, 129), (1, 200)):
        query, key = operands(seqlen_q, seqlen_k, dtype, head_dim, heads_q=2)
        qk8.check_integers(query, key)
        qk8.check_integers(query, key, scale=-0.3, wants_lse=False)


@each_dtype
def test_lengths_heads_and_views(dtype: torch.dtype) -> None:
    """Real lengths of every kind, grouped heads, and operands at odd addresses amid NaN."""
    for lens in ([70, 3], [0, 64], [1, 0], [99, -4]):
        query, key = operands(9, 70, dtype, batch=2, heads_q=4, heads_k=2)
        for kind in (torch.int32, torch.int64):
            real = {"q_lens": torch.tensor([4, 9], dtype=kind)}
            real["k_lens"] = torch.tensor(lens, dtype=kind)
            qk8.check_integers(query, key, **real)
    around = torch.full((2, 80, 3, 141), math.nan, dtype=dtype)
    key = around[:, 5:75, :2, 3:131].copy_(key)
    qk8.check_integers(around[:, 2:11, 2:, 13:].copy_(query[:, :, :1]), key[:, :, :1])


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_bad_number_spoils_its_own_row_alone(bad: float) -> None:
    query, key = operands(6, 70, torch.bfloat16)
    query[0, 2, 0, 5], key[0, 9, 0, 64], key[0, 69, 0, 0] = bad, bad, bad
    got = qk8.check_integers(query, key)
    assert got.rows[0, 0, :, 0].isnan().nonzero().flatten().tolist() == [2]
    steps = qk8.split_tile(got.keys[0, 0], 128)[1].flatten()[:70]
    assert steps.isnan().nonzero().flatten().tolist() == [9, 69]


def test_rows_too_small_or_too_large() -> None:
    """Zeros, subnormal numbers, the largest of each dtype; sums that overflow."""
    for dtype, factors in (
        (torch.float32, (0.0, 1e-42, 1e-35, 1e-30, 1e37, 3e38)),
        (torch.bfloat16, (0.0, 1e-40, 1e37)),
        (torch.float16, (1e-7, 1e4)),
    ):
        for factor in factors:
            query, key = operands(5, 66, dtype, 64)
            qk8.check_integers((query.float().sign() * factor).to(dtype), key)
            qk8.check_integers(query, (key.float().sign() * factor).to(dtype), scale=1e-3)
            qk8.check_integers(query, key, scale=factor)


def test_ties_are_rounded_to_even() -> None:
    """Every second number of a row lies half way between two integers."""
    head_dim = 64
    query = torch.zeros(1, 40, 1, head_dim)
    # One channel alone is rotated into a row of equal magnitudes; two, into sums and differences.
    query[..., 0] = 127.0
    for row in range(40):
        query[0, row, 0, row + 1] = row + 0.5
    qk8.check_integers(query, query.clone())
    false = qk8.false_ties(head_dim)
    assert false.shape[1] >= 1
    qk8.check_integers(false, query)


def by_chance(count: int, seed: int) -> Iterator[cases.Case]:
    dice = random.Random(f"qk8 {seed}")
    for _ in range(count):
        batch, heads_k = dice.choice(((1, 1), (2, 1), (1, 2)))
        case = cases.Case(
            *(dice.randrange(1, 20), dice.randrange(1, 200), batch),
            *(heads_k * dice.choice((1, 2)), heads_k),
        )
        lens = tuple(dice.randrange(case.seqlen_k + 1) for _ in range(batch))
        yield replace(
            case,
            k_lens=dice.choice((None, lens)),
            scale=dice.choice((None, -0.1, 2.0)),
            layout=dice.choice(("contiguous", "heads first", "surrounded", "fused")),
            q_is_f32=dice.random() < 0.3,
            values=dice.choice(cases.VALUES),
        )


@pytest.mark.parametrize("seed", range(4))
def test_by_chance(seed: int) -> None:
    from emu.rows import tiles

    tile = next(t for t in tiles() if t.head_dim == (64, 128)[seed % 2])
    for case in by_chance(20, seed):
        query, key, _ = cases.operands(case, tile)
        call = {n: x for n, x in case.call().items() if n in ("q_lens", "k_lens", "scale")}
        qk8.check_integers(query, key, **call)
