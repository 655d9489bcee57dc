# SPDX-License-Identifier: Apache-2.0
"""order.py - the order of tokens in which near ones share a block: along a Morton curve through the
latent grid. A permutation of q, k and v, and its inverse for the result: attention does not mind.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from wan_attn.observe.place import Grid

Ranges = tuple[tuple[int, int], ...]
"""Of tokens, each (first, behind the last)."""


class Order(NamedTuple):
    """Where tokens go.

    Attributes:
        forward: [seqlen] int64, x[:, forward] is in order; None: they stay where they are.
        inverse: [seqlen] int64, which undoes that.
        always: how many tokens, the first ones in order, every token sees exactly.
    """

    forward: Tensor | None
    inverse: Tensor | None
    always: int


def morton(grid: Grid) -> Tensor:
    """[frames * rows * columns] int64: the tokens, in raster order as hosts have them, as the curve
    visits them. Bits of column, row and frame take turns, the column's lowest."""
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    code = torch.zeros(grid, dtype=torch.int64)
    for bit in range(max(size.bit_length() for size in grid)):
        for place, axis in enumerate(reversed(axes)):
            code |= (axis >> bit & 1) << (3 * bit + place)
    return code.flatten().argsort()


def fitting(grid: Grid | None, real: Sequence[int]) -> Grid | None:
    """This grid, if the first tokens of every sample are it; else None."""
    tokens = 0 if grid is None else grid[0] * grid[1] * grid[2]
    is_it = 0 < tokens <= min(real) and min(real) == max(real)
    return grid if is_it else None


@lru_cache(maxsize=64)
def of(grid: Grid | None, real: int, seqlen: int, always: Ranges, device: torch.device) -> Order:
    """The order of a call.

    Args:
        grid: of its first tokens; those behind it, as of a reference, are always in. None: raster
            order.
        real: how many of its `seqlen` tokens are real; the others stay at the end.
        always: tokens that are always in, counted as the host does.
    """
    count = 0 if grid is None else grid[0] * grid[1] * grid[2]
    first = [i for begin, end in always for i in range(begin, min(end, real))]
    if grid is not None:
        first += range(count, real)
    if not first and grid is None:
        return Order(None, None, 0)
    rest = torch.arange(real) if grid is None else morton(grid)
    if first:
        chosen = torch.tensor(sorted(set(first)))
        rest = torch.cat((chosen, rest[~torch.isin(rest, chosen)]))
        always_in = len(chosen)
    else:
        always_in = 0
    forward = torch.cat((rest, torch.arange(real, seqlen)))
    inverse = torch.empty_like(forward)
    inverse[forward] = torch.arange(seqlen)
    return Order(forward.to(device), inverse.to(device), always_in)


def apply(tensors: Sequence[Tensor], order: Order) -> list[Tensor]:
    """[batch, seqlen, heads, head_dim] each, in order."""
    if order.forward is None:
        return list(tensors)
    return [x.index_select(1, order.forward) for x in tensors]


def undo(out: Tensor, lse: Tensor | None, order: Order) -> tuple[Tensor, Tensor | None]:
    """The result of tokens in order, as the host has them."""
    if order.inverse is None:
        return out, lse
    out = out.index_select(1, order.inverse)
    return out, None if lse is None else lse.index_select(2, order.inverse)
