# SPDX-License-Identifier: Apache-2.0
"""sparse_heads.py - heads of a video model as they are said to be, made by a seed: how much of a
score comes from where tokens are, how much from what is there, and how much from neither.

Not Wan's own, of which no weights are at hand: kinds, from one that sees nearly all to one that
sees two keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_attn.observe.place import Grid

HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of head.

    Attributes:
        near: what a score has from nearness: so much for a token itself.
        reach: tokens, over which nearness falls to 0.6 of that; a frame counts as 4 of them.
        content: standard deviation of what it has from contents, which vary smoothly.
        noise: standard deviation of the rest.
    """

    name: str
    near: float
    reach: float
    content: float
    noise: float


KINDS = (
    Kind("diffuse", 1.0, 8.0, 0.7, 0.5),
    Kind("mixed", 3.0, 4.0, 1.0, 1.0),
    Kind("local", 8.0, 1.6, 0.9, 0.9),
    Kind("sharp", 11.0, 0.8, 1.0, 1.0),
)


def _positions(grid: Grid) -> Tensor:
    """[tokens, 3] float64; a frame is as far as 4 tokens."""
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    at = torch.stack([axis.flatten().double() for axis in axes], dim=1)
    return at * torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)


def _waves(at: Tensor, reach: float, count: int, draw: torch.Generator) -> Tensor:
    """[tokens, count] float64 whose products are exp(-distance^2 / (2 reach^2)), about."""
    turns = torch.randn(at.shape[1], count // 2, generator=draw, dtype=torch.float64) / reach
    angles = at @ turns
    return torch.cat((angles.cos(), angles.sin()), dim=1) / math.sqrt(count // 2)


def _smooth(at: Tensor, count: int, draw: torch.Generator, reach: float = 6.0) -> Tensor:
    """[tokens, count] float64 of variance 1, alike within so many tokens."""
    waves = _waves(at, reach, 512, draw)
    made: Tensor = waves @ torch.randn(512, count, generator=draw, dtype=torch.float64)
    return made


def make(kind: Kind, grid: Grid, seed: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value of one head, [tokens, 128] float64, to be computed with a scale of
    1 / sqrt(128)."""
    draw = torch.Generator().manual_seed(seed)
    at = _positions(grid)
    tokens = len(at)

    def normal(count: int) -> Tensor:
        return torch.randn(tokens, count, generator=draw, dtype=torch.float64)

    waves = _waves(at, kind.reach, 64, draw)
    content = _smooth(at, 32, draw) / 32**0.25
    alike = content + 0.3 * normal(32) / 32**0.25
    scale = HEAD_DIM**0.25
    query = torch.cat(
        (
            kind.near**0.5 * waves,
            kind.content**0.5 * content,
            kind.noise**0.5 * normal(32) / 32**0.25,
        ),
        dim=1,
    )
    key = torch.cat(
        (
            kind.near**0.5 * waves,
            kind.content**0.5 * alike,
            kind.noise**0.5 * normal(32) / 32**0.25,
        ),
        dim=1,
    )
    turn, _ = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=draw, dtype=torch.float64))
    value = _smooth(at, HEAD_DIM, draw) + 0.5 * normal(HEAD_DIM)
    return scale * query @ turn, scale * key @ turn, value


def effective_keys(query: Tensor, key: Tensor, rows: int = 64) -> float:
    """How many keys of one weight would be as undecided: exp of the entropy, mean over rows."""
    some = query[:: max(len(query) // rows, 1)]
    weights = (HEAD_DIM**-0.5 * some @ key.T).softmax(1)
    entropy = -(weights * weights.clamp_min(1e-300).log()).sum(1)
    return float(entropy.exp().mean())
