# SPDX-License-Identifier: Apache-2.0
"""accuracy.py - how far a result is from float64, and how much memory a call takes beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REFERENCE_ROWS = 64  # of every head and sample, spread over the length
SCORE_BYTES_MAX = 256 << 20  # of one head's float64 scores, held at once


@dataclass(frozen=True, slots=True)
class Reference:
    """Some rows of the exact result.

    Attributes:
        rows: their numbers.
        out: [batch, rows, heads, head_dim] float64.
    """

    rows: Tensor
    out: Tensor


@dataclass(frozen=True, slots=True)
class Error:
    """The error against a Reference.

    Attributes:
        max: the largest.
        relative_rms: its root mean square over the result's, which is relative L2.
        one_less_cosine: 1 minus the cosine between the two.
    """

    max: float
    relative_rms: float
    one_less_cosine: float


def reference(
    query: Tensor, key: Tensor, value: Tensor, lengths_k: list[int] | None = None
) -> Reference:
    """Attention of some rows in float64, one head at a time, on the tensors' device."""
    batch, seqlen_q, heads, head_dim = query.shape
    rows = torch.linspace(0, seqlen_q - 1, min(REFERENCE_ROWS, seqlen_q), dtype=torch.float64)
    rows = rows.round().long().to(query.device)
    picked = query.index_select(1, rows)
    out = torch.zeros(picked.shape, dtype=torch.float64, device=query.device)
    group = heads // key.shape[2]
    step = max(1, SCORE_BYTES_MAX // (8 * max(1, key.shape[1])))
    for b in range(batch):
        keys = key.shape[1] if lengths_k is None else lengths_k[b]
        if not keys:
            continue
        for h in range(heads):
            k, v = (x[b, :keys, h // group].double() for x in (key, value))
            for begin in range(0, len(rows), step):
                part = slice(begin, begin + step)
                scores = picked[b, part, h].double() @ k.T / head_dim**0.5
                out[b, part, h] = scores.softmax(dim=1) @ v
    return Reference(rows, out)


def error(result: Tensor, exact: Reference) -> Error:
    """Returns the error of those rows; NaN where the result holds one."""
    got = result.index_select(1, exact.rows).double()
    if not got.numel():
        return Error(0.0, 0.0, 0.0)
    gap, length = got - exact.out, float(exact.out.norm())
    if not length:
        return Error(float(gap.abs().amax()), 0.0, 0.0)
    # |a / |a| - b / |b|| squared is twice that, and does not cancel where both are nearly the same.
    apart = got / got.norm().clamp_min(1e-300) - exact.out / length
    return Error(
        float(gap.abs().amax()), float(gap.norm()) / length, float(apart.square().sum()) / 2
    )


def extra_bytes(call: Callable[[], Tensor], device: torch.device) -> int | None:
    """The most memory a call holds beside its inputs and output; None where no allocator counts it.

    As peak_bytes() counts it.
    """
    peak, out = peak_bytes(call, device)
    return None if peak is None else max(0, peak - out.numel() * out.element_size())


def peak_bytes(call: Callable[[], Tensor], device: torch.device) -> tuple[int | None, Tensor]:
    """The most memory a call holds beyond what was held before, and its result.

    torch's CUDA allocator counts by itself. On the CPU its profiler reports each allocation, and
    only those made through torch: threads' stacks and other libraries' own memory are not seen.
    None where no allocator counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before, out
    try:
        changes, out = _cpu_allocations(call)
    except (AttributeError, RuntimeError):  # not in every torch
        return None, call()
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak, out


def _cpu_allocations(call: Callable[[], Tensor]) -> tuple[list[int], Tensor]:
    """Returns bytes taken (above 0) and given back (below 0), in order."""
    from torch.profiler import ProfilerActivity, profile

    with _no_chatter(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = call()
    events: Any = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"], out


@contextlib.contextmanager
def _no_chatter() -> Iterator[None]:
    """Hides the greeting that the profiler's C++ half writes to stderr, past Python."""
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # no stderr: nothing to hear
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
