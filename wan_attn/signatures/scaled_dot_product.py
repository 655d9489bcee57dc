# SPDX-License-Identifier: Apache-2.0
"""scaled_dot_product.py - a function with the signature and meaning of torch's SDPA, which computes
by the selection what that takes, and by torch's own function the rest.

Signature: torch.nn.functional.scaled_dot_product_attention of torch 2.5 and newer. A mask that says
no more than lengths, causal or a window becomes calls without one (see _mask_plan.py).
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from wan_attn import log
from wan_attn.backends._torch_kernels import SDPA, laid_out
from wan_attn.request import DTYPES, Call, gate, refuse, transforms
from wan_attn.selection.traced import route
from wan_attn.signatures import _mask_plan, _operands, _top_left

_DTYPES = (*DTYPES, torch.float64)  # what torch's function computes in


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention through the selection, on any device.

    What our contract has no words for is torch's own function's, which the log says once, with the
    reason: dropout, a mask that is a bias or has holes, float64, value with another head_dim,
    leading dimensions that are broadcast, nested tensors.

    Args:
        query: [..., heads_q, seqlen_q, head_dim], with any leading dimensions, or none.
        key, value: [..., heads_k, seqlen_k, head_dim], of query's dtype.
        attn_mask: broadcastable to [..., heads_q, seqlen_q, seqlen_k]; bool, True where the key is
            seen, or floating (float32 or query's dtype), added to the scores. None with is_causal.
        dropout_p: probability, in [0, 1]; it holds whether or not a gradient is wanted.
        is_causal: row i sees the keys up to i, counted from the first one (top-left).
        scale: multiplies the scores; None: 1/sqrt(head_dim).
        enable_gqa: heads_k may divide heads_q; query head h reads key head
            h // (heads_q // heads_k).

    Returns:
        [..., heads_q, seqlen_q, head_dim] in query's dtype, contiguous where query is, else with
        heads and seqlen in the order of [batch, seqlen, heads, head_dim]. A row that sees no key
        is 0.

    Raises:
        RuntimeError: "wan_attn: <argument> must be <rule>, got <value>".

    Under autocast everything is computed in its dtype, as by torch's. Works under
    torch.compile(fullgraph=True), where the numbers of a mask are unknown: torch computes such a
    call.
    """
    if type(is_causal) is not bool:
        is_causal = gate.flag("is_causal", is_causal)
    if type(enable_gqa) is not bool:
        enable_gqa = gate.flag("enable_gqa", enable_gqa)
    if scale is not None and type(scale) is not float:
        scale = gate.number("scale", scale)
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = gate.number("dropout_p", dropout_p)
        if not 0.0 <= dropout_p <= 1.0:
            refuse("dropout_p", "in [0, 1]", f"{dropout_p:g}")
    plan = None
    if attn_mask is not None or dropout_p > 0 or not _is_plain(query, key, value, enable_gqa):
        given = query, key, value, attn_mask, dropout_p, is_causal, scale
        query, key, value = _operands_of(query, key, value)
        reason = _checked(query, key, value, attn_mask, is_causal, enable_gqa)
        if reason is None and dropout_p > 0:
            reason = "it has dropout"
        if reason is None and attn_mask is not None:
            plan = _plan(attn_mask, query, key)
            reason = plan.reason or None
        if reason is not None:
            return _by_torch(*given, enable_gqa, reason)
    q, k, v = (query, key, value) if query.dim() == 4 else map(_with_four, (query, key, value))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if plan is not None:
        out = _mask_plan.attend(q, k, v, plan, scale)
    elif is_causal:
        out, _ = _top_left.attend(q, k, v, scale)
    else:
        out, _ = route([q, k, v], Call(scale=scale))
    out = out.transpose(1, 2)
    if query.is_contiguous():  # torch's result is then, too, and callers `.view` it
        out = out.contiguous()
    return out if query.dim() == 4 else out.reshape(query.shape)


