# SPDX-License-Identifier: Apache-2.0
"""native.py - backend `sdpa`: torch.ops.wan_attn.sdpa, our own kernels; forward only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wan_attn.native import cuda_driver, shim
from wan_attn.request import Request
from wan_attn.selfcheck import first_call

NAME = "sdpa"
TITLE = "wan_attn SDPA"


def why_not(request: Request) -> str | None:
    """Why none of our kernels takes this call; None: one does."""
    if request.needs_grad:
        return "forward only, and a gradient is wanted"
    if request.dropout_p > 0:
        return "has no dropout"
    from wan_attn.native import op  # registers the op; not before it is asked for

    if op.binding() == "torch":
        return f"no native library: {op.binding_reason()}"
    if request.device.type == "cuda" and torch.version.hip is not None:
        return "this torch is made for AMD GPUs, and our CUDA kernels are not"
    if not any(kernel.device == request.device.type for kernel in op.kernels()):
        return f"no kernel for {request.device.type} in this build"  # rather than one line per row
    kernel, reasons = op.select(request)
    return None if kernel is not None else reasons


def kernel_name(request: Request) -> str | None:
    """The row of the kernel table that takes this call."""
    from wan_attn.native import op

    kernel, _ = op.select(request)
    return None if kernel is None else kernel.name


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention by our kernels; see wan_attn.sdpa for the contract.

    float32 query and key beside a half value are read as they are, without a converted copy.

    Returns:
        out [batch, seqlen_q, num_heads_q, head_dim] in query's dtype, and lse [batch, num_heads_q,
        seqlen_q] float32 or None.
    """
    if query.is_cuda:
        _require_proof(query.device, value.dtype, query.shape[3])
    out_dtype = query.dtype
    out, lse = _call(
        _readable(query, value.dtype),
        _readable(key, value.dtype),
        _readable(value, value.dtype),
        q_lens,
        k_lens,
        scale=scale,
        is_causal=is_causal,
        window_left=window[0],
        window_right=window[1],
        return_lse=return_lse,
    )
    return out if out.dtype == out_dtype else out.to(out_dtype), lse if return_lse else None


def _require_proof(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raises RuntimeError, so that the next backend takes over, for a kernel that is wrong here."""
    wrong = first_call.verdict(_answer, device, dtype, head_dim)
    if wrong is not None:
        raise RuntimeError(f"wan_attn: the kernel for this call is wrong on {device}: {wrong}")


def _answer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lens: Tensor | None,
    k_lens: Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """A call of selfcheck/first_call.py."""
    return _call(query, key, value, q_lens, k_lens, is_causal=is_causal, return_lse=True)


def _call(*operands: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The op. What C could not pass on, it raises: Ctrl-C while a kernel was compiled, and torch's
    own exception where there was no memory."""
    try:
        out, lse = _op()(*operands, **options)
    except RuntimeError as error:
        cuda_driver.raise_interruption()
        shim.raise_out_of_memory(error)
        raise
    return out, lse


def _op() -> torch._ops.OpOverload:
    """The op, looked up past the packet that would resolve the overload at each call."""
    global _overload
    if _overload is None:
        from wan_attn.native import op  # noqa: F401 - registers it

        _overload = torch.ops.wan_attn.sdpa.default
    return _overload


_overload: torch._ops.OpOverload | None = None


def _readable(tensor: Tensor, value_dtype: torch.dtype) -> Tensor:
    """What the kernels can read: float32 or value's dtype, and stride 1 in the last dimension."""
    if tensor.dtype != torch.float32 and tensor.dtype != value_dtype:
        tensor = tensor.to(value_dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
