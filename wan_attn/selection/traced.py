# SPDX-License-Identifier: Apache-2.0
"""traced.py - torch.ops.wan_attn.attention: the whole selection as one op, for compilers.

torch.compile, export and tensor subclasses see attention as one opaque op, whose body runs the call
as eager mode does: choosing and falling back happen when the graph runs. Plain tensors skip the op.
(torch.ops.wan_attn.sdpa is another op: our kernels alone, which the body may choose.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wan_attn import config, log
from wan_attn.backends import torch_sdpa
from wan_attn.native import autograd, backward
from wan_attn.request import Call, check, check_dense, empty_lse
from wan_attn.selection.choose import compute_dtype
from wan_attn.selection.run import attend

_PLAIN = (Tensor, torch.nn.Parameter)


def route(operands: list[Tensor], call: Call) -> tuple[Tensor, Tensor | None]:
    """Run the call here, or through the opaque op where something traces or wraps tensors.

    Args:
        operands: [query, key, value]; the list is emptied, see attend().

    Returns:
        out in call.out_dtype, else in query's dtype; lse or None.
    """
    query, key, value = operands
    if not torch.compiler.is_compiling():
        is_plain = type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN
        if is_plain and not query.is_meta:
            del query, key, value
            return attend(operands, call)
        check_dense(query, key, value)
    operands.clear()
    if call.dropout_p > 0:
        # A backward pass must see the forward's dropout: no op of ours, but PyTorch's, traced.
        dtype = _traced_dtype(value.dtype, call.dtype, query.device)
        out, lse = torch_sdpa.run_unread(query, key, value.to(dtype), call)
        return out if call.out_dtype is None else out.to(call.out_dtype), lse
    out, lse = torch.ops.wan_attn.attention(
        query,
        key,
        value,
        call.q_lens,
        call.k_lens,
        call.scale,
        call.is_causal,
        *call.window,
        call.return_lse,
        call.dtype,
        call.version,
        call.out_dtype,
    )
    return out, lse if call.return_lse else None


def _traced_dtype(
    value_dtype: torch.dtype, asked: torch.dtype | None, device: torch.device
) -> torch.dtype:
    """compute_dtype for a tracer, which follows neither the environment nor the device's driver."""
    force_fp16 = config.current().force_fp16
    _built_in.add(force_fp16)
    return compute_dtype(value_dtype, asked, device, force_fp16)


# What torch.compiler.assume_constant_result sets; calling that would import the whole compiler.
_traced_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]

_built_in: set[bool] = set()  # values of WAN_FORCE_FP16 that graphs were traced with


def _warn_of_graphs(settings: config.Settings) -> None:
    if _built_in - {settings.force_fp16}:
        log.LOGGER.warning(
            "%s WAN_FORCE_FP16: graphs that torch.compile has traced with dropout keep their dtype"
            " until torch.compiler.reset()",
            log.PREFIX,
        )


config.follow(_warn_of_graphs)


# No keyword-only arguments: torch 2.4's register_autograd would hand them over differently.
_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? q_lens, Tensor? k_lens,"
    " float? scale, bool is_causal, int window_left, int window_right, bool return_lse,"
    " ScalarType? dtype, int? version, ScalarType? out_dtype=None)"
    " -> (Tensor out, Tensor lse)"
)


def _call(
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    scale: float | None,
    is_causal: bool,
    window_left: int,
    window_right: int,
    return_lse: bool,
    dtype: torch.dtype | None,
    version: int | None,
    out_dtype: torch.dtype | None = None,
) -> Call:
    """The schema's arguments behind query, key and value."""
    masks = (is_causal, (window_left, window_right))
    return Call(q_lens, k_lens, scale, *masks, 0.0, return_lse, dtype, version, out_dtype)


def _attention(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = attend([query, key, value], _call(*arguments))
    lse = empty_lse(query, return_lse=False) if lse is None else lse.contiguous()
    return out.contiguous(), lse


def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    call = _call(*arguments)
    converts = call.dtype is not None
    check(query, key, value, call, takes_any_strides=True, takes_any_float=converts)
    out = query.new_empty(query.shape, dtype=call.out_dtype or query.dtype)
    return out, empty_lse(query, call.return_lse)


def _keeps_lse(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> bool:
    """Whether backward may use what this op leaves: our own kernels, or a library with weights as
    exact, compute it from what backward computes with."""
    settings, dtype = config.current(), _call(*arguments).dtype
    computed = compute_dtype(value.dtype, dtype, query.device, settings.force_fp16)
    is_same = computed == backward.computed_in(query, key, value, dtype)[2]
    return is_same and settings.forced_backend in (None, "sdpa")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, *arguments = inputs
    call = _call(*arguments)
    is_kept = _keeps_lse(*inputs)
    autograd.remember(ctx, query, key, value, call, output if is_kept else None)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """The derivative of exact attention does not depend on the backend that computed it."""
    return (*autograd.backward(ctx, grad_out, grad_lse), *[None] * 8)


# Torch frees an operator with the last reference to its Library.
_LIBRARY = torch.library.Library("wan_attn", "FRAGMENT")
_LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("wan_attn::attention", _attention_fake, lib=_LIBRARY)
autograd.register(
    *(_LIBRARY, "wan_attn::attention", _backward, _setup_context, _attention),
    lse_place=9,
    keeps_lse=_keeps_lse,
)
