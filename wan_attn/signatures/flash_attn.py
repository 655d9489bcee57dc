# SPDX-License-Identifier: Apache-2.0
"""flash_attn.py - functions shaped like FlashAttention 2's, for code that was written for it.

Names, order and defaults of the arguments are those of flash_attn/flash_attn_interface.py 2.5 to
2.8. They stand under wan_attn's name only: a false `flash_attn` package would switch on code paths
that need the real one (Wan2.2's prompt_extend.py asks for it by import).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from wan_attn.request import Call, Refusal, gate, refuse
from wan_attn.selection.traced import route
from wan_attn.signatures import _varlen

# What the rest of the package calls an argument -> what the callers of these functions call it.
_NAMES = {
    **{"query": "q", "key": "k", "value": "v", "scale": "softmax_scale"},
    **{"window_left": "window_size", "window_right": "window_size"},
}
_KV = {"k": "kv", "v": "kv"}
_QKV = {"q": "qkv", "k": "qkv", "v": "qkv"}
_QKV_VARLEN = {
    **_QKV,
    **{"cu_seqlens_q": "cu_seqlens", "cu_seqlens_k": "cu_seqlens"},
    **{"max_seqlen_q": "max_seqlen", "max_seqlen_k": "max_seqlen"},
}

Window = tuple[int, int] | Sequence[int] | Tensor
Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn.flash_attn_func through the selection, on any device.

    Unlike the original it takes float32 too, and any strides. A call that wants a gradient goes to
    PyTorch, which has one.

    Args:
        q: [batch, seqlen_q, heads_q, head_dim], float16, bfloat16 or float32.
        k, v: [batch, seqlen_k, heads_k, head_dim] of q's dtype; heads_k divides heads_q, and query
            head h reads key head h // (heads_q // heads_k).
        dropout_p: probability, in [0, 1). As in the original it holds whether or not a gradient is
            wanted; PyTorch computes such a call.
        softmax_scale: multiplies the scores; None: 1/sqrt(head_dim).
        causal: no row sees a key right of its diagonal, which ends bottom-right (flash-attn 2.1).
        window_size: (left, right) keys seen beside the diagonal; a negative number is no bound.
        softcap: 0.0; alibi_slopes: None. Anything else is refused: no kernel here has them.
        deterministic: accepted, because the forward pass always is; PyTorch's backward follows
            torch.use_deterministic_algorithms.
        return_attn_probs: return (out, softmax_lse, None). The third is the original's S_dmask,
            which only exists with dropout; the two together are refused.

    Returns:
        out [batch, seqlen_q, heads_q, head_dim] in q's dtype, contiguous; softmax_lse [batch,
        heads_q, seqlen_q] float32, the natural log of Σ exp(scale · score). A row that sees no key
        is 0 with -inf, as in FlashAttention 3 (version 2 says +inf).

    Raises:
        RuntimeError: "wan_attn: <argument> must be <rule>, got <value>".

    Works under torch.compile(fullgraph=True).
    """
    check_options(dropout_p, softcap, alibi_slopes, return_attn_probs, deterministic)
    call = _call(dropout_p, softmax_scale, causal, window_size, return_attn_probs)
    operands = [q, k, v]
    del q, k, v  # as in wan_attn.flash_attention: no frame keeps them for longer
    try:
        out, lse = route(operands, call)
    except Refusal as refusal:
        raise refusal.under(_NAMES) from None
    return _result(out, lse)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn.flash_attn_kvpacked_func: flash_attn_func with key and value in one tensor.

    Args:
        q: [batch, seqlen_q, heads_q, head_dim].
        kv: [batch, seqlen_k, 2, heads_k, head_dim]; read in place. The rest: flash_attn_func.
    """
    k, v = _unpack("kv", kv, 2, batched=True)
    try:
        return flash_attn_func(
            q,
            k,
            v,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        )
    except Refusal as refusal:
        raise refusal.under(_KV) from None


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn.flash_attn_qkvpacked_func: flash_attn_func with all three in one tensor.

    Args:
        qkv: [batch, seqlen, 3, heads, head_dim]; read in place. The rest: flash_attn_func.
    """
    q, k, v = _unpack("qkv", qkv, 3, batched=True)
    try:
        return flash_attn_func(
            q,
            k,
            v,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        )
    except Refusal as refusal:
        raise refusal.under(_QKV) from None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """flash_attn.flash_attn_varlen_func: the tokens of all sequences end to end.

    cu_seqlens on the CPU, which the original refuses, are the cheap case: sequences of the same
    lengths are computed together where they lie, without a copy of q, k or v. On a device they are
    not read, so nothing waits for it: the operands are gathered into [batch, max_seqlen, ...],
    which costs one pass over the padded q, k, v and out, and their memory. See _varlen.py.

    Args:
        q: [total_q, heads_q, head_dim]; k, v: [total_k, heads_k, head_dim].
        cu_seqlens_q, cu_seqlens_k: [batch + 1] int32 or int64, on the CPU or on q's device: where
            each sequence begins, and in the end where the last one ends.
        max_seqlen_q, max_seqlen_k: the longest sequence, or more. A longer sequence is refused on
            the CPU; on a device what lies beyond is cut off, as it is not looked at.
        block_table: None; a paged cache is refused.
        The rest: flash_attn_func.

    Returns:
        out [total_q, heads_q, head_dim] in q's dtype; with return_attn_probs (out, softmax_lse
        [heads_q, total_q] float32, None). Tokens outside all sequences get 0 and -inf.

    Raises:
        RuntimeError: as flash_attn_func; on the CPU also for cu_seqlens that do not fit.

    Works under torch.compile(fullgraph=True), which takes the route of device lengths.
    """
    check_options(dropout_p, softcap, alibi_slopes, return_attn_probs, deterministic)
    gate.nothing("block_table", block_table, "there is no paged cache here")
    call = _call(dropout_p, softmax_scale, causal, window_size, return_attn_probs)
    try:
        queries = _varlen.Sequences.of("q", q, cu_seqlens_q, max_seqlen_q)
        keys = _varlen.Sequences.of("k", k, cu_seqlens_k, max_seqlen_k)
        out, lse = _varlen.attend(queries, keys, v, call)
    except Refusal as refusal:
        raise refusal.under(_NAMES) from None
    return _result(out, lse)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn.flash_attn_varlen_kvpacked_func.

    Args:
        q: [total_q, heads_q, head_dim]; kv: [total_k, 2, heads_k, head_dim]; read in place.
        The rest: flash_attn_varlen_func.
    """
    k, v = _unpack("kv", kv, 2, batched=False)
    try:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        )
    except Refusal as refusal:
        raise refusal.under(_KV) from None


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn.flash_attn_varlen_qkvpacked_func.

    Args:
        qkv: [total, 3, heads, head_dim]; read in place. The rest: flash_attn_varlen_func.
    """
    q, k, v = _unpack("qkv", qkv, 3, batched=False)
    try:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        )
    except Refusal as refusal:
        raise refusal.under(_QKV_VARLEN) from None


