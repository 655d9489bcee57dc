# SPDX-License-Identifier: Apache-2.0
"""heads.py - a part of a call's heads, computed by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from wan_attn.request import Call

Operands = tuple[Tensor, Tensor, Tensor]
"""query, key, value."""

Result = tuple[Tensor, Tensor | None]
"""out, and lse where it is wanted."""

Run = Callable[..., Result]


def of_heads(operands: Operands, first: int, last: int) -> Operands:
    """Views of these heads. Query and key have as many, or all of them are wanted."""
    query, key, value = operands
    return query[:, :, first:last], key[:, :, first:last], value[:, :, first:last]


def compute_again(
    exact: Run,
    groups: Iterable[tuple[int, int]],
    operands: Operands,
    call: Call,
    result: Result,
) -> Result:
    """The result with these groups of heads, (first, behind the last), as `exact` computes them."""
    out, lse = result
    for first, last in groups:
        part, part_lse = exact(*of_heads(operands, first, last), call)
        out[:, :, first:last] = part
        if lse is not None and part_lse is not None:
            lse[:, first:last] = part_lse
    return out, lse