def _is_plain(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether a call without mask and dropout is ours at a glance; _checked() looks closer."""
    for x in (query, key, value):
        if type(x) is not Tensor or x.layout is not torch.strided or x.is_nested or x.dim() != 4:
            return False
        if x.is_meta or x.device != query.device:
            return False
    batch, heads, seqlen_q, head_dim = query.shape
    of_key = key.shape
    return (
        query.dtype in DTYPES
        and query.dtype is key.dtype is value.dtype
        and not torch.is_autocast_enabled(query.device.type)
        and of_key == value.shape
        and (batch, head_dim) == (of_key[0], of_key[3])
        and seqlen_q > 0
        and query.numel() > 0
        and key.numel() > 0
        and (heads == of_key[1] or (enable_gqa and heads % of_key[1] == 0))
    )


def _operands_of(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operands as torch's function would take them: nested, or in autocast's dtype."""
    try:
        if all(isinstance(x, Tensor) and x.is_nested for x in (query, key, value)):
            return query, key, value
    except TypeError:  # a subclass whose __torch_function__ takes nothing, as gate.dense says
        pass
    for name, x in (("query", query), ("key", key), ("value", value)):
        gate.dense(name, x)
    return _operands.under_autocast(query, key, value)


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Refuses what torch's function refuses, or would read wrongly; else why the call is torch's,
    its mask's contents and dropout aside, or None: it is ours."""
    if query.is_nested:
        return "its tensors are nested"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2 + enable_gqa:
            rule = f"[..., {'heads, ' if enable_gqa else ''}seqlen, head_dim]"
            refuse(name, rule, list(x.shape))
        if x.dtype not in _DTYPES:
            refuse(name, "float16, bfloat16, float32 or float64", x.dtype)
        if x.dtype != query.dtype:
            refuse(name, f"of query's dtype {query.dtype}", x.dtype)
        if x.device != query.device:
            refuse(name, f"on query's device {query.device}", x.device)
    if key.shape[-1] != query.shape[-1]:
        refuse("key", f"of query's head_dim {query.shape[-1]}", list(key.shape))
    if value.shape[-2] != key.shape[-2]:
        refuse("value", f"of key's seqlen {key.shape[-2]}", list(value.shape))
    leading = _leading(query, key, value, enable_gqa)
    if mask is not None:
        _check_mask(mask, query, [*leading, query.shape[-2], key.shape[-2]], is_causal)
    if query.dtype == torch.float64:
        return "it is float64"
    if value.shape != key.shape:
        return "its value has another shape than its key"
    if 0 in query.shape or 0 in key.shape:
        return "it has no elements"
    # One head of keys for all heads of query is the same with enable_gqa and without.
    is_grouped = query.dim() > 2 and (enable_gqa or key.shape[-3:-2] == (1,))
    end = -3 if is_grouped else -2
    if query.dim() != key.dim() or query.shape[:end] != key.shape[:end]:
        return "its leading dimensions are broadcast"
    return None


def _leading(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> list[int]:
    """The result's dimensions before the last two."""
    shapes = [list(x.shape[:-2]) for x in (query, key, value)]
    if enable_gqa:
        heads = shapes[0][-1]
        for name, shape in zip(("key", "value"), shapes[1:], strict=True):
            if heads and (not shape[-1] or heads % shape[-1]):
                refuse(name, f"of heads that divide query's {heads}", shape[-1])
            shape[-1] = heads
    for name, shape in zip(("key", "value"), shapes[1:], strict=True):
        if not _fits(shape, shapes[0]):
            with_gqa = "" if enable_gqa else " (fewer heads need enable_gqa)"
            refuse(name, f"broadcastable with query's {shapes[0]}{with_gqa}", shape)
    if not _fits(shapes[1], shapes[2]):
        refuse("value", f"broadcastable with key's {shapes[1]}", shapes[2])
    longest = max(len(shape) for shape in shapes)
    padded = [[1] * (longest - len(shape)) + shape for shape in shapes]
    return [next((n for n in sizes if n != 1), 1) for sizes in zip(*padded, strict=True)]


def _fits(one: list[int], other: list[int]) -> bool:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return all(a == b or a == 1 or b == 1 for a, b in pairs)


def _check_mask(mask: Tensor, query: Tensor, scores: list[int], is_causal: bool) -> None:
    gate.dense("attn_mask", mask)
    if is_causal:
        refuse("attn_mask", "None with is_causal", "a tensor")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        # Autocast converts a mask of any floating dtype together with the operands.
        is_converted = mask.is_floating_point() and mask.dtype != torch.float64
        if not (is_converted and torch.is_autocast_enabled(query.device.type)):
            refuse("attn_mask", f"bool, float32 or of query's dtype {query.dtype}", mask.dtype)
    if mask.device != query.device:
        refuse("attn_mask", f"on query's device {query.device}", mask.device)
    if mask.dim() < 2 or not _operands.broadcasts(mask.shape, scores):
        refuse(
            "attn_mask", f"of two dimensions or more and broadcastable to {scores}", [*mask.shape]
        )


def _with_four(x: Tensor) -> Tensor:
    """[batch, heads, seqlen, head_dim] of any other number of dimensions."""
    return x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


def _plan(mask: Tensor, query: Tensor, key: Tensor) -> _mask_plan.Plan:
    """What the mask says, or why it cannot be known."""
    if torch.compiler.is_compiling():
        return _mask_plan.Plan(reason="its mask cannot be read while torch.compile traces")
    if torch.is_grad_enabled() and mask.requires_grad:
        return _mask_plan.Plan(reason="its mask wants a gradient")
    is_plain = type(mask) in (Tensor, torch.nn.Parameter) and not mask.is_meta
    if not is_plain or transforms.is_transformed(mask):
        return _mask_plan.Plan(reason="its mask cannot be read here")
    if mask.dim() > 4 or query.dim() > 4:
        return _mask_plan.Plan(reason="its mask has more than four dimensions")
    batch = query.shape[0] if query.dim() == 4 else 1
    return _planner.plan(mask, batch, query.shape[-2], key.shape[-2])


def _read(mask: Tensor, batch: int, seqlen_q: int, seqlen_k: int) -> _mask_plan.Plan:
    """make_plan() for what a mask means to torch.

    A row of which every key is hidden by a finite number, however low, is to torch the mean of all
    values. Hosts mean 0 by it, and so does make_plan().
    """
    mask = _with_four(mask)
    if mask.is_floating_point():
        highest = mask.amax(-1)
        if bool(((highest < 0) & (highest > -math.inf)).any()):
            return _mask_plan.Plan(reason="its mask is a bias")
    return _mask_plan.make_plan(mask, batch, seqlen_q, seqlen_k)


_planner = _mask_plan.Planner(_read)


def _by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    reason: str,
) -> Tensor:
    """torch's own function, for a call that was checked."""
    log.traced(logging.INFO, f"Using PyTorch SDPA (scaled_dot_product_attention: {reason})")
    if query.is_nested:
        return SDPA(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:  # which torch 2.4 has not
        key, value = _repeated(key, query.shape[-3]), _repeated(value, query.shape[-3])
    return SDPA(laid_out(query), key, value, mask, dropout_p, is_causal, scale=scale)


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], dim=-3)
