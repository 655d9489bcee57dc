# SPDX-License-Identifier: Apache-2.0
"""lists.py - which blocks of 64 keys each block of 64 queries computes: from a mask to the compact
lists that kernels read. Torch's operators, on any device; nothing waits for a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wan_attn.request import BLOCK, gate, refuse

__all__ = ["BLOCK", "BlockLists", "block_lists", "blocks", "compact"]


class BlockLists(NamedTuple):
    """What a call computes; see csrc/wan_attn.h.

    Attributes:
        counts: [batch, heads, blocks of queries] int32.
        indices: [batch, heads, blocks of queries, capacity] int32, ascending; what lies behind the
            count is never read.
    """

    counts: Tensor
    indices: Tensor


def blocks(tokens: int) -> int:
    """How many blocks so many tokens are."""
    return -(-tokens // BLOCK)


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
    """As block_lists(), of a mask that is one. One head after the other: what is made on the way
    has 12 bytes for each pair of blocks."""
    batch, heads, rows, columns = mask.shape
    counts = mask.sum(-1, dtype=torch.int32)
    capacity = columns
    if mask.device.type == "cpu" and counts.numel():  # elsewhere reading it would wait
        capacity = int(counts.max())
    indices = torch.zeros((batch, heads, rows, capacity), dtype=torch.int32, device=mask.device)
    numbers = torch.arange(columns, dtype=torch.int32, device=mask.device)
    for sample in range(batch):
        for head in range(heads):
            listed = mask[sample, head]
            # Blocks that are not listed share one more slot, which is cut off.
            slot = torch.where(listed, listed.cumsum(-1) - 1, capacity)
            row = torch.zeros((rows, capacity + 1), dtype=torch.int32, device=mask.device)
            row.scatter_(1, slot, numbers.expand(rows, columns))
            indices[sample, head] = row[:, :capacity]
    return BlockLists(counts, indices)
