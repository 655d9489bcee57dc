# SPDX-License-Identifier: Apache-2.0
"""sampling.py - the error of a lossy call, from a few of its rows that are computed exactly too.

The rows are spread over the call and are others each time. However few they are, all keys and
values are read for them, which costs as much as some 100 rows of the whole call: on a CPU 40 and 7
for each of the rows, as counted for sdpa_avx2 at 2,048 and 8,192 keys. So 8 rows are computed each
time, and only as often as that stays within SHARE of the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from wan_attn.observe import later
from wan_attn.request import Call, Request

SHARE = 0.002
ROWS = 8
COST = 100  # of these rows, in rows of the whole call
_GOLDEN = 0.6180339887498949  # its multiples are spread evenly, however many there are
WEIGHT = 0.2  # of a new measurement in the running error
HEAD_GROUPS = 8

Exact = Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor | None]]


def why_not(request: Request) -> str | None:
    """Why the error of such a call cannot be measured; None: it can."""
    if request.is_causal or request.window != (-1, -1):
        return "a causal mask or a window, under which single rows cannot be computed alone"
    if request.has_q_lens:
        return "real query lengths, beyond which rows are empty"
    return None


def groups(heads_q: int, heads_k: int) -> tuple[tuple[int, int], ...]:
    """The groups of heads whose error is measured together, (first, behind the last). One, where
    key has fewer heads than query."""
    count = min(HEAD_GROUPS, heads_q) if heads_q == heads_k else 1
    bounds = [heads_q * i // count for i in range(count + 1)]
    return tuple(zip(bounds[:-1], bounds[1:], strict=True))


def spread(first: int, count: int, among: int) -> list[int]:
    """The numbers of so many of `among`, evenly spread: others for another `first`, of which each
    begins where one before has ended."""
    return sorted({int((i * _GOLDEN % 1.0) * among) for i in range(first, first + count)})


class Allowance:
    """When the calls of one layer are measured, and by which rows.

    Args:
        share: of the work that measuring may cost.
        count: rows each time.
        cost: of these, in rows of the whole call.
    """

    def __init__(self, share: float = SHARE, count: int = ROWS, cost: float = COST) -> None:
        self._share, self._count, self._cost = share, count, cost
        self._left, self._taken = float(cost), 0  # the first call is always measured

    def rows(self, seqlen_q: int) -> list[int]:
        """The rows for a call of so many; []: it is not measured."""
        self._left = min(self._left + self._share * seqlen_q, 2.0 * self._cost)
        if self._left < self._cost or seqlen_q == 0:
            return []
        self._left -= self._cost
        first, self._taken = self._taken, self._taken + self._count
        return spread(first, self._count, seqlen_q)

    def grant(self) -> None:
        """The next call is measured, whatever it costs."""
        self._left = max(self._left, self._cost)


def largest(errors: Iterable[float]) -> float:
    """NaN is larger than any other."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def errors(
    exact: Exact,
    rows: list[int],
    groups: tuple[tuple[int, int], ...],
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    call: Call,
) -> Tensor:
    """[groups] float32: |out - exact|^2 / |exact|^2 over these rows of each group of heads."""
    query, key, value = operands
    index = later.to_device(rows, torch.int64, query.device)
    wanted, _ = exact(query[:, index], key, value, call._replace(return_lse=False))
    return squares(out[:, index], wanted, groups)


def squares(found: Tensor, wanted: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    """[groups] float32: |found - wanted|^2 / |wanted|^2 of each group of heads."""
    wanted = wanted.float()
    off = (found.float() - wanted).square().sum((0, 1, 3))
    size = wanted.square().sum((0, 1, 3))
    parts = [(off[a:b].sum(), size[a:b].sum()) for a, b in groups]
    return torch.stack([o / s.clamp_min(torch.finfo(torch.float32).tiny) for o, s in parts])
