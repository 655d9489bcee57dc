# SPDX-License-Identifier: Apache-2.0
"""_top_left.py - a causal mask that begins top-left, as torch and SageAttention have it, by the
contract's, which ends bottom-right. The two agree where there are as many queries as keys."""

from __future__ import annotations

from torch import Tensor

from wan_attn.request import Call
from wan_attn.selection.traced import route


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Row i sees the keys up to i. Operands [batch, seqlen, heads, head_dim]; returns as route."""
    seqlen_q, seqlen_k = query.shape[1], key.shape[1]
    call = Call(scale=scale, is_causal=True, return_lse=return_lse)
    if seqlen_k > seqlen_q:  # keys that no row sees
        key, value = key[:, :seqlen_q], value[:, :seqlen_q]
    elif seqlen_k < seqlen_q:  # the contract's diagonal is so much further left
        call = call._replace(is_causal=False, window=(-1, seqlen_q - seqlen_k))
    return route([query, key, value], call)
