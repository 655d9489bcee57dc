# SPDX-License-Identifier: Apache-2.0
"""rope_oracle.py - RMS norm and RoPE in float64 numpy, straight from their formulas; shares no code
with wan_attn. And stock Wan2.2's steps, in torch's operators, to compare errors with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

THETA = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many pairs turn by frame, line and column, as Wan2.2's rope_params shares them out."""
    dims = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    return dims[0] // 2, dims[1] // 2, dims[2] // 2


def table(positions: int, head_dim: int) -> Tensor:
    """[positions, head_dim] float64: cos and sin of pair i at 2 i and 2 i + 1."""
    columns = []
    for pairs in axis_pairs(head_dim):
        rate = THETA ** (-np.arange(pairs) / max(pairs, 1))
        angle = np.arange(positions)[:, None] * rate
        columns.append(np.stack((np.cos(angle), np.sin(angle)), -1).reshape(positions, 2 * pairs))
    return torch.from_numpy(np.concatenate(columns, 1))


def exact(
    x: Tensor,
    weight: Tensor | None = None,
    grids: Sequence[Sequence[int]] | None = None,
    *,
    eps: float | None = None,
    per_head: bool = False,
    seqlen_offset: int = 0,
) -> Tensor:
    """[batch, seqlen, heads, head_dim] float64, and nothing is rounded on the way."""
    y = x.double().numpy().copy()
    batch, seqlen, heads, head_dim = y.shape
    if eps is not None:
        mean = (y**2).mean(axis=-1 if per_head else (-2, -1), keepdims=True)
        y = y / np.sqrt(mean + eps)
        if weight is not None:
            y = y * weight.double().numpy().reshape((head_dim,) if per_head else (heads, head_dim))
    if grids is None:
        return torch.from_numpy(y)
    rates = [THETA ** (-np.arange(p) / max(p, 1)) for p in axis_pairs(head_dim)]
    for b, grid in enumerate(grids):
        count = max(0, min(seqlen, int(np.prod(grid)) - seqlen_offset))
        if count == 0:
            continue
        places = np.unravel_index(np.arange(seqlen_offset, seqlen_offset + count), grid)
        angles = [p[:, None] * rate for p, rate in zip(places, rates, strict=True)]
        turn = np.exp(1j * np.concatenate(angles, axis=1))[:, None]
        turned = (y[b, :count, :, 0::2] + 1j * y[b, :count, :, 1::2]) * turn
        y[b, :count, :, 0::2], y[b, :count, :, 1::2] = turned.real, turned.imag
    return torch.from_numpy(y)


def stock(
    x: Tensor,
    weight: Tensor | None = None,
    grids: Sequence[Sequence[int]] | None = None,
    *,
    eps: float | None = None,
) -> Tensor:
    """What stock Wan2.2 computes of the same, float32: its norm over all heads, then complex128."""
    if eps is not None:
        flat = x.flatten(2)
        mean = flat.float().pow(2).mean(dim=-1, keepdim=True)
        flat = (flat.float() * torch.rsqrt(mean + eps)).type_as(flat)
        x = (flat if weight is None else flat * weight).unflatten(2, x.shape[2:])
    if grids is None:
        return x.float()
    rows = torch.view_as_complex(table(1024, x.shape[3]).unflatten(-1, (-1, 2)))
    parts = rows.split(axis_pairs(x.shape[3]), dim=1)
    result = []
    for sample, (f, h, w) in zip(x, grids, strict=True):
        count = f * h * w
        pairs = torch.view_as_complex(sample[:count].double().unflatten(-1, (-1, 2)).contiguous())
        angles = torch.cat(
            (
                parts[0][:f, None, None].expand(f, h, w, parts[0].shape[1]),
                parts[1][None, :h, None].expand(f, h, w, parts[1].shape[1]),
                parts[2][None, None, :w].expand(f, h, w, parts[2].shape[1]),
            ),
            dim=-1,
        ).reshape(count, 1, x.shape[3] // 2)
        turned = torch.view_as_real(pairs * angles).flatten(2)
        result.append(torch.cat((turned, sample[count:])))
    return torch.stack(result).float()
