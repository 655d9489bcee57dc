# SPDX-License-Identifier: Apache-2.0
"""attention.py - the two public functions, which describe a call and hand it on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wan_attn.request import DTYPES, Call, Refusal, gate, refuse
from wan_attn.selection.traced import route

# Of flash_attention's arguments: what the rest of the package calls them -> what its callers do.
_NAMES = {
    **{"query": "q", "key": "k", "value": "v"},
    **{"scale": "softmax_scale", "window_left": "window_size", "window_right": "window_size"},
}


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q_lens: Tensor | Sequence[int] | None = None,
    k_lens: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled-dot-product attention, exact, on the backend that the selection names.

    Row i of sample b sees key j if j < k_lens[b] and i < q_lens[b] and, with d = i + k_lens[b] -
    q_lens[b] (its diagonal, aligned bottom-right as in flash-attn >= 2.1), j <= d if is_causal and
    d - window[0] <= j <= d + window[1]. A row that sees no key gets 0 and an lse of -inf. Memory
    beyond the lengths may hold NaN: it never reaches a result. The same input gives the same bits.

    Args:
        query: [batch, seqlen_q, num_heads_q, head_dim], float16, bfloat16 or float32; any strides.
        key, value: [batch, seqlen_k, num_heads_k, head_dim]; num_heads_k divides num_heads_q, and
            query head h reads key head h // (num_heads_q // num_heads_k). query and key have
            value's dtype, which is computed in (accumulating in float32), or float32. With
            WAN_FORCE_FP16=1 everything is computed in float16.
        q_lens, k_lens: [batch] real lengths, int32 or int64, on the CPU or on query's device, or
            Python integers; None: all. Lengths on a device cost no sync and are clamped.
        scale: multiplies the scores; None: 1/sqrt(head_dim).
        is_causal: no row sees a key to the right of its diagonal.
        window: (left, right) keys seen beside the diagonal; -1 is no bound.
        return_lse: also return the log-sum-exp, which wan_attn.merge_states needs.
        out_dtype: of the result: float16, bfloat16 or float32; None: query's.

    Returns:
        out [batch, seqlen_q, num_heads_q, head_dim] in out_dtype; with return_lse also lse
        [batch, num_heads_q, seqlen_q] float32, the natural log of Σ exp(scale · score).

    Raises:
        RuntimeError: "wan_attn: <argument> must be <rule>, got <value>" for a bad argument; or no
            backend takes the call, with every backend's reason; or the device is in trouble.

    Differentiable: a call that needs a gradient goes to a backend that has one. Works under
    torch.compile(fullgraph=True).
    """
    call = Call(
        q_lens=None if q_lens is None else gate.lengths("q_lens", q_lens),
        k_lens=None if k_lens is None else gate.lengths("k_lens", k_lens),
        scale=scale if scale is None or type(scale) is float else gate.number("scale", scale),
        is_causal=is_causal if type(is_causal) is bool else gate.flag("is_causal", is_causal),
        window=gate.pair("window", window),
        return_lse=return_lse if type(return_lse) is bool else gate.flag("return_lse", return_lse),
        out_dtype=out_dtype if out_dtype is None else _one_of_ours("out_dtype", out_dtype),
    )
    operands = [query, key, value]
    del query, key, value  # see flash_attention
    out, lse = route(operands, call)
    return out if lse is None else (out, lse)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | Sequence[int] | None = None,
    k_lens: Tensor | Sequence[int] | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    version: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Wan2.2's flash_attention, through the selection, on any device.

    Signature and meaning are those of wan/modules/attention.py at 42bf4cf. Unlike it, this takes
    q_lens shorter than q, keeps the window on every backend, rounds each operand once (a float32 q
    beside a half v not at all where a kernel reads it), and makes nothing on the device per call.
    It holds no operand longer than it needs it: one that its caller does not keep, as Wan2.2 keeps
    neither q nor k, is freed once it is converted, and before the result is.

    Args:
        q: [B, Lq, Nq, C]; k, v: [B, Lk, Nk, C]. Nq must be divisible by Nk. Any float dtype.
        q_lens, k_lens: [B] real lengths, int32 or int64, on the CPU or the device; None: all.
        dropout_p: probability; taken as 0 while grad is disabled.
        softmax_scale: of QK^T before softmax; None: 1/sqrt(C).
        q_scale: multiplies q: a number goes into the scale, exactly; a tensor is multiplied in.
        causal: bottom-right aligned causal mask. window_size: (left, right), -1 is no bound.
        deterministic: accepted. The forward pass always is, and so is FlashAttention's backward
            here; PyTorch's follows torch.use_deterministic_algorithms.
        dtype: what to compute in if v is not half: float16, float32, or bfloat16, which leaves the
            choice to the card: float16 on RTX 20, 30 and 40, else bfloat16. WAN_FORCE_FP16=1 wins.
        version: 2 leaves FlashAttention 3 out; 3 prefers it, as None does.
        out_dtype: of the result, not in the original: float16, bfloat16 or float32; None: q's.

    Returns:
        [B, Lq, Nq, C] in out_dtype, contiguous. Rows beyond q_lens, and rows that see no key, are
        0.

    Raises:
        RuntimeError: as wan_attn.sdpa.
    """
    operands = [q, k, v]
    del q, k, v  # a frame that keeps them would keep their memory while attention is computed
    return attend(
        operands,
        q_lens,
        k_lens,
        dropout_p,
        softmax_scale,
        q_scale,
        causal,
        window_size,
        deterministic,
        dtype,
        version,
        out_dtype,
    )


def attend(
    operands: list[Tensor],
    q_lens: Tensor | Sequence[int] | None = None,
    k_lens: Tensor | Sequence[int] | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    version: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """flash_attention for hosts that hand over [q, k, v] in a list, which is emptied."""
    if dtype not in DTYPES:
        refuse("dtype", "torch.float16, torch.bfloat16 or torch.float32", gate.shown(dtype))
    if version is not None and (type(version) is not int or version not in (2, 3)):
        refuse("version", "None, 2 or 3", gate.shown(version))
    if type(deterministic) is not bool:
        gate.flag("deterministic", deterministic)
    if softmax_scale is not None and type(softmax_scale) is not float:
        softmax_scale = gate.number("softmax_scale", softmax_scale)
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = gate.probability("dropout_p", dropout_p)
        if not torch.is_grad_enabled():
            dropout_p = 0.0
    if q_lens is not None and type(q_lens) is not Tensor:
        q_lens = gate.lengths("q_lens", q_lens)
    if k_lens is not None and type(k_lens) is not Tensor:
        k_lens = gate.lengths("k_lens", k_lens)
    if out_dtype is not None:
        _one_of_ours("out_dtype", out_dtype)
    if q_scale is not None:
        softmax_scale, out_dtype = _with_q_scale(operands, q_scale, softmax_scale, out_dtype)
    call = Call(
        q_lens=q_lens,
        k_lens=k_lens,
        scale=softmax_scale,
        is_causal=causal if type(causal) is bool else gate.flag("causal", causal),
        window=gate.pair("window_size", window_size),
        dropout_p=dropout_p,
        dtype=dtype,
        version=version,
        out_dtype=out_dtype,
    )
    try:
        out, _ = route(operands, call)
    except Refusal as refusal:
        raise refusal.under(_NAMES) from None
    # Contiguous as the original's: callers `.view` it.
    return out.contiguous()


def _one_of_ours(name: str, dtype: object) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in DTYPES:
        return dtype
    refuse(name, "None, torch.float16, torch.bfloat16 or torch.float32", gate.shown(dtype))


def _with_q_scale(
    operands: list[Tensor],
    q_scale: float | Tensor,
    scale: float | None,
    out_dtype: torch.dtype | None,
) -> tuple[float | None, torch.dtype | None]:
    """softmax_scale, or q among the operands, with q_scale in it, and the dtype of the result."""
    q = operands[0]
    gate.dense("q", q)
    if not isinstance(q_scale, Tensor):
        q_scale = gate.number("q_scale", q_scale)
        if scale is None:
            if q.dim() != 4 or q.shape[-1] < 1:
                return q_scale, out_dtype  # which is refused with the rest of the call
            scale = q.shape[-1] ** -0.5
        return gate.number("q_scale", q_scale * scale), out_dtype
    gate.dense("q_scale", q_scale)
    if not q_scale.is_floating_point():
        refuse("q_scale", "a number or a tensor of a floating-point dtype", q_scale.dtype)
    if q_scale.device != q.device and (q_scale.dim() > 0 or q_scale.is_meta):
        refuse("q_scale", f"on q's device {q.device}", q_scale.device)
    if not q.is_floating_point():
        return scale, out_dtype  # likewise
    sizes = zip(reversed(q_scale.shape), reversed(q.shape), strict=False)
    if q_scale.dim() > q.dim() or any(size not in (1, whole) for size, whole in sizes):
        refuse("q_scale", f"broadcastable to q's {list(q.shape)}", gate.shown(q_scale))
    operands[0] = q * q_scale  # perhaps in another dtype
    return scale, q.dtype if out_dtype is None else out_dtype
