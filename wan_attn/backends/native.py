# SPDX-License-Identifier: Apache-2.0
"""native.py - backend `sdpa`: torch.ops.wan_attn.sdpa, our own kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wan_attn import config
from wan_attn.backends import torch_sdpa
from wan_attn.backends._errors import is_device_error
from wan_attn.native import (
    autograd,
    backward,
    bindings,
    cuda_driver,
    kernels,
    op,
    rope_on_cuda,
    shim,
)
from wan_attn.native.library import EXACT, QK8
from wan_attn.request import Blocks, Call, Request, wants_grad
from wan_attn.request.blocks import DENSE
from wan_attn.selfcheck import backward_calls, first_call, proof, rope_calls
from wan_attn.transient import is_interruption, is_out_of_memory

NAME = "sdpa"
TITLE = "wan_attn SDPA"

op.register(fallback=torch_sdpa.run)
cuda_driver.prove_with(proof.find_proof)
rope_on_cuda.guard_with(rope_calls.verdict, is_device_error)
# Past the packet, which would resolve the overload at each call.
_op = torch.ops.wan_attn.sdpa.default


def prove(device: torch.device) -> None:
    """Before the first call on a CUDA device: makes the proof of our kernels, if there is none."""
    if device.type == "cuda" and proof.has_kernels() and config.current().self_check:
        proof.ensure(device.index or 0)


def why_not(request: Request, precision: int = EXACT) -> str | None:
    """Why none of our kernels takes this call; None: one does.

    Args:
        precision: QK8 asks for the lossy ones.
    """
    if request.needs_grad and precision != EXACT:
        return "a gradient is wanted"
    if request.dropout_p > 0:
        return "has no dropout"
    if op.binding() == "torch":
        return f"no native library: {op.binding_reason()}"
    if request.device.type == "cuda" and torch.version.hip is not None:
        return "this torch is made for AMD GPUs, and our CUDA kernels are not"
    if not any(kernel.device == request.device.type for kernel in kernels.kernels()):
        return f"no kernel for {request.device.type} in this build"  # rather than one line per row
    kernel, reasons = kernels.select(request, precision)
    if kernel is None:
        return reasons
    return _why_no_gradient(request) if request.needs_grad else None


def _why_no_gradient(request: Request) -> str | None:
    """Why it is better left to another backend; None: a row computes it fast."""
    row, reasons = backward.select(request)
    if row is None:
        return reasons
    return "its gradients are portable C on this CPU" if row == backward.PORTABLE else None


def gradient_name(request: Request) -> str:
    """The row that computes gradients of this call; "torch": PyTorch's operators do."""
    if request.device.type == "cpu" and request.seqlen_q <= autograd.FEW_ROWS:
        return "torch"
    return backward.chosen(request) or "torch"


def kernel_name(request: Request, precision: int = EXACT) -> str | None:
    """The row of the kernel table that would take this call, made of contiguous tensors."""
    kernel, _ = kernels.select(request, precision)
    return None if kernel is None else kernel.name


def reads_float32(request: Request, row: str = "") -> tuple[bool, bool]:
    """Whether the row for this call reads a float32 query, and key, beside a half value in place.

    The CPU's rows do. A CUDA row that copies one has room for it in its workspace.

    Args:
        row: of the kernel table, by name; "": the best one that takes the call.
    """
    if request.device.type == "cpu":
        return True, True
    r, needed = request, kernels.workspace_bytes(request, row)
    size = torch.empty((), dtype=r.dtype).element_size() * r.batch * r.head_dim

    def is_read(without: Request, copy: int) -> bool:
        """Whether the call without the float32 operand needs no copy's room less."""
        less = kernels.workspace_bytes(without, row)
        return needed is None or less is None or needed - less < max(1, copy)

    query = is_read(replace(r, query_dtype=r.dtype), r.seqlen_q * r.num_heads_q * size)
    key = is_read(replace(r, key_dtype=r.dtype), r.seqlen_k * r.num_heads_k * size)
    return query, key


def last_kernel() -> str | None:
    """The row that the last call of this thread ran on, as C says it; None: there was none."""
    row = bindings.last_kernel()
    return None if row < 0 else kernels.kernels()[row].name


