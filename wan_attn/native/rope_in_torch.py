# SPDX-License-Identifier: Apache-2.0
"""rope_in_torch.py - torch.ops.wan_attn.rms_norm_rope in torch's operators.

For what our kernels do not take: devices without a row, gradients, an installation without the
native library. It follows csrc/wan_attn.h step by step, rounding included, and can be traced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wan_attn.native.rope_call import RopeCall


def compute(call: RopeCall) -> Tensor:
    """[batch, seqlen, heads, head_dim] -> the same shape, contiguous, in `dtype` or x's.

    The call has been checked (rope.py); its `kernel` is not used.
    """
    x = call.x
    with torch.autocast(x.device.type, enabled=False):
        y = x.float()
        if call.eps is not None:
            y = _norm(y, call, call.eps)
        if call.table is not None:
            y = _rotate(y, call.table, call.grid_sizes, call.seqlen_offset)
        out = y.float().to(x.dtype if call.dtype is None else call.dtype)
    return out.clone(memory_format=torch.contiguous_format)


def _norm(x: Tensor, call: RopeCall, eps: float) -> Tensor:
    dims = (-1,) if call.per_head else (-2, -1)
    # Apple's GPUs have no float64.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    mean = x.pow(2).mean(dim=dims, keepdim=True, dtype=wide)
    y = x * torch.rsqrt(mean + eps).float()
    if call.round_norm:
        y = y.to(call.x.dtype)
    if call.weight is None:
        return y
    return y * (call.weight if call.per_head else call.weight.unflatten(0, x.shape[2:]))


def _rotate(y: Tensor, table: Tensor, grid_sizes: Tensor | None, offset: int) -> Tensor:
    # Apple's GPUs have no float64.
    wide = torch.float32 if y.device.type == "mps" else torch.float64
    is_rotated = None
    if grid_sizes is not None:
        table, is_rotated = _angles(table, grid_sizes.to(y.device), y.shape[1], offset)
    a, b = y.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cosine - b * sine, b * cosine + a * sine), dim=-1).flatten(-2)
    return turned if is_rotated is None else torch.where(is_rotated, turned, y.to(wide))


def _angles(table: Tensor, grid_sizes: Tensor, seqlen: int, offset: int) -> tuple[Tensor, Tensor]:
    """The table of each token, [batch, seqlen, 1, head_dim], and which tokens the grid has."""
    head_dim = table.shape[1]
    lines = 2 * (head_dim // 2 // 3)
    parts = table.split([head_dim - 2 * lines, lines, lines], dim=1)
    frames, height, width = grid_sizes.long().clamp(0, table.shape[0]).unsqueeze(-1).unbind(1)
    token = torch.arange(offset, offset + seqlen, device=table.device).unsqueeze(0)
    is_inside = token < frames * height * width
    line, column = height.clamp(min=1), width.clamp(min=1)
    places = (token // (line * column), token // column % line, token % column)
    rows = [part[place.where(is_inside, 0)] for part, place in zip(parts, places, strict=True)]
    return torch.cat(rows, dim=-1).unsqueeze(2), is_inside[:, :, None, None]
