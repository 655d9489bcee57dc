# SPDX-License-Identifier: Apache-2.0
"""probe.py - the run's attention calls: counted, and the largest repeated by itself."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from wan_attn import config
from wan_attn.integrations import diffusers as wan_diffusers
from wan_attn.request import Request
from wan_attn.selection.choose import Choice, compute_dtype, select

ROWS = 128  # rows that are computed again in float64
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of attention call."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    head_dim: int

    @property
    def size(self) -> int:
        return self.batch * self.seqlen_q * self.seqlen_k * self.num_heads

    def __str__(self) -> str:
        """As `wan-attn why --shape` reads it."""
        lengths = f"{self.seqlen_q}"
        if self.seqlen_k != self.seqlen_q:
            lengths += f":{self.seqlen_k}"
        return f"{self.batch}x{lengths}x{self.num_heads}x{self.head_dim}"


class Recorder:
    """`wan_attn.sdpa` that remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: Counter[Shape] = Counter()
        self.chosen: dict[Shape, Choice] = {}
        self.dtype = torch.float32  # what the last call was computed in
        self._largest: tuple[Shape, tuple[Tensor, Tensor, Tensor]] | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, seqlen_q, num_heads, head_dim = query.shape
        shape = Shape(batch, seqlen_q, key.shape[1], num_heads, head_dim)
        if shape not in self.chosen:
            self.chosen[shape] = self._choose(query, key, value)
        self.calls[shape] += 1
        if self._largest is None or shape.size >= self._largest[0].size:
            self._largest = shape, (query, key, value)
        return wan_diffusers.attend(query, key, value)

    def _choose(self, query: Tensor, key: Tensor, value: Tensor) -> Choice:
        settings = config.current()
        self.dtype = compute_dtype(value.dtype, None, value.device, settings.force_fp16)
        return select(Request.from_tensors(query, key, value, dtype=self.dtype), settings)

    @property
    def titles(self) -> str:
        """The backends and kernels that computed attention, as the log calls them."""
        return ", ".join(dict.fromkeys(choice.title for choice in self.chosen.values()))

    @property
    def largest(self) -> tuple[Shape, tuple[Tensor, Tensor, Tensor]]:
        """The last of the largest calls."""
        if self._largest is None:
            raise RuntimeError("wan_attn: the run made no attention call")
        return self._largest


@dataclass(frozen=True, slots=True)
class Probe:
    """One call: seconds, and the largest error against float64, of torch's SDPA and of wan_attn."""

    shape: Shape
    stock_seconds: float
    our_seconds: float
    stock_error: float
    our_error: float
    allowed_error: float

    @property
    def is_ok(self) -> bool:
        return self.our_error <= self.allowed_error  # NaN is not


def torch_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What diffusers' own processor computes attention with."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def probe(recorder: Recorder) -> Probe:
    """Repeat the largest recorded call both ways."""
    shape, call = recorder.largest
    query, key, value = call
    rows = torch.linspace(0, shape.seqlen_q - 1, min(ROWS, shape.seqlen_q)).round().long()
    rows = rows.to(query.device)
    truth = _exact(query[:, rows], key, value)
    errors, seconds = [], []
    for function in (torch_sdpa, wan_diffusers.attend):
        out = function(*call)[:, rows].double().cpu()
        errors.append(float((out - truth).abs().max()))
        seconds.append(_median_seconds(function, call))
    # The tests' rule: twice the error of torch's SDPA, or two units in the last place of the
    # largest value.
    ulps = 2 * torch.finfo(recorder.dtype).eps * float(value.abs().max())
    return Probe(shape, seconds[0], seconds[1], errors[0], errors[1], 2 * errors[0] + ulps)


def _exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in float64 on the CPU, one head at a time."""
    query, key, value = (x.double().cpu() for x in (query, key, value))
    out = torch.empty_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            scores = query[b, :, h] @ key[b, :, h].T / query.shape[3] ** 0.5
            out[b, :, h] = scores.softmax(dim=1) @ value[b, :, h]
    return out


def _median_seconds(
    function: wan_diffusers.AttentionFunction, call: tuple[Tensor, Tensor, Tensor]
) -> float:
    """The caller has called it once already, which warmed it up."""
    times = []
    for _ in range(REPEATS):
        _wait(call[0].device)
        start = time.perf_counter()
        function(*call)
        _wait(call[0].device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
