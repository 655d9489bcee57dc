# SPDX-License-Identifier: Apache-2.0
"""memory.py - how much memory an attention call takes at most, told without making it.

What is counted is what torch's allocator gives out: operands, copies in another dtype, the
backend's workspace, the result; no weights and no cache of the allocator. The caller is taken to
keep neither query nor key, as stock Wan2.2's self-attention: one that is converted is then freed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from wan_attn.backends import chunked, fa2, fa3, native, reads_float32, torch_sdpa, xformers
from wan_attn.config import current
from wan_attn.native import kernels, rope
from wan_attn.request import Request

# What stock Wan2.2's block takes at most for each element of its input (tokens * width), beside its
# weights: 28 are there when it begins (the input and six modulations in float32), and the most is
# held while its RoPE turns the key in float64. benchmarks/bench_memory.py measures it.
WAN22_BLOCK_BYTES = 88

# The same where rms_norm_rope stands in for the RoPE: now the feed-forward layer holds the most.
WAN22_BLOCK_BYTES_ROPE = 85

# Rows of query and keys that one thread of PyTorch's CPU kernel takes at a time, by the length of
# query, as in the FlashAttentionKernel of its ATen.
_CPU_ROWS = ((768, 256), (192, 64), (0, 32))
_CPU_KEYS = 512


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one call.

    Attributes:
        operands: query, key and value as they are given.
        copies: of query and key in value's dtype, for a backend that does not read float32.
        workspace: the backend's own, its log-sum-exp included.
        result: out in query's dtype; where the backend computes it in value's, that one as well.
        peak: the most of all that at one time.
    """

    operands: int
    copies: int
    workspace: int
    result: int
    peak: int


def footprint(request: Request, backend: str, variant: str = "") -> Footprint | None:
    """The memory of this call on this backend; None: not known in advance.

    Args:
        variant: the row of `sdpa` that computes; "": the best one that takes the call.
    """
    reads = reads_float32(backend, request, variant)
    read = replace(
        request,
        query_dtype=request.query_dtype if reads[0] else request.dtype,
        key_dtype=request.key_dtype if reads[1] else request.dtype,
    )
    workspace = _workspace(read, backend, variant)
    if workspace is None:
        return None
    given_q, given_k = _query(request, request.query_dtype), _key(request, request.key_dtype)
    query, key, value = _query(read, read.query_dtype), _key(read, read.key_dtype), _value(request)
    out, result = _query(read, read.query_dtype), _query(request, request.query_dtype)
    held, copies = given_q + given_k + value, 0
    most = [held]
    if query != given_q:
        most.append(held + query)
        held, copies = held - given_q + query, copies + query
    if key != given_k:
        most.append(held + key)
        held, copies = held - given_k + key, copies + key
    most += [held + workspace + out, out if out == result else out + result]
    return Footprint(
        operands=given_q + given_k + value,
        copies=copies,
        workspace=workspace,
        result=out if out == result else out + result,
        peak=max(most),
    )


def _size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype, device="cpu").element_size()


def _query(r: Request, dtype: torch.dtype) -> int:
    return r.batch * r.seqlen_q * r.num_heads_q * r.head_dim * _size(dtype)


def _key(r: Request, dtype: torch.dtype) -> int:
    return r.batch * r.seqlen_k * r.num_heads_k * r.head_dim * _size(dtype)


def _value(r: Request) -> int:
    return _key(r, r.dtype)


def _workspace(r: Request, backend: str, variant: str) -> int | None:
    """What the backend takes beside operands and result; None: that depends on the call's numbers,
    or on what its library does."""
    lse = r.batch * r.num_heads_q * r.seqlen_q * 4
    if backend == native.NAME:
        found = kernels.workspace_bytes(r, variant)
        return None if found is None else found + lse * r.return_lse
    is_plain = not (r.needs_grad or r.return_lse or r.is_causal or r.window != (-1, -1))
    if not is_plain or (r.num_heads_q != r.num_heads_k and backend == torch_sdpa.NAME):
        return None
    if backend in (fa2.NAME, fa3.NAME, xformers.NAME):
        return lse
    is_direct = backend == chunked.NAME and (
        chunked.choose_method(r, current().chunk_threshold, chunked.MAX_ELEMENTS) == "direct"
    )
    if backend == torch_sdpa.NAME or is_direct:
        if torch_sdpa.needs_square_memory(r) is not None:
            return None
        return lse + (_cpu_buffers(r) if r.device.type == "cpu" else 0)
    return None


def _cpu_buffers(r: Request) -> int:
    """PyTorch's CPU kernel: for each thread a tile of scores, their rows' sums and the result in
    float32, and the scores again in the dtype of a half value."""
    rows = min(r.seqlen_q, next(size for least, size in _CPU_ROWS if r.seqlen_q >= least))
    keys = min(r.seqlen_k, _CPU_KEYS)
    floats = rows * (keys + 2 + r.head_dim)
    halves = rows * keys if r.dtype != torch.float32 else 0
    return torch.get_num_threads() * (4 * floats + 2 * halves)


def device_bytes(device: torch.device) -> int | None:
    """The memory of the card, or of the machine for its CPU; None: not known."""
    if device.type == "cuda":
        index = device.index or 0
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            return None
        return int(torch.cuda.get_device_properties(index).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no such question
        return None


def facts(request: Request, backend: str, variant: str = "") -> dict[str, Any] | None:
    """The footprint as plain values, beside what the device has."""
    found = footprint(request, backend, variant)
    if found is None:
        return None
    return {
        "operands_bytes": found.operands,
        "copies_bytes": found.copies,
        "workspace_bytes": found.workspace,
        "result_bytes": found.result,
        "peak_bytes": found.peak,
        "device_bytes": device_bytes(request.device),
    }


def block_bytes(request: Request) -> int:
    """What stock Wan2.2's block around a call of its self-attention takes, without its weights."""
    elements = request.batch * request.seqlen_q * request.num_heads_q * request.head_dim
    is_fused = current().rope == "auto" and rope.why_not(request.device) is None
    return (WAN22_BLOCK_BYTES_ROPE if is_fused else WAN22_BLOCK_BYTES) * elements


def told(found: dict[str, Any]) -> str:
    """The facts as a line of text."""
    whole = found["device_bytes"]
    of_all = f" of {gib(whole)}" if whole else ""
    parts = [
        f"{name} {gib(found[f'{key}_bytes'])}"
        for name, key in (
            ("operands", "operands"),
            ("copies", "copies"),
            ("workspace", "workspace"),
            ("result", "result"),
        )
        if found[f"{key}_bytes"]
    ]
    return f"{gib(found['peak_bytes'])} at most{of_all} ({', '.join(parts)})"


def gib(count: int) -> str:
    """Bytes in the unit that suits them."""
    if count >= 1 << 30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB"
