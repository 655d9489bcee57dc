# SPDX-License-Identifier: Apache-2.0
"""_at_lengths.py - calls by libraries that know no lengths: real rows and keys only, as views.

Padding is never read, and a row that sees no key never reaches a library that may make NaN of it.
Knows none of those libraries.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from wan_attn.backends._common import empty_result
from wan_attn.backends._masks import HostMask
from wan_attn.request import Call, Request, host_lengths

Dense = Callable[[Tensor, Tensor, Tensor, HostMask], tuple[Tensor, Tensor | None]]

HALF = (torch.float16, torch.bfloat16)


def common_why_not(request: Request) -> str | None:
    """What all of them refuse here, told without importing any: where it is computed, in what, and
    everything that belongs to training."""
    if request.device.type != "cuda":
        return f"needs a CUDA device, the call is on {request.device.type}"
    if request.dtype not in HALF:
        return f"computes float16 and bfloat16, not {str(request.dtype).removeprefix('torch.')}"
    if request.needs_grad:
        return "forward only here, and a gradient is wanted"
    return "has no dropout here" if request.dropout_p > 0 else None


def attend(
    dense: Dense, query: Tensor, key: Tensor, value: Tensor, call: Call
) -> tuple[Tensor, Tensor | None]:
    """Attention by `dense`, which is called once for each run of samples with the same lengths.

    Args:
        dense: gets query [samples, rows, num_heads_q, head_dim], key and value [samples, keys, ...]
            and the mask in which only `left` and `right` still matter: each row sees a key. Gives
            out like query, and lse [samples, num_heads_q, rows] or None.
        query: [batch, seqlen_q, num_heads_q, head_dim] in value's dtype, as are key and value.

    Returns:
        out like query, and lse [batch, num_heads_q, seqlen_q] float32 or None.

    Raises:
        RuntimeError: the lengths are on a device, where they are not read.
    """
    batch, seqlen_q = query.shape[:2]
    q_host = host_lengths("q_lens", call.q_lens, batch, seqlen_q)
    k_host = host_lengths("k_lens", call.k_lens, batch, key.shape[1])
    if q_host is None or k_host is None:
        raise RuntimeError("it takes no lengths, and these are on a device, where they stay unread")
    out: Tensor | None = None
    lse: Tensor | None = None
    begin = 0
    for (q_len, k_len), run in itertools.groupby(zip(q_host, k_host, strict=True)):
        samples = slice(begin, begin := begin + len(list(run)))
        mask = HostMask.make(q_len, k_len, call)
        rows = slice(mask.first_row, q_len)
        if rows.start >= rows.stop or 0 in query.shape:
            continue
        part, part_lse = dense(
            query[samples, rows], key[samples, :k_len], value[samples, :k_len], mask
        )
        if part.shape == query.shape:
            return part, part_lse
        if out is None:
            out, lse = empty_result(query, query.dtype, call.return_lse)
        out[samples, rows] = part
        if lse is not None and part_lse is not None:
            lse[samples, :, rows] = part_lse
    return (out, lse) if out is not None else empty_result(query, query.dtype, call.return_lse)


def positive(scale: float | None, head_dim: int) -> float:
    """The scale for a library that divides by what it makes of it.

    Raises:
        RuntimeError: it is 0 or less, of which nothing is known there.
    """
    if scale is None:
        return float(head_dim**-0.5)
    if scale <= 0:
        raise RuntimeError(f"it needs a scale above 0, this is {scale:g}")
    return scale
