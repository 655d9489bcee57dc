# SPDX-License-Identifier: Apache-2.0
"""blocks.py - the rules of lists of blocks, which csrc/core/lists.c owns for calls that reach C.

They are here again for calls that do not: fake tensors, and what asks before it calls. What the
lists hold is checked where they are read. Knows no backend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan_attn.request import gate
from wan_attn.request.call import dtype_word, shape_text
from wan_attn.request.gate import refuse

BLOCK = 64  # queries and keys: WAN_ATTN_BLOCK


def blocks_of(length: int) -> int:
    """How many blocks so many tokens are."""
    return -(-length // BLOCK)


class Blocks(NamedTuple):
    """What keeps a call from being dense: torch.ops.wan_attn.sdpa's arguments of these names.

    Attributes:
        block_counts: [batch, num_heads_q, ceil(seqlen_q / 64)] int32, how many blocks of 64 keys
            each block of 64 queries sees; None: all.
        block_indices: [batch, num_heads_q, ceil(seqlen_q / 64), capacity] int32, which: rising.
        pools_others: each block that is not listed counts as one key, its mean.
        skip_threshold: blocks of keys whose weights are all below it are left out; 0: none.
    """

    block_counts: Tensor | None = None
    block_indices: Tensor | None = None
    pools_others: bool = False
    skip_threshold: float = 0.0

    @property
    def is_dense(self) -> bool:
        """Whether nothing here changes the result."""
        return self.block_counts is None and self.block_indices is None and not self.skip_threshold


DENSE = Blocks()


def check_blocks(query: Tensor, blocks: Blocks) -> None:
    """Raise RuntimeError for the first broken rule that can be told without tensor data."""
    counts, indices, pools_others, threshold = blocks
    if not 0.0 <= threshold <= 1.0:
        refuse("skip_threshold", "between 0 (off) and 1", f"{threshold:g}")
    if (counts is None) != (indices is None):
        names = ("block_counts", "block_indices")
        missing, given = names if counts is None else names[::-1]
        refuse(missing, f"given with {given}", None)
    if pools_others and counts is None:
        refuse("pools_others", "0 without block_counts", int(pools_others))
    if counts is None or indices is None:
        return
    _check_list("block_counts", counts, 3, query)
    _check_list("block_indices", indices, 4, query)


def _check_list(name: str, given: Tensor, ndim: int, query: Tensor) -> None:
    gate.dense(name, given)
    expected: tuple[Any, ...] = (query.shape[0], query.shape[2], blocks_of(query.shape[1]))
    room = ", capacity" if ndim == 4 else ""
    if given.dim() != ndim or given.dtype != torch.int32 or given.shape[:3] != expected:
        sizes = ", ".join(str(size) for size in expected)
        rule = f"int32 [batch, num_heads_q, ceil(seqlen_q / {BLOCK}){room}] = [{sizes}{room}]"
        refuse(name, rule, f"{dtype_word(given.dtype)} {shape_text(given)}")
    if given.device != query.device:
        refuse(name, f"on query's device {query.device}", given.device)
