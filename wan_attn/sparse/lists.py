# SPDX-License-Identifier: Apache-2.0
"""lists.py - which blocks of 64 keys each block of 64 queries computes: from a mask to the compact
lists that kernels read. Torch's operators, on any device; nothing waits for a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wan_attn.request import BLOCK, gate, refuse

__all__ = ["BLOCK", "BlockLists", "block_lists", "compact", "heads_at_once"]

ROOM = 1 << 22  # numbers that are computed at once: heads that are few or short go together


class BlockLists(NamedTuple):
    """What a call computes; see csrc/wan_attn.h.

    Attributes:
        counts: [batch, heads, blocks of queries] int32.
        indices: [batch, heads, blocks of queries, capacity] int32, ascending; what lies behind the
            count is never read.
    """

    counts: Tensor
    indices: Tensor


def heads_at_once(heads: int, each: int) -> list[slice]:
    """Heads in parts of at most ROOM numbers, if each has so many."""
    step = max(ROOM // max(each, 1), 1)
    return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]


def block_lists(mask: Tensor) -> BlockLists:
    """The lists of a mask, for wan_attn.sparse.sdpa.

    Args:
        mask: [batch, heads, blocks of queries, blocks of keys] bool: whether a block is computed.

    Raises:
        RuntimeError: it is no such tensor.
    """
    gate.dense("mask", mask)
    if mask.dtype != torch.bool or mask.dim() != 4:
        rule = "bool [batch, heads, blocks of queries, blocks of keys]"
        refuse("mask", rule, f"{mask.dtype} {list(mask.shape)}")
    return compact(mask)


def compact(mask: Tensor) -> BlockLists:
    """As block_lists(), of a mask that is one. Some heads at once: what is made on the way has 20
    bytes for each pair of blocks."""
    batch, heads, rows, columns = mask.shape
    counts = mask.sum(-1, dtype=torch.int32)
    capacity = columns
    if mask.device.type == "cpu" and counts.numel():  # elsewhere reading it would wait
        capacity = int(counts.max())
    indices = torch.zeros((batch, heads, rows, capacity), dtype=torch.int32, device=mask.device)
    numbers = torch.arange(columns, dtype=torch.int32, device=mask.device)
    for part in heads_at_once(batch * heads, rows * columns):
        listed = mask.flatten(0, 1)[part]
        # Blocks that are not listed share one more slot, which is cut off.
        slot = torch.where(listed, listed.cumsum(-1) - 1, capacity)
        made = torch.zeros((len(listed), rows, capacity + 1), dtype=torch.int32, device=mask.device)
        made.scatter_(2, slot, numbers.expand(listed.shape))
        indices.view(batch * heads, rows, capacity)[part] = made[..., :capacity]
    return BlockLists(counts, indices)
