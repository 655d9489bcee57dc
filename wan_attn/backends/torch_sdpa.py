# SPDX-License-Identifier: Apache-2.0
"""torch_sdpa.py - backend `torch`: PyTorch's SDPA under wan_attn's contract, differentiable.

Padding never reaches a kernel: real lengths known here are sliced off, lengths on a device are
    masked after what lies beyond them has been zeroed. A mask is made only where rows see different
    keys, and then for a block of rows at a time, so that no [seqlen_q, seqlen_k] buffer exists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from wan_attn.backends import _torch_kernels
from wan_attn.backends._common import (
    amd_architecture,
    capability,
    empty_result,
    heads_first,
    in_graph,
    log_sum_exp,
    outside_autocast,
    positive_scale,
    with_all_batches,
)
from wan_attn.backends._masks import DeviceMask, HostMask
from wan_attn.request import MAX_HEAD_DIM, Call, Request, host_lengths

NAME = "torch"
TITLE = "PyTorch SDPA"

# Below this share of real query-key pairs each sample is computed alone at its real lengths.
PER_SAMPLE_RATIO = 0.7
# AMD cards before RDNA 3, for which ROCm's attention library (AOTriton) has no kernels.
_AMD_WITHOUT_FUSED = "gfx10"
MASK_ELEMENTS = 1 << 24  # of one block: 16 MiB of bool, 32 MiB once a kernel made a bias of it


def why_not(request: Request) -> str | None:
    """None: it takes every call of the contract."""
    return None


def needs_square_memory(request: Request) -> str | None:
    """Why only PyTorch's math path, which stores every score, would serve this call, or None."""
    kind = request.device.type
    if kind == "cpu":
        return "PyTorch has no fused CPU kernel with dropout" if request.dropout_p > 0 else None
    if kind == "mps":
        return "PyTorch has no fused kernel on Apple's GPUs"
    amd = amd_architecture(request.device)
    if amd.startswith(_AMD_WITHOUT_FUSED):
        return f"PyTorch has no fused kernel for {amd}"
    arch = capability(request.device)
    if arch is None:
        return None
    major = arch[0]
    if request.dtype == torch.float64:
        return "PyTorch has no fused CUDA kernel for float64"
    if request.dtype == torch.bfloat16 and major < 8:
        return f"PyTorch has no fused kernel for bfloat16 on compute capability {major}.x"
    is_half = request.dtype in (torch.float16, torch.bfloat16)
    if is_half and major >= 8 and _torch_kernels.has_flash() and request.head_dim <= MAX_HEAD_DIM:
        return None
    multiple = 8 if is_half and major >= 8 else 4
    if request.head_dim % multiple:
        return (
            f"PyTorch's fused kernels here need head_dim % {multiple} == 0, got {request.head_dim}"
        )
    return None


