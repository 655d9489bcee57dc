# SPDX-License-Identifier: Apache-2.0
"""test_emu_turing.py - bf16 tensors on Turing, which multiplies f16 only: nothing is lost by that.

f16 has more bits and a far smaller range, so that everything depends on the powers of two that the
operands are scaled by. Held against the same row on newer cards, whose products are bf16, with
numbers that f16 does not have.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracle
from emu.build import compiler
from emu.rows import Tile, tiles
from emu.run import run

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

SLIM = {tile.symbol: tile for tile in tiles() if tile.gpu_class == "SLIM"}
ON_TURING = [tile for tile in tiles() if tile.bf16_as_f16]
D128 = next(tile for tile in ON_TURING if tile.head_dim == 128)
each_tile = pytest.mark.parametrize("tile", ON_TURING, ids=lambda tile: tile.name)

KINDS = (
    *("normal", "peaky", "rows of all sizes", "a channel of Q is huge, of K tiny"),
    *("Q huge, K tiny", "Q tiny, K huge", "heads of all sizes", "V biased", "V beyond f16"),
    *("V tiny", "V the largest", "V the smallest", "Q zero"),
)


def operands(kind: str, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bf16: scores of usual size, from numbers that f16 does not have."""
    query, key, value = (torch.randn(1, n, 2, head_dim) for n in (40, 150, 150))
    sizes = torch.exp2(torch.linspace(-90.0, 3.0, 40))[:, None, None]
    if kind == "peaky":
        query *= 4.0
    elif kind == "rows of all sizes":
        query *= sizes
    elif kind == "a channel of Q is huge, of K tiny":
        query[..., 5] *= 2.0**12
        key[..., 5] *= 2.0**-12
    elif kind == "Q huge, K tiny":
        query, key = query * 2.0**100, key * 2.0**-100
    elif kind == "Q tiny, K huge":
        query, key = query * 2.0**-110, key * 2.0**110
    elif kind == "heads of all sizes":
        key[:, :, 0], key[:, :, 1] = key[:, :, 0] * 2.0**-60, key[:, :, 1] * 2.0**60
        query[:, :, 0], query[:, :, 1] = query[:, :, 0] * 2.0**60, query[:, :, 1] * 2.0**-60
        value[:, :, 0] *= 2.0**70
    elif kind == "V biased":
        value += 4.0
    elif kind == "V beyond f16":
        value *= 1e20
    elif kind == "V tiny":
        value *= 1e-30
    elif kind == "V the largest":
        value = value.sign() * 3.3e38
    elif kind == "V the smallest":
        value *= 2.0**-124
    elif kind == "Q zero":
        query.zero_()
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def error(tile: Tile, query: Tensor, key: Tensor, value: Tensor) -> float:
    """Relative root mean square, in float32 output: the rounding of the output would hide it."""
    got = run(tile, query.float(), key, value).out.double()
    want = torch.from_numpy(oracle.attention(query, key, value)[0])
    largest = want.abs().max().clamp(min=1e-300)
    got, want = got / largest, want / largest  # their squares must be finite
    return float((got - want).square().sum().sqrt() / want.square().sum().sqrt())


@each_tile
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_at_or_below_that_of_bf16_products(kind: str, tile: Tile) -> None:
    numbers = operands(kind, tile.head_dim)
    plain = SLIM[tile.symbol.replace("sm75", "sm80")]
    ours, theirs = error(tile, *numbers), error(plain, *numbers)
    print(f"{kind:34} {ours:.3e} {theirs:.3e}")
    assert ours < 1e-3
    assert ours <= theirs or not math.isfinite(theirs)


@each_tile
def test_the_output_is_rounded_to_nearest(tile: Tile) -> None:
    query, key, value = operands("normal", tile.head_dim)
    exact = run(tile, query.float(), key, value).out
    assert torch.equal(run(tile, query, key, value).out, exact.bfloat16())


@pytest.mark.parametrize("sign", (1.0, -1.0))
@pytest.mark.parametrize("poison", (math.nan, math.inf))
def test_what_is_not_finite_in_v_stays_so(poison: float, sign: float) -> None:
    query, key, value = operands("normal", 128)
    value[0, 77, 1, 7] = sign * poison
    out = run(D128, query, key, value).out
    hit = out[:, :, 1, 7]
    assert hit.isnan().all() if math.isnan(poison) else (hit == sign * poison).all()
    assert out[:, :, 0].isfinite().all() and out[:, :, 1, :7].isfinite().all()


@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("which", (0, 1))
def test_what_is_not_finite_in_q_or_k_makes_nan(which: int, poison: float) -> None:
    """As in any kernel: an infinite score less an infinite maximum. In Q only its own row."""
    numbers = operands("normal", 128)
    numbers[which][0, 9, 1, 3] = poison
    out = run(D128, *numbers).out
    assert out[:, :, 0].isfinite().all()
    rows = out[0, :, 1].isnan().all(dim=1)
    plain = run(SLIM["sdpa_sm80_bf16_d128"], *numbers).out[0, :, 1].isnan().all(dim=1)
    assert rows.any() and torch.equal(rows, plain)


def test_scores_beyond_f32_are_as_visible_as_elsewhere() -> None:
    query, key, value = operands("normal", 128)
    out = run(D128, query * 2.0**100, key * 2.0**100, value).out
    assert out.isnan().all()


@pytest.mark.parametrize(
    "tile", [*ON_TURING, SLIM["sdpa_sm80_pv16_bf16_d128"]], ids=lambda tile: tile.name
)
def test_every_head_of_every_sample_has_its_own_scale(tile: Tile) -> None:
    """Powers of two that cancel in the scores, and come out again from V: not a bit changes."""
    query, key, value = (
        torch.randn(2, n, h, tile.head_dim) for n, h in ((20, 4), (70, 2), (70, 2))
    )
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    size = torch.exp2(torch.tensor([[-50.0, 3.0], [17.0, 60.0]]))[:, None, :, None].bfloat16()
    per_query_head = size.repeat_interleave(2, dim=2)
    plain = run(tile, query, key, value).out
    scaled = run(tile, query / per_query_head, key * size, value / size).out
    assert torch.equal(scaled * per_query_head, plain)
