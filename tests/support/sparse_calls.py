# SPDX-License-Identifier: Apache-2.0
"""sparse_calls.py - calls of a small video whose tokens look at near ones, for tests of sparse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import wan_attn
from wan_attn import sparse
from wan_attn.sparse.state import Use

GRID = (4, 12, 16)
TOKENS = math.prod(GRID)


def near(
    tokens: int = TOKENS,
    heads: int = 4,
    reach: float = 3.0,
    sharp: float = 5.0,
    grid: tuple[int, int, int] = GRID,
) -> Any:
    """query, key, value of a video in which tokens look at near ones."""
    draw = torch.Generator().manual_seed(5)
    axes = torch.meshgrid(*(torch.arange(float(size)) for size in grid), indexing="ij")
    at = torch.stack([axis.flatten() for axis in axes], dim=1)
    at = torch.cat((at, 99 * torch.rand(max(tokens - len(at), 0), 3, generator=draw)))[:tokens]
    angles = at @ torch.randn(heads, 3, 16, generator=draw).div(reach)
    waves = torch.cat((angles.cos(), angles.sin()), dim=-1).transpose(0, 1)[None]
    q = sharp * waves + 0.3 * torch.randn(1, tokens, heads, 32, generator=draw)
    k = waves + 0.1 * torch.randn(1, tokens, heads, 32, generator=draw)
    return q, k, torch.randn(1, tokens, heads, 32, generator=draw) + waves


def sdpa(*x: Tensor, **options: Any) -> Any:
    return wan_attn.sdpa(*x, **options)


def inside(layer: int = 3, step: int = 4, **more: Any) -> Any:
    known: dict[str, Any] = {"steps": 10, "layers": 8, "expert": 0, "grid": GRID}
    return sparse.at(step=step, layer=layer, **(known | more))


def use(mode: str = "sparse", **options: Any) -> Use:
    return sparse.use(mode, **({"min_tokens": 256} | options))


def one(used: Use, **known: Any) -> dict[str, Any]:
    """The one layer of the report that has all this."""
    (found,) = [x for x in used.report().layers if known.items() <= x.items()]
    return found
