# SPDX-License-Identifier: Apache-2.0
"""test_emu_pv16.py - the rows that sum P V in f16 are exact: no worse than bf16 with f32 sums.

Error against float64 in float32 output, so that the rounding of the output hides nothing. The
emulated tensor core rounds an f16 sum to nearest every 16 products; what a real one does between
them only a GPU can tell.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracle
from emu.build import compiler
from emu.rows import Tile, tiles
from emu.run import LIMIT_SUM_F16, run, scaled

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

SLIM = {tile.symbol: tile for tile in tiles() if tile.gpu_class == "SLIM"}
PV16, PLAIN = SLIM["sdpa_sm80_pv16_bf16_d128"], SLIM["sdpa_sm80_bf16_d128"]


def normal(seqlen_q: int = 64, seqlen_k: int = 700) -> list[Tensor]:
    return [torch.randn(1, n, 1, PV16.head_dim) for n in (seqlen_q, seqlen_k, seqlen_k)]


def changed(which: str) -> list[Tensor]:
    query, key, value = normal()
    if which == "peaky":
        query *= 3.0
    elif which == "K with a bias":
        key += 3.0 * torch.randn(1, 1, 1, key.shape[3])
    elif which == "V with a bias":
        value += 4.0
    elif which == "V with an outlier channel":
        value[..., 5] *= 100.0
    elif which == "V with outliers":
        value[torch.rand(value.shape) < 0.001] *= 300.0
    elif which == "V near the limit of f16":
        value = 60000.0 * value.sign() * (1.0 - 0.1 * torch.rand(value.shape))
    elif which == "V beyond f16":
        value *= 1e20
    elif which == "V tiny":
        value *= 1e-20
    elif which == "every V the largest":
        value = torch.full_like(value, 60000.0)
    return [query, key, value]


KINDS = (
    *("normal", "peaky", "K with a bias", "V with a bias", "V with an outlier channel"),
    *("V with outliers", "V near the limit of f16", "V beyond f16", "V tiny"),
    "every V the largest",
)


def errors(tile: Tile, query: Tensor, key: Tensor, value: Tensor) -> tuple[float, float]:
    """Relative root mean square and largest absolute error."""
    want, _ = oracle.attention(query, key, value)
    got = run(tile, query, key, value).out.double().numpy()
    error = got - want
    return float((error**2).sum() ** 0.5 / (want**2).sum() ** 0.5), float(abs(error).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_at_or_below_that_of_bf16_with_f32_sums(kind: str) -> None:
    for _ in range(3):
        query, key, value = (x.bfloat16() for x in changed(kind))
        query = query.float()
        rms, largest = errors(PV16, query, key, value)
        plain_rms, plain_largest = errors(PLAIN, query, key, value)
        print(f"{kind:26} rms {rms:.3e} {plain_rms:.3e}  largest {largest:.3e} {plain_largest:.3e}")
        assert rms <= plain_rms
        assert largest <= plain_largest


@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
def test_what_is_not_finite_stays_so(poison: float) -> None:
    query, key, value = (x.bfloat16() for x in normal())
    value[0, 300, 0, 7] = poison
    out = run(PV16, query, key, value).out
    assert (out[..., 7] == poison).all() or (out[..., 7].isnan() & math.isnan(poison)).all()
    assert out[..., :7].isfinite().all() and out[..., 8:].isfinite().all()


def test_the_scale_brings_every_head_close_to_the_bound() -> None:
    value = torch.randn(2, 50, 3, 128) * torch.tensor([1e-30, 1.0, 1e30])[None, None, :, None]
    value[1, :, 0] = 0.0
    small, scale = scaled(value.bfloat16(), LIMIT_SUM_F16)
    largest = small.float().abs().amax(dim=(1, 3))
    assert (largest[0] >= 1).all() and (largest <= 2).all() and largest[1, 0] == 0
    assert (torch.frexp(scale)[0] == 0.5).all()
