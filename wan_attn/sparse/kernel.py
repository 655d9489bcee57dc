# SPDX-License-Identifier: Apache-2.0
"""kernel.py - one call of our kernels that leaves out blocks of keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from wan_attn.backends import native
from wan_attn.request import Call, Request
from wan_attn.sparse.lists import BlockLists

Operands = tuple[Tensor, Tensor, Tensor]
"""query, key, value."""

Result = tuple[Tensor, Tensor | None]


def why_not(request: Request) -> str | None:
    """Why no kernel of ours leaves blocks out of such a call; None: one does."""
    return native.why_not(request, leaves_out=True)


def by_lists(
    operands: Operands, call: Call, lists: BlockLists, *, pools_others: bool, **more: Any
) -> Result:
    """The listed blocks; with `pools_others` each of the others as one key, its mean."""
    counts, indices = lists
    return native.run(
        *operands,
        call,
        block_counts=counts,
        block_indices=indices,
        pools_others=pools_others,
        **more,
    )


def by_threshold(operands: Operands, call: Call, threshold: float, guard: Tensor) -> Result:
    """All but the blocks whose largest weight against the running maximum is below `threshold`.

    Args:
        guard: wan_attn_guard, which learns the largest share that a row has lost.
    """
    return native.run(*operands, call, skip_threshold=threshold, guard=guard)