def run(
    query: Tensor, key: Tensor, value: Tensor, call: Call, kernel: int = -1, **lossy: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention by our kernels; see Backend.run and wan_attn.sdpa.

    float32 query and key beside a half value are read as they are, without a converted copy; out is
    in value's dtype where call.out_dtype asks for that.

    Args:
        kernel: the row of the kernel table that computes; -1: the best one that takes the call.
        lossy: `precision`, QK8 for a lossy row; Blocks' fields; `guard`, [4] or [5] int32 on
            query's device, which the call adds to (wan_attn_guard in csrc/wan_attn.h).
    """
    if query.is_cuda:
        is_lossy = lossy.get("precision", EXACT) != EXACT
        has_lists = lossy.get("block_counts") is not None or lossy.get("skip_threshold", 0.0) > 0.0
        _require_self_check(query.device, value.dtype, query.shape[3], is_lossy, has_lists)
        if wants_grad(query, key, value) and backward.takes(query, key, value):
            _require_gradient_check(query.device, value.dtype, query.shape[3])
    left, right = call.window
    out, lse = _call(
        query,
        key,
        value,
        call.q_lens,
        call.k_lens,
        scale=call.scale,
        is_causal=call.is_causal,
        window_left=left,
        window_right=right,
        return_lse=call.return_lse,
        kernel=kernel,
        out_like_value=call.out_dtype is value.dtype,
        **lossy,
    )
    return out, lse if call.return_lse else None


def _require_self_check(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    is_lossy: bool = False,
    has_lists: bool = False,
) -> None:
    """Raises RuntimeError, so that the next backend is tried, for a kernel that is wrong here."""
    answer = _answer_in_8_bits if is_lossy else _answer
    wrong = first_call.verdict(
        answer,
        last_kernel,
        device,
        dtype,
        head_dim,
        _is_final,
        is_lossy=is_lossy,
        has_lists=has_lists,
    )
    if wrong is not None:
        raise RuntimeError(f"wan_attn: the kernel for this call is wrong on {device}: {wrong}")


def _require_gradient_check(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """The same of the kernel of gradients, before forward leaves anything to it."""
    wrong = first_call.settled(
        (device, dtype, head_dim, "gradients"),
        lambda: backward_calls.first_wrong(_gradients, device, dtype, head_dim),
        backward.last_kernel,
        _is_final,
    )
    if wrong is not None:
        raise RuntimeError(f"wan_attn: the kernel of gradients is wrong on {device}: {wrong}")


def _gradients(inputs: backward_calls.Inputs, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A call of selfcheck/backward_calls.py."""
    op = torch.ops.wan_attn.sdpa_backward
    query, key, value = op(*inputs.tensors, is_causal=is_causal)
    return query, key, value


def _is_final(error: RuntimeError) -> bool:
    """Not what may be otherwise next time: memory, a device in trouble, a time limit."""
    return not is_device_error(error) and not is_interruption(error)


def _answer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lens: Tensor | None,
    k_lens: Tensor,
    is_causal: bool,
    blocks: Blocks = DENSE,
    **precision: int,
) -> tuple[Tensor, Tensor]:
    """A call of selfcheck/first_call.py."""
    options = {"is_causal": is_causal, "return_lse": True, **blocks._asdict(), **precision}
    return _call(query, key, value, q_lens, k_lens, **options)


_answer_in_8_bits = partial(_answer, precision=QK8)


def _call(query: Tensor, *operands: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The op. What C could not pass on, it raises: Ctrl-C while a kernel was compiled, and torch's
    own exception where there was no memory."""
    function: Any = bindings.ctypes_sdpa if "guard" in options else _op
    try:
        out, lse = function(query, *operands, **options)
    except RuntimeError as error:
        cuda_driver.raise_interruption()
        shim.raise_out_of_memory(error)
        is_drivers = is_out_of_memory(error) and type(error) is RuntimeError
        if not is_drivers or not query.is_cuda or torch.cuda.is_current_stream_capturing():
            raise
    else:
        return out, lse
    # The driver had none left for a module, of which torch may hold gigabytes in its cache.
    torch.cuda.empty_cache()
    try:
        out, lse = function(query, *operands, **options)
    except RuntimeError as error:
        if is_out_of_memory(error) and not isinstance(error, torch.cuda.OutOfMemoryError):
            raise torch.cuda.OutOfMemoryError(str(error)) from error
        raise
    return out, lse
