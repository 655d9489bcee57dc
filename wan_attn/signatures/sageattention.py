# SPDX-License-Identifier: Apache-2.0
"""sageattention.py - a function with SageAttention's signature, which computes exactly.

Signature: sageattention/core.py of thu-ml/SageAttention 2.2. The original drops every keyword it
does not know, attn_mask among them; here an unknown one is an error.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from wan_attn.request import Call, Refusal, gate, refuse
from wan_attn.selection.traced import route
from wan_attn.signatures import _masked, _top_left

_NAMES = {"query": "q", "key": "k", "value": "v", "scale": "sm_scale"}
_LAYOUTS = ("HND", "NHD")

# How the original rounds: an exact kernel meets any of these demands.
_ROUNDING = ("smooth_k", "smooth_v", "pv_accum_dtype", "qk_quant_gran")
_KEYWORDS = (*_ROUNDING, "attn_mask", "dropout_p")


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """sageattention.sageattn through the selection, on any device: exact, not 8-bit.

    Args:
        q: [batch, heads_q, seqlen_q, head_dim] for "HND", [batch, seqlen_q, heads_q, head_dim] for
            "NHD"; float16, bfloat16 or (unlike the original) float32; any strides.
        k, v: likewise with heads_k, which divides heads_q, and seqlen_k.
        tensor_layout: "HND" or "NHD".
        is_causal: row i sees the keys up to i, counted from the first, as the original's kernels
            have it. (wan_attn.sdpa counts from the last; the two agree where seqlen_q == seqlen_k,
            the only case that the original documents.)
        sm_scale: multiplies the scores; None: 1/sqrt(head_dim).
        return_lse: also return the natural log of Σ exp(scale · score).
        attn_mask: broadcastable to [batch, heads_q, seqlen_q, seqlen_k], bool (True: seen) or
            floating (added): PyTorch computes such a call, which the log says once. Not together
            with is_causal or return_lse.
        smooth_k, smooth_v, pv_accum_dtype, qk_quant_gran: accepted: they say how to round to 8
            bits, and nothing here is.
        dropout_p: 0, which some callers pass.

    Returns:
        out in q's layout and dtype, contiguous as the original's, whose callers `.view` it (for
        "HND" that is a copy: the kernels write [batch, seqlen, heads, head_dim]); with return_lse
        also lse [batch, heads_q, seqlen_q] float32. A row that sees no key is 0 with -inf.

    Raises:
        RuntimeError: "wan_attn: <argument> must be <rule>, got <value>". TypeError: a keyword that
            neither the original nor its callers have.
    """
    for name in kwargs:
        if name not in _KEYWORDS:
            raise TypeError(
                f"wan_attn: sageattn got an unexpected keyword argument {name!r};"
                f" it knows {', '.join(_KEYWORDS)}"
            )
    if not isinstance(tensor_layout, str) or tensor_layout not in _LAYOUTS:
        refuse("tensor_layout", '"HND" or "NHD"', gate.shown(tensor_layout))
    dropout_p = kwargs.get("dropout_p", 0.0)
    if gate.probability("dropout_p", dropout_p) > 0:
        refuse("dropout_p", "0, as SageAttention has no dropout", dropout_p)
    for name, operand in (("q", q), ("k", k), ("v", v)):
        axes = "heads, seqlen" if tensor_layout == "HND" else "seqlen, heads"
        rule = f"[batch, {axes}, head_dim]"
        if not isinstance(operand, Tensor):
            refuse(name, rule, type(operand).__name__)
        gate.dense(name, operand)
        if operand.dim() != 4:
            refuse(name, rule, list(operand.shape))
    is_causal, return_lse = gate.flag("is_causal", is_causal), gate.flag("return_lse", return_lse)
    scale = None if sm_scale is None else gate.number("sm_scale", sm_scale)
    try:
        return _either(
            q, k, v, tensor_layout, is_causal, scale, return_lse, kwargs.get("attn_mask")
        )
    except Refusal as refusal:
        raise refusal.under(_NAMES) from None


def _either(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str,
    is_causal: bool,
    scale: float | None,
    return_lse: bool,
    mask: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """With a mask or without; operands in `tensor_layout`."""
    is_heads_first = tensor_layout == "HND"
    if mask is not None:
        if is_causal or return_lse:
            rule = f"None with {'is_causal' if is_causal else 'return_lse'}"
            refuse("attn_mask", rule, "a tensor")
        if not is_heads_first:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = _masked.attend(q, k, v, mask, scale, "attn_mask")
        return (out if is_heads_first else out.transpose(1, 2)).contiguous()
    if is_heads_first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if is_causal:
        out, lse = _top_left.attend(q, k, v, scale, return_lse)
    else:
        out, lse = route([q, k, v], Call(scale=scale, return_lse=return_lse))
    out = (out.transpose(1, 2) if is_heads_first else out).to(q.dtype).contiguous()
    return out if lse is None else (out, lse.contiguous())
