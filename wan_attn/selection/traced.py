# SPDX-License-Identifier: Apache-2.0
"""traced.py - torch.ops.wan_attn.attention: the whole selection as one op, for compilers.

What traces or wraps tensors gets this op, inside which a call runs as it does without a tracer;
plain tensors go straight to run.py, which costs less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wan_attn import config
from wan_attn.backends import torch_sdpa
from wan_attn.contract import check_call
from wan_attn.native import autograd
from wan_attn.request import refuse
from wan_attn.selection.choose import compute_dtype
from wan_attn.selection.run import Call, attend, readable

_PLAIN = (Tensor, torch.nn.Parameter)


def route(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Run the call here, or through the opaque op where something traces or wraps tensors."""
    if not torch.compiler.is_compiling():
        is_plain = type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN
        if is_plain and not query.is_meta:
            return attend(query, key, value, call)
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                refuse(name, "a torch.Tensor", type(x).__name__)
    query, key, value = readable(query), readable(key), readable(value)
    if call.dropout_p > 0:
        # A backward pass must see the forward's dropout: no op of ours, but PyTorch's, traced.
        return _traced_with_dropout(query, key, value, call)
    out, lse = torch.ops.wan_attn.attention(
        query,
        key,
        value,
        call.q_lens,
        call.k_lens,
        call.scale,
        call.is_causal,
        call.window[0],
        call.window[1],
        call.return_lse,
        call.dtype,
        call.version,
    )
    return out, lse if call.return_lse else None


def _traced_dtype(
    value_dtype: torch.dtype, asked: torch.dtype | None, device: torch.device
) -> torch.dtype:
    """compute_dtype for a tracer, which follows neither the environment nor the device's driver."""
    return compute_dtype(value_dtype, asked, device, config.current().force_fp16)


# What torch.compiler.assume_constant_result sets; calling that would import the whole compiler.
_traced_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _traced_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, call: Call
) -> tuple[Tensor, Tensor | None]:
    dtype = _traced_dtype(value.dtype, call.dtype, query.device)
    return torch_sdpa.run_unread(
        query,
        key,
        value.to(dtype),
        q_lens=call.q_lens,
        k_lens=call.k_lens,
        scale=call.scale,
        is_causal=call.is_causal,
        window=call.window,
        dropout_p=call.dropout_p,
        return_lse=call.return_lse,
    )


# No keyword-only arguments: torch 2.4's register_autograd would hand them over differently.
_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? q_lens, Tensor? k_lens,"
    " float? scale, bool is_causal, int window_left, int window_right, bool return_lse,"
    " ScalarType? dtype, int? version) -> (Tensor out, Tensor lse)"
)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    scale: float | None,
    is_causal: bool,
    window_left: int,
    window_right: int,
    return_lse: bool,
    dtype: torch.dtype | None,
    version: int | None,
) -> tuple[Tensor, Tensor]:
    window = (window_left, window_right)
    call = Call(q_lens, k_lens, scale, is_causal, window, 0.0, return_lse, dtype, version)
    out, lse = attend(query, key, value, call)
    if lse is None:
        lse = query.new_empty((0, query.shape[2], query.shape[1]), dtype=torch.float32)
    return out.to(query.dtype).contiguous(), lse.contiguous()


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    scale: float | None,
    is_causal: bool,
    window_left: int,
    window_right: int,
    return_lse: bool,
    dtype: torch.dtype | None,
    version: int | None,
) -> tuple[Tensor, Tensor]:
    if dtype is None:
        check_call(query, key, value, q_lens, k_lens, scale, window_left, window_right)
    batch, seqlen_q, heads, _ = query.shape
    lse = query.new_empty((batch if return_lse else 0, heads, seqlen_q), dtype=torch.float32)
    return query.new_empty(query.shape), lse


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, q_lens, k_lens, scale, is_causal, left, right, return_lse, *_ = inputs
    ctx.save_for_backward(query, key, value, q_lens, k_lens)
    ctx.options = {
        "scale": scale,
        "is_causal": is_causal,
        "window_left": left,
        "window_right": right,
        "return_lse": return_lse,
    }


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """The derivative of exact attention is the same whichever backend computed it."""
    return (*autograd.backward(ctx, grad_out, grad_lse), *[None] * 7)


# Torch frees an operator with the last reference to its Library.
_LIBRARY = torch.library.Library("wan_attn", "FRAGMENT")
_LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("wan_attn::attention", _attention_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "wan_attn::attention", _backward, setup_context=_setup_context, lib=_LIBRARY
)
