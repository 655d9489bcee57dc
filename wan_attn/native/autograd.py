# SPDX-License-Identifier: Apache-2.0
"""autograd.py - the derivative of torch.ops.wan_attn.sdpa, in torch operators.

The kernels are forward only. A caller of the op itself with tensors that need a gradient still
gets the right one: the backward pass recomputes the weights a block of query rows at a time (Dao et
al., arXiv 2205.14135, appendix B.2, without tiling over keys). It is exact and memory-bounded, not
fast: wan_attn.sdpa and flash_attention send such calls to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from wan_attn.request import Call, transforms, wants_grad

# Elements of one [batch, heads, rows, seqlen_k] block of weights: 256 MiB of float32.
_BLOCK_ELEMENTS = 1 << 26


def register(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
    in_torch: Callable[..., Any],
) -> None:
    """torch.library.register_autograd for an op whose first arguments are query, key and value,
    and what that kernel of torch's does not do.

    Args:
        in_torch: the op in torch's operators: gradients within torch.func come from there.
    """
    guard: Any = _Guard(library, in_torch)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=guard)


class _Guard:
    """Stands for the library where torch puts the kernel of an op's derivative."""

    def __init__(self, library: torch.library.Library, in_torch: Callable[..., Any]) -> None:
        self._library, self._in_torch = library, in_torch

    def impl(self, op: Any, kernel: Callable[..., Any], key: str, **options: Any) -> None:
        """As a library's."""

        def guarded(keyset: Any, *operands: Any, **keywords: Any) -> Any:
            query, key, value = operands[:3]
            # As in transforms.in_forward_mode(), without a call: a tangent would be dropped.
            if getattr(forward_ad, "_current_level", 0) >= 0:
                transforms.without_tangent(query=query, key=key, value=value)
            # Outside of torch.func, as most calls are, this asks one question.
            if transforms.innermost_transform() is not None and transforms.is_transformed(
                query, key, value
            ):
                if wants_grad(query, key, value):
                    return self._in_torch(*operands, **keywords)
            return kernel(keyset, *operands, **keywords)

        self._library.impl(op, guarded, key, **options)


def remember(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call) -> None:
    """Keeps what backward needs. Tensors go where torch looks after them."""
    ctx.save_for_backward(query, key, value, call.q_lens, call.k_lens)
    ctx.call = call._replace(q_lens=None, k_lens=None)


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


def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """(grad_query, grad_key, grad_value, None, None), in the inputs' dtypes, from float32."""
    query, key, value, q_lens, k_lens = ctx.saved_tensors
    call: Call = ctx.call._replace(q_lens=q_lens, k_lens=k_lens)
    batch, seqlen_q, heads_q, head_dim = query.shape
    seqlen_k, heads_k = key.shape[1], key.shape[2]
    groups = heads_q // heads_k
    scale = 1.0 / math.sqrt(head_dim) if call.scale is None else call.scale
    with torch.autocast(query.device.type, enabled=False):
        q, do = _rows_or_zero(query, q_lens), _rows_or_zero(grad_out, q_lens)
        k = _rows_or_zero(key, k_lens).repeat_interleave(groups, dim=1)
        v = _rows_or_zero(value, k_lens).repeat_interleave(groups, dim=1)
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
            if call.return_lse:
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
        None,
        None,
    )
