# SPDX-License-Identifier: Apache-2.0
"""test_ptx_pv16.py - the rows that sum P V in f16 are exact: no worse than bf16 with f32 sums.

Error against float64 in float32 output, so that the rounding of the output hides nothing. Run from
PTX, with tensor cores that round an f16 sum after every 8 products and cut an f32 one off, as those
of Ampere and Ada do by models that were compared with them (tests/emu/README.md). Judged by the
root mean square: of the largest error a sum in f16 may have more, once in some draws.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracle
from emu.rows import Job
from emu.run import LIMIT_SUM_F16, scaled
from ptx import collect, machine
from ptx.calls import Runner

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]

AMPERE = machine.Knobs(sum_block=8, sum_bits=24)
SLIM = {job.name: job for job in collect.shipped() if job.arch == 86}
PV16, PLAIN = SLIM["sdpa_sm80_pv16_bf16_d128"], SLIM["sdpa_sm80_bf16_d128"]
HEAD_DIM = 128


def run(job: Job, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return Runner(job, collect.nvrtcs()[0], knobs=AMPERE)(job.kernel, query, key, value).out


def normal(seqlen_q: int = 64, seqlen_k: int = 700) -> list[Tensor]:
    return [torch.randn(1, n, 1, HEAD_DIM) for n in (seqlen_q, seqlen_k, seqlen_k)]


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


def error_of(job: Job, query: Tensor, key: Tensor, value: Tensor) -> float:
    """Relative root mean square error."""
    want, _ = oracle.attention(query, key, value)
    error = run(job, query, key, value).double().numpy() - want
    return float((error**2).sum() ** 0.5 / (want**2).sum() ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_at_or_below_that_of_bf16_with_f32_sums(kind: str) -> None:
    for _ in range(3):
        query, key, value = (x.bfloat16() for x in changed(kind))
        query = query.float()
        rms, plain = error_of(PV16, query, key, value), error_of(PLAIN, query, key, value)
        print(f"{kind:26} rms {rms:.3e} {plain:.3e}")
        assert rms <= plain


@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
def test_what_is_not_finite_stays_so(poison: float) -> None:
    query, key, value = (x.bfloat16() for x in normal())
    value[0, 300, 0, 7] = poison
    out = run(PV16, query, key, value)
    assert (out[..., 7] == poison).all() or (out[..., 7].isnan() & math.isnan(poison)).all()
    assert out[..., :7].isfinite().all() and out[..., 8:].isfinite().all()


def test_the_scale_brings_every_head_close_to_the_bound() -> None:
    value = torch.randn(2, 50, 3, 128) * torch.tensor([1e-30, 1.0, 1e30])[None, None, :, None]
    value[1, :, 0] = 0.0
    small, scale = scaled(value.bfloat16(), LIMIT_SUM_F16)
    largest = small.float().abs().amax(dim=(1, 3))
    assert (largest[0] >= 1).all() and (largest <= 2).all() and largest[1, 0] == 0
    assert (torch.frexp(scale)[0] == 0.5).all()
