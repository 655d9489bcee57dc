# SPDX-License-Identifier: Apache-2.0
"""_common.py - small things that several backends need; knows none of them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from wan_attn import config
from wan_attn.request import transforms

SCORE_ELEMENTS = 1 << 22  # elements of one block of fp32 scores, for the log-sum-exp: 16 MiB


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None where there is no such device to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


@cache
def amd_architecture(device: torch.device) -> str:
    """An AMD card's name for compilers, as gfx1030; "" for every other device."""
    if torch.version.hip is None or device.type != "cuda" or not torch.cuda.is_available():
        return ""
    found = getattr(torch.cuda.get_device_properties(device), "gcnArchName", "")
    return str(found).partition(":")[0]


def accelerators() -> list[str]:
    """Kinds of devices beside CPU and CUDA that this torch can compute on here."""
    found = []
    if torch.backends.mps.is_available():
        found.append("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found.append("xpu")
    return found


config.memory(capability.cache_clear)
config.memory(amd_architecture.cache_clear)


def positive_scale(query: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """The same scores from a scale above 0, as kernels that keep a running maximum want it.

    The sign, or a scale of 0, goes into query, exactly. None is 1/sqrt(head_dim).
    """
    if scale is None:
        return query, 1.0 / math.sqrt(query.shape[-1])
    if scale > 0:
        return query, scale
    return (query * 0, 1.0) if scale == 0 else (-query, -scale)


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without the caller's autocast, which would round fp32 work to half precision."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def empty_result(
    query: Tensor, dtype: torch.dtype, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Out 0 and lse -inf: what rows without a key get. Shapes as run's; query may be a view."""
    batch, seqlen_q, heads, _ = query.shape
    # Made from query, so that torch.func.vmap, which may batch it, lets results be written there.
    out = query.new_zeros(query.shape, dtype=dtype)
    if not return_lse:
        return out, None
    return out, query.new_full((batch, heads, seqlen_q), -math.inf, dtype=torch.float32)


def with_all_batches(query: Tensor, *others: Tensor | None) -> Tensor:
    """query, batched by every torch.func.vmap that batches one of the others: see empty_result."""
    if transforms.is_transformed(*others):
        for other in others:
            if other is not None:
                query = query + other[:0].sum().to(query.dtype)  # which is 0
    return query


def in_graph(result: Tensor, *operands: Tensor) -> Tensor:
    """A result that no operand reached still belongs to their graph, with a gradient of 0."""
    if result.requires_grad or not torch.is_grad_enabled():
        return result
    for operand in operands:
        if operand.requires_grad:
            result = result + operand[:0].sum().to(result.dtype)
    return result


def heads_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, heads, seqlen, head_dim]; fewer key heads are repeated, so that any kernel serves."""
    group = query.shape[2] // key.shape[2]
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return q, k, v


def log_sum_exp(query: Tensor, key: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """log Σ exp(scale · q·k) over the seen keys, natural log; a few rows of scores at a time.

    Args:
        query: [batch, heads, rows, head_dim]; key: [batch, heads, keys, head_dim].
        keep: bool, broadcastable to [batch, heads, rows, keys]; None: all.

    Returns:
        [batch, heads, rows] float32.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, rows, _ = query.shape
    columns = key.to(wide).transpose(-1, -2)
    step = max(1, SCORE_ELEMENTS // max(1, batch * heads * key.shape[2]))
    parts = []
    for begin in range(0, rows, step):
        scores = torch.matmul(query[:, :, begin : begin + step].to(wide), columns) * scale
        if keep is not None:
            part = keep if keep.shape[-2] == 1 else keep[..., begin : begin + step, :]
            scores = scores.masked_fill(~part, -math.inf)
        parts.append(torch.logsumexp(scores, dim=-1))
    return torch.cat(parts, dim=-1).to(torch.float32)
