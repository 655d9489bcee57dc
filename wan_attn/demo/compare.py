# SPDX-License-Identifier: Apache-2.0
"""compare.py - how far two runs are apart, and whether rounding explains it.

The yardstick is a third run: stock diffusers on another of torch's own kernels. The mathematics is
the same, only rounding differs; what that does to the video over all steps is what any exact
attention may do to it. wan_attn may differ from stock by FACTOR times as much, and by a part of one
rounding of the latents themselves, for the case that the yardstick happens to be zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_attn.demo.runs import Run

FACTOR = 3.0
FLOOR_MAX, FLOOR_RMS = 1.0, 0.25  # in roundings of a latent of ordinary size


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two tensors; inf where either has a NaN or an infinity."""

    max: float
    rms: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """wan_attn against stock, beside what rounding alone does."""

    name: str
    ours: Difference
    rounding: Difference
    allowed: Difference

    @property
    def is_ok(self) -> bool:
        return all(
            math.isfinite(limit) and value <= limit
            for value, limit in (
                (self.ours.max, self.allowed.max),
                (self.ours.rms, self.allowed.rms),
            )
        )


def difference(a: Tensor, b: Tensor) -> Difference:
    """max |a - b|, and its root mean square."""
    gap = a.double() - b.double()
    if not bool(gap.isfinite().all()):
        return Difference(math.inf, math.inf)
    return Difference(float(gap.abs().max()), float(gap.square().mean().sqrt()))


def compare(stock: Run, ours: Run, rounding: Run, dtype: torch.dtype) -> tuple[Comparison, ...]:
    """Compares latents early and late, and the frames."""
    three = (stock, ours, rounding)
    first, last = [run.first for run in three], [run.last for run in three]
    frames = [torch.from_numpy(run.frames) for run in three]
    return (
        _judge("latents, first step", *first, dtype=dtype),
        _judge("latents, last step", *last, dtype=dtype),
        _judge("frames (0..1)", *frames, dtype=dtype),
    )


def _judge(
    name: str, stock: Tensor, ours: Tensor, rounding: Tensor, *, dtype: torch.dtype
) -> Comparison:
    ordinary = difference(rounding, stock)
    one_rounding = torch.finfo(dtype).eps * float(stock.double().square().mean().sqrt())
    allowed = Difference(
        FACTOR * ordinary.max + FLOOR_MAX * one_rounding,
        FACTOR * ordinary.rms + FLOOR_RMS * one_rounding,
    )
    return Comparison(name, difference(ours, stock), ordinary, allowed)
