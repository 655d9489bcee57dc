# SPDX-License-Identifier: Apache-2.0
"""routing.py - which blocks of keys may matter to a block of queries, from their means alone.

The rule of Sol-Attn (arXiv 2607.24027): the mean of 64 queries times the mean of 64 keys, against
their mean over all blocks of keys plus tau times their spread, which is estimated channel by
channel. The smaller tau, the more is computed. Beside that always: a block's own and its
neighbours, the first block, and what the caller names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wan_attn.observe import later
from wan_attn.request import blocks_of
from wan_attn.sparse.lists import BLOCK, BlockLists, compact, heads_at_once

DENSE = float("-inf")
"""The tau with which everything is computed."""


def means(x: Tensor, real: Sequence[int]) -> Tensor:
    """[batch, seqlen, heads, head_dim] -> [batch, heads, blocks, head_dim] float32: of the real
    tokens of each block; 0 where there are none."""
    batch, seqlen, heads, head_dim = x.shape
    made = x.new_zeros((batch, heads, blocks_of(seqlen), head_dim), dtype=torch.float32)
    for sample, length in enumerate(real):
        whole, rest = divmod(length, BLOCK)
        for part in heads_at_once(heads, length * head_dim):
            some = x[sample, :length, part].float()
            if whole:
                full = some[: whole * BLOCK].unflatten(0, (whole, BLOCK)).mean(1)
                made[sample, part, :whole] = full.transpose(0, 1)
            if rest:
                made[sample, part, whole] = some[whole * BLOCK :].mean(0)
    return made


class Routing:
    """The means of a call, from which lists follow for any tau.

    Args:
        query, key: [batch, seqlen, heads, head_dim], in order; as many tokens in both.
        real: how many of each sample's tokens are real.
        always: how many tokens, the first ones, all see, and see all.
        is_negative: the scores are multiplied by a negative number.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        real: Sequence[int],
        always: int = 0,
        is_negative: bool = False,
    ) -> None:
        self.real, self.always = list(real), blocks_of(always)
        self._queries = means(query, real)
        self._keys = means(key, real)
        if is_negative:
            self._queries.neg_()
        self.heads, self.count = query.shape[2], self._queries.shape[2]
        self._per_key = self.heads // key.shape[2]

    def mask(self, taus: Sequence[float], rows: Sequence[int] | None = None) -> Tensor:
        """[batch, heads, blocks of queries, blocks of keys] bool.

        Args:
            taus: one for each head.
            rows: the blocks of queries that are asked for; None: all.
        """
        device = self._queries.device
        if rows is None:
            wanted = torch.arange(self.count, device=device)
        else:
            wanted = later.to_device(rows, torch.int64, device)
        batch = len(self.real)
        made = torch.empty(
            (batch, self.heads, len(wanted), self.count), dtype=torch.bool, device=device
        )
        near = (wanted[:, None] - torch.arange(self.count, device=device)).abs() <= 1
        near[:, : max(self.always, 1)] = True
        near |= (wanted < self.always)[:, None]
        of_head = later.to_device(taus, torch.float32, device)
        for sample, length in enumerate(self.real):
            there = blocks_of(length)
            for part in heads_at_once(self.heads, len(wanted) * self.count):
                listed = self._above(sample, part, of_head[part], wanted, there)
                listed |= near[:, :there] | (of_head[part] == DENSE)[:, None, None]
                made[sample, part, :, :there] = listed
            made[sample, :, :, there:] = False
        return made

    def _above(self, sample: int, part: slice, taus: Tensor, wanted: Tensor, there: int) -> Tensor:
        """Which of the blocks that have keys score above the threshold, in these heads."""
        queries = self._queries[sample, part][:, wanted]
        of_key = torch.arange(self.heads, device=wanted.device)[part] // self._per_key
        keys = self._keys[sample, of_key, :there]
        middle = keys.mean(1, keepdim=True)
        spread = (keys - middle).square().mean(1, keepdim=True)
        size = (queries.square() * spread).sum(2, keepdim=True).sqrt()
        return queries @ (keys - middle).transpose(1, 2) > taus[:, None, None] * size

    def lists(self, taus: Sequence[float], rows: Sequence[int] | None = None) -> BlockLists:
        """As mask(), for a kernel."""
        return compact(self.mask(taus, rows))
