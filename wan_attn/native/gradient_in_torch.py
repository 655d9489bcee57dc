# SPDX-License-Identifier: Apache-2.0
"""gradient_in_torch.py - gradients of attention by torch's operators, where no kernel has them.

The weights are computed again, a block of query rows at a time (Dao et al., arXiv 2205.14135,
appendix B.2, without tiling over keys). Exact and bounded in memory, not fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wan_attn.request import Call

# Elements of one [batch, heads, rows, seqlen_k] block of weights: 256 MiB of float32.
_BLOCK_ELEMENTS = 1 << 26


def _visible(rows: Tensor, seqlen_q: int, seqlen_k: int, call: Call) -> Tensor:
    """[batch or 1, 1, rows, seqlen_k] bool: the mask of csrc/wan_attn.h for these query rows."""
    device = rows.device
    q_lens, k_lens = call.q_lens, call.k_lens
    len_q = torch.full((1,), seqlen_q, device=device) if q_lens is None else q_lens.to(device)
    len_k = torch.full((1,), seqlen_k, device=device) if k_lens is None else k_lens.to(device)
    len_q, len_k = len_q.view(-1, 1, 1, 1), len_k.view(-1, 1, 1, 1)
    row = rows.view(1, 1, -1, 1)
    column = torch.arange(seqlen_k, device=device).view(1, 1, 1, -1)
    offset = column - (row + len_k - len_q)
    visible = (row < len_q) & (column < len_k)
    left, right = call.window
    if call.is_causal:
        right = 0
    if left >= 0:
        visible = visible & (offset >= -left)
    if right >= 0:
        visible = visible & (offset <= right)
    return visible


def _rows_or_zero(x: Tensor, lengths: Tensor | None) -> Tensor:
    """-> float32 [batch, heads, seqlen, dim], with padding zeroed: it may hold NaN."""
    x = x.transpose(1, 2).float()
    if lengths is None:
        return x
    row = torch.arange(x.shape[2], device=x.device).view(1, 1, -1, 1)
    return torch.where(row < lengths.to(x.device).view(-1, 1, 1, 1), x, 0.0)


def gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_query, grad_key, grad_value), in the inputs' dtypes, from float32.

    Args:
        grad_lse: None: zeros.
    """
    batch, seqlen_q, heads_q, head_dim = query.shape
    seqlen_k, heads_k = key.shape[1], key.shape[2]
    groups = heads_q // heads_k
    scale = 1.0 / math.sqrt(head_dim) if call.scale is None else call.scale
    q, do = _rows_or_zero(query, call.q_lens), _rows_or_zero(grad_out, call.q_lens)
    k = _rows_or_zero(key, call.k_lens).repeat_interleave(groups, dim=1)
    v = _rows_or_zero(value, call.k_lens).repeat_interleave(groups, dim=1)
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    block = max(1, _BLOCK_ELEMENTS // max(1, batch * heads_q * seqlen_k))
    for first in range(0, seqlen_q, block):
        rows = torch.arange(first, min(first + block, seqlen_q), device=query.device)
        part = slice(first, first + block)
        visible = _visible(rows, seqlen_q, seqlen_k, call)
        scores = (q[:, :, part] @ k.transpose(2, 3)) * scale
        # A row that sees no key has only -inf here and NaN after softmax: its weights are 0.
        weights = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
        weights = torch.where(visible, weights, 0.0)
        dv = dv + weights.transpose(2, 3) @ do[:, :, part]
        dweights = do[:, :, part] @ v.transpose(2, 3)
        dscores = dweights - (dweights * weights).sum(-1, keepdim=True)
        if grad_lse is not None:
            dscores = dscores + grad_lse[:, :, part].unsqueeze(-1)
        dscores = dscores * weights * scale
        dq.append(dscores @ k)
        dk = dk + dscores.transpose(2, 3) @ q[:, :, part]
    dq_all = torch.cat(dq, dim=2) if dq else torch.zeros_like(q)
    dk = dk.view(batch, heads_k, groups, seqlen_k, head_dim).sum(2)
    dv = dv.view(batch, heads_k, groups, seqlen_k, head_dim).sum(2)
    return (
        dq_all.transpose(1, 2).to(query.dtype),
        dk.transpose(1, 2).to(key.dtype),
        dv.transpose(1, 2).to(value.dtype),
    )
