# SPDX-License-Identifier: Apache-2.0
"""watched.py - a call of which something may be left out: blocks of keys, or bits of its scores."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from wan_attn.precision.state import uses as IN_BITS
from wan_attn.request import Call, Request
from wan_attn.sparse.state import uses as BLOCKS

__all__ = ["BLOCKS", "IN_BITS", "run"]  # whose `active` is looked at by every call

Run = Callable[..., tuple[Tensor, Tensor | None]]


def run(
    exact: Run,
    backend: str,
    request: Request,
    operands: tuple[Tensor, Tensor, Tensor],
    call: Call,
) -> tuple[Tensor, Tensor | None, str]:
    """Compute the call: what leaves no block out may be in 8 bits.

    Args:
        exact: computes it as it would be without us.
        backend: what `exact` runs on.

    Returns:
        out, lse, and what ran as the log calls it; "" if `exact` did.
    """
    in_bits, leaves_out = IN_BITS.active, BLOCKS.active
    ran = ""

    def dense(
        query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        nonlocal ran
        if in_bits is None:
            return exact(query, key, value, call)
        out, lse, ran = in_bits.run(exact, backend, request, query, key, value, call)
        return out, lse

    if leaves_out is None:
        out, lse = dense(*operands, call)
        return out, lse, ran
    out, lse, sparse_ran = leaves_out.run(dense, exact, request, *operands, call)
    return out, lse, sparse_ran or ran