def run(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute attention in value's dtype; see Backend.run and wan_attn.sdpa.

    Lengths on a device are not read here. lse is computed on its own from fp32 scores, because
    PyTorch does not give it out.

    Raises:
        RuntimeError: a length on the CPU is out of range.
    """
    batch, seqlen_q = query.shape[:2]
    q_host = host_lengths("q_lens", call.q_lens, batch, seqlen_q)
    k_host = host_lengths("k_lens", call.k_lens, batch, key.shape[1])
    if q_host is None or k_host is None:
        return run_unread(query, key, value, call)
    out_dtype = query.dtype
    with outside_autocast(query.device):
        query = with_all_batches(query, key, value)
        query, scale = positive_scale(query.to(value.dtype), call.scale)
        key = key.to(value.dtype)
        out, lse = _known_lengths(query, key, value, q_host, k_host, scale, call)
    return _finish(out.to(out_dtype), lse, query, key, value)


def run_by(
    kernel: SDPBackend, is_alone: bool, query: Tensor, key: Tensor, value: Tensor, call: Call
) -> tuple[Tensor, Tensor | None]:
    """`run` by this kernel of PyTorch's on CUDA, and by others only where it refuses.

    Args:
        is_alone: by no other kernel.

    Raises:
        RuntimeError: is_alone, and the kernel refuses the call.
    """
    with _torch_kernels.asking(kernel, is_alone):
        return run(query, key, value, call)


def run_unread(
    query: Tensor, key: Tensor, value: Tensor, call: Call
) -> tuple[Tensor, Tensor | None]:
    """`run` without looking at the lengths: for those on a device, and for torch.compile's tracer.

    Lengths out of range are clamped.
    """
    out_dtype = query.dtype
    with outside_autocast(query.device):
        if not torch.compiler.is_compiling():
            query = with_all_batches(query, key, value, call.q_lens, call.k_lens)
        query, scale = positive_scale(query.to(value.dtype), call.scale)
        key = key.to(value.dtype)
        mask = DeviceMask.make(call, query, key.shape[1])
        out, lse = _batched(query, key, value, mask, scale, call)
    return _finish(out.to(out_dtype), lse, query, key, value)


def _finish(out: Tensor, lse: Tensor | None, *operands: Tensor) -> tuple[Tensor, Tensor | None]:
    return in_graph(out, *operands), None if lse is None else in_graph(lse, *operands)


def _known_lengths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_host: list[int],
    k_host: list[int],
    scale: float,
    call: Call,
) -> tuple[Tensor, Tensor | None]:
    batch, seqlen_q = query.shape[:2]
    lengths = list(zip(q_host, k_host, strict=True))
    masks = [HostMask.make(q_len, k_len, call) for q_len, k_len in lengths]
    is_uniform = len(set(lengths)) == 1
    if (
        is_uniform
        and masks[0].q_len == seqlen_q
        and masks[0].first_row == 0
        and not call.return_lse
    ):
        mask = masks[0]
        if mask.k_len and (mask.is_full or mask.is_plain_causal):
            key, value = key[:, : mask.k_len], value[:, : mask.k_len]
            return _one_kernel(query, key, value, mask, scale, call.dropout_p), None
    pairs = sum(q_len * k_len for q_len, k_len in lengths)
    rows_matter = any(not mask.is_full for mask in masks)
    if (
        not is_uniform
        and not rows_matter
        and pairs >= PER_SAMPLE_RATIO * batch * seqlen_q * key.shape[1]
    ):
        lens = call._replace(
            q_lens=torch.tensor(q_host, device="cpu"), k_lens=torch.tensor(k_host, device="cpu")
        )
        padded = DeviceMask.make(lens, query, key.shape[1])
        return _batched(query, key, value, padded, scale, call)
    out, lse = empty_result(query, query.dtype, call.return_lse)
    groups = (
        [(slice(0, batch), masks[0])]
        if is_uniform
        else [(slice(b, b + 1), mask) for b, mask in enumerate(masks)]
    )
    for samples, mask in groups:
        _fill(
            out[samples, : mask.q_len],
            None if lse is None else lse[samples, :, : mask.q_len],
            query[samples, : mask.q_len],
            key[samples, : mask.k_len],
            value[samples, : mask.k_len],
            mask,
            scale,
            call.dropout_p,
        )
    return out, lse


def _one_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: HostMask, scale: float, dropout_p: float
) -> Tensor:
    """The common call: no mask, one kernel, nothing copied. [batch, seqlen_q, heads, head_dim]."""
    q, k, v = heads_first(query, key, value)
    is_causal = mask.is_plain_causal and not mask.is_full
    return _torch_kernels.attend(q, k, v, None, is_causal, scale, dropout_p).transpose(1, 2)


def _fill(
    out: Tensor,
    lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: HostMask,
    scale: float,
    dropout_p: float,
) -> None:
    """Write rows that see a key: out [batch, q_len, heads, head_dim], lse [batch, heads, q_len]."""
    if mask.first_row >= mask.q_len or query.shape[0] == 0:
        return
    if lse is None and (mask.is_full or mask.is_plain_causal):
        out.copy_(_one_kernel(query, key, value, mask, scale, dropout_p))
        return
    q, k, v = heads_first(query, key, value)
    step = block_rows(mask)
    for begin in range(mask.first_row, mask.q_len, step):
        end = min(begin + step, mask.q_len)
        low, high = mask.keys(begin, end)
        rows, keys = q[:, :, begin:end], k[:, :, low:high]
        keep = mask.block(begin, end, low, high, query.device)
        values = v[:, :, low:high]
        part = _torch_kernels.attend(rows, keys, values, keep, False, scale, dropout_p)
        out[:, begin:end].copy_(part.transpose(1, 2))
        if lse is not None:
            lse[:, :, begin:end].copy_(log_sum_exp(rows, keys, keep, scale))


def block_rows(mask: HostMask) -> int:
    """Rows per block: its mask stays small, and a window can skip the keys outside it."""
    if mask.is_full:
        return mask.q_len
    if mask.left is not None and mask.right is not None:
        return max(256, mask.left + mask.right + 1)
    return max(16, MASK_ELEMENTS // max(1, mask.k_len))


def _batched(
    query: Tensor, key: Tensor, value: Tensor, mask: DeviceMask, scale: float, call: Call
) -> tuple[Tensor, Tensor | None]:
    """The whole padded batch at once, lengths used only in device arithmetic."""
    batch, seqlen_q = query.shape[:2]
    out, lse = empty_result(query, query.dtype, call.return_lse)
    if 0 in (batch, seqlen_q, key.shape[1]):
        return out, lse
    # What lies beyond the lengths may be NaN, and 0 · NaN is NaN: a mask alone would not keep it
    # out.
    real_rows, real_keys = mask.real_rows(), mask.real_keys()
    q, k, v = heads_first(
        query.masked_fill(~real_rows, 0),
        key.masked_fill(~real_keys, 0),
        value.masked_fill(~real_keys, 0),
    )
    step = max(16, MASK_ELEMENTS // (batch * key.shape[1])) if mask.rows_matter else seqlen_q
    for begin in range(0, seqlen_q, step):
        end = min(begin + step, seqlen_q)
        keep = mask.block(begin, end)
        sees = keep.any(-1, keepdim=True)  # [batch, 1, rows or 1, 1]
        alive = sees & real_rows.transpose(1, 2)[:, :, begin:end]
        # Rows without a key get key 0, and their result is dropped: before torch 2.5 a softmax over
        # nothing is NaN, which would reach the gradients.
        keep[..., :1] |= ~sees
        rows = q[:, :, begin:end]
        part = _torch_kernels.attend(rows, k, v, keep, False, scale, call.dropout_p)
        out[:, begin:end].copy_(part.masked_fill(~alive, 0).transpose(1, 2))
        if lse is not None:
            part_lse = log_sum_exp(rows, k, keep, scale).masked_fill(~alive[..., 0], -math.inf)
            lse[:, :, begin:end].copy_(part_lse)
    return out, lse
