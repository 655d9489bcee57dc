# SPDX-License-Identifier: Apache-2.0
"""steer.py - the largest tau of each group of heads that keeps the budget, from a few blocks of
queries: their exact result is computed once, and what they would be by some taus.

Bisection, all groups at once. At 50,000 tokens a search costs as much as 3 % of one call, and a
layer needs one in a run, or few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wan_attn.observe import sampling
from wan_attn.observe.heads import Operands, Result
from wan_attn.request import Call, blocks_of
from wan_attn.sparse.lists import BLOCK, BlockLists
from wan_attn.sparse.routing import DENSE, Routing

LEAST = -1.0  # with which 84 of 100 blocks of a normal score are computed: less is not worth it
HALVINGS = 5
PROBES = 8  # blocks of queries
WITHIN = 0.7  # of the budget: errors of later steps, and of other blocks, are not the same
DENSE_FROM = 0.7  # a density with which lists save too little

ByLists = Callable[[Operands, Call, BlockLists], Result]

Groups = tuple[tuple[int, int], ...]


def of_heads(groups: Groups, taus: Sequence[float]) -> list[float]:
    """A tau for each head, from one for each group."""
    return [
        tau for (first, last), tau in zip(groups, taus, strict=True) for _ in range(first, last)
    ]


class Search:
    """For one call.

    Args:
        exact: computes rows of it exactly.
        by_lists: computes them by lists.
        operands: query, key and value, in order.
        first: which blocks of queries are taken: others for another number.
    """

    def __init__(
        self,
        exact: sampling.Exact,
        by_lists: ByLists,
        routing: Routing,
        operands: Operands,
        call: Call,
        groups: Groups,
        first: int = 0,
    ) -> None:
        query, key, value = operands
        # Behind the tokens that are always in; the last block may be cut short.
        there = max(min(routing.real) // BLOCK - routing.always, 1)
        behind = routing.always if routing.always < routing.count else 0
        self._rows = [behind + i for i in sampling.spread(first, PROBES, there)]
        parts = [query[:, BLOCK * row : BLOCK * (row + 1)] for row in self._rows]
        self._operands = (torch.cat(parts, dim=1), key, value)
        self._call = call._replace(return_lse=False)
        self._wanted, _ = exact(*self._operands, self._call)
        self._by_lists, self._routing, self._groups = by_lists, routing, groups

    def _judge(self, taus: Sequence[float]) -> list[tuple[float, float]]:
        """(error, density) of each group."""
        lists = self._routing.lists(of_heads(self._groups, taus), self._rows)
        out, _ = self._by_lists(self._operands, self._call, lists)
        squares = sampling.squares(out, self._wanted, self._groups)
        shares = shares_of(lists, self._routing.real)
        # In one piece: it waits for a GPU, as a search has to.
        found: list[float] = torch.cat((squares, shares)).tolist()
        each = found[len(squares) :]
        return [
            (math.sqrt(square), sum(each[first:last]) / (last - first))
            for square, (first, last) in zip(found, self._groups, strict=False)
        ]

    def taus(self, budget: float, most: float) -> list[float]:
        """Of each group the largest up to `most`; DENSE where none keeps the budget, or none that
        leaves enough out."""
        goal = WITHIN * budget
        least = min(LEAST, most)
        at_most = self._judge([most] * len(self._groups))
        good = [most if error <= goal else DENSE for error, _ in at_most]
        dense = [density for _, density in at_most]
        bad = [most] * len(self._groups)
        if DENSE in good and least < most:
            found = self._judge([least if tau == DENSE else tau for tau in good])
            for group, (error, density) in enumerate(found):
                if good[group] == DENSE and error <= goal:
                    good[group], dense[group] = least, density
            for _ in range(HALVINGS):
                tried = [
                    g if g in (DENSE, b) else (g + b) / 2 for g, b in zip(good, bad, strict=True)
                ]
                if tried == good:
                    break
                for group, (error, density) in enumerate(self._judge(tried)):
                    if tried[group] == good[group]:
                        continue
                    if error <= goal:
                        good[group], dense[group] = tried[group], density
                    else:
                        bad[group] = tried[group]
        return [
            DENSE if density > DENSE_FROM else tau for tau, density in zip(good, dense, strict=True)
        ]


def shares_of(lists: BlockLists, real: Sequence[int]) -> Tensor:
    """[heads] float32: the share of blocks that have keys which each head computes."""
    there = [max(blocks_of(length), 1) for length in real]
    shares = [counts / size for counts, size in zip(lists.counts, there, strict=True)]
    return torch.stack(shares).mean((0, 2))