def check_options(
    dropout_p: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    deterministic: bool = False,
) -> None:
    """Refuse, by name, what nothing here computes."""
    dropout_p = gate.probability("dropout_p", dropout_p)
    if gate.number("softcap", softcap) > 0:  # the original takes 0 and less as off
        refuse("softcap", "0.0, as no kernel here caps scores", softcap)
    gate.nothing("alibi_slopes", alibi_slopes, "no kernel here adds a bias")
    gate.flag("deterministic", deterministic)
    if gate.flag("return_attn_probs", return_attn_probs) and dropout_p > 0:
        refuse(
            "return_attn_probs",
            "False with dropout, as its third result (which weights were dropped) does not exist",
            f"True with dropout_p={dropout_p:g}",
        )


def bounds(window_size: Window) -> tuple[int, int]:
    """(left, right) as wan_attn.sdpa wants them; the original takes every negative bound as none,
    and everything that Python can turn into an integer."""
    pair: object = window_size
    if isinstance(window_size, Tensor) and not window_size.is_meta:
        gate.dense("window_size", window_size)
        pair = window_size.tolist()
    left, right = gate.pair("window_size", pair)
    return (-1 if left < 0 else left), (-1 if right < 0 else right)


def _call(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    return_lse: bool,
) -> Call:
    return Call(
        scale=None if softmax_scale is None else gate.number("softmax_scale", softmax_scale),
        is_causal=gate.flag("causal", causal),
        window=bounds(window_size),
        dropout_p=float(dropout_p),
        return_lse=bool(return_lse),
    )


def _result(out: Tensor, lse: Tensor | None) -> Result:
    """Contiguous, as the original's results are: its callers `.view` them."""
    out = out.contiguous()
    return out if lse is None else (out, lse.contiguous(), None)


def _unpack(name: str, packed: Tensor, count: int, batched: bool) -> tuple[Tensor, ...]:
    """The views of `packed` along its dimension of 2 or 3."""
    rule = f"[{'batch, seqlen' if batched else 'total'}, {count}, heads, head_dim]"
    if not isinstance(packed, Tensor):
        _refuse_operand(name, rule, type(packed).__name__)
    gate.dense(name, packed)
    if packed.dim() != (5 if batched else 4) or packed.shape[-3] != count:
        _refuse_operand(name, rule, list(packed.shape))
    return tuple(torch.unbind(packed, dim=-3))


def _refuse_operand(name: str, rule: str, got: object) -> NoReturn:
    refuse(name, f"a tensor {rule}", got)
