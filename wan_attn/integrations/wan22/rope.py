# SPDX-License-Identifier: Apache-2.0
"""rope.py - Wan2.2's RMS norm and its rotation, each for itself, through
torch.ops.wan_attn.rms_norm_rope: functions that stand where Wan2.2's were.

A call that our kernels do not take goes to the function that was there: a gradient, another device,
other dtypes.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wan_attn.integrations._rope import FLOATS, MAX_HEAD_DIM, is_plain, rms_norm_rope, takes

Function = Callable[..., Any]


def table_of(freqs: Any, x: Tensor, grid_sizes: Any) -> Tensor | None:
    """Wan2.2's angles of each position, complex128 [positions, head_dim / 2], as ours; None: these
    are others."""
    if type(freqs) is not Tensor or type(grid_sizes) is not Tensor:
        return None
    is_known = freqs.dtype == torch.complex128 and freqs.dim() == 2
    is_grid = grid_sizes.shape == (x.shape[0], 3) and grid_sizes.dtype in (torch.int32, torch.int64)
    if not is_known or not is_grid or 2 * freqs.shape[1] != x.shape[3] or freqs.stride(1) != 1:
        return None
    return torch.view_as_real(freqs.resolve_conj()).flatten(-2)


def token_table_of(freqs: Any, x: Tensor) -> Tensor | None:
    """The angles of each token that s2v has computed before, complex128 [batch, seqlen, heads,
    head_dim / 2], as ours; None: these are others."""
    if type(freqs) is not Tensor or freqs.dtype != torch.complex128 or freqs.dim() != 4:
        return None
    batch, seqlen, heads, head_dim = x.shape
    is_same = freqs.shape[0] == batch and freqs.shape[1] == seqlen
    if not is_same or freqs.shape[2] not in (1, heads) or 2 * freqs.shape[3] != head_dim:
        return None
    if freqs.stride(3) != 1:
        return None
    if are_heads_alike(freqs):
        freqs = freqs[:, :, :1]
    table = torch.view_as_real(freqs.resolve_conj()).flatten(-2)
    return table.expand(batch, seqlen, heads, head_dim)


# The last tensor asked about, its version, and the answer: every layer asks about the same one.
_last_asked: tuple[Callable[[], Tensor | None], int, bool] = (lambda: None, 0, False)


def are_heads_alike(freqs: Tensor) -> bool:
    """Whether all heads of [batch, seqlen, heads, n] have the same angles, as s2v stores them: one
    head is read then instead of all, 8 / heads bytes of each element of x instead of 8.

    Compares once, which reads all of it and waits for its device; not where that is impossible.
    """
    global _last_asked
    if freqs.shape[2] == 1 or torch.compiler.is_compiling() or freqs.is_inference():
        return False  # a tensor of inference mode does not tell when it changes
    if freqs.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    asked, version, answer = _last_asked
    if asked() is not freqs or version != freqs._version:
        answer = torch.equal(freqs, freqs[:, :, :1].expand_as(freqs))
        _last_asked = weakref.ref(freqs), freqs._version, answer
    return answer


def fits(grid_sizes: Tensor, seqlen: int) -> bool:
    """Whether every grid is within the sequence: where one is not, stock Wan2.2 has an error."""
    return torch.compiler.is_compiling() or bool((grid_sizes.prod(dim=1) <= seqlen).all())


def world(names: dict[str, Any]) -> tuple[int, int]:
    """(processes, this one's number), as the sequence-parallel module knows them."""
    return names["get_world_size"](), names["get_rank"]()


def make_rope_apply(original: Function) -> Function:
    """wan.modules.model.rope_apply."""

    @functools.wraps(inspect.unwrap(original))
    def rope_apply(x: Tensor, grid_sizes: Any, freqs: Any) -> Any:
        table = table_of(freqs, x, grid_sizes) if is_plain(x) else None
        if table is None or not takes(x, table, grid_sizes) or not fits(grid_sizes, x.shape[1]):
            return original(x, grid_sizes, freqs)
        return rms_norm_rope(x, None, table, grid_sizes, dtype=torch.float32)

    return rope_apply


def make_parallel_rope_apply(original: Function) -> Function:
    """wan.distributed.sequence_parallel.rope_apply: this process's part of the sequence."""
    names = inspect.unwrap(original).__globals__

    @functools.wraps(inspect.unwrap(original))
    def rope_apply(x: Tensor, grid_sizes: Any, freqs: Any) -> Any:
        table = table_of(freqs, x, grid_sizes) if is_plain(x) else None
        if table is None or not takes(x, table, grid_sizes):
            return original(x, grid_sizes, freqs)
        size, rank = world(names)
        if not fits(grid_sizes, size * x.shape[1]):
            return original(x, grid_sizes, freqs)
        offset = rank * x.shape[1]
        return rms_norm_rope(x, None, table, grid_sizes, seqlen_offset=offset, dtype=torch.float32)

    return rope_apply


def make_token_rope_apply(original: Function) -> Function:
    """wan.modules.s2v.model_s2v.rope_apply and rope_apply_usp: each token has its angles."""

    @functools.wraps(inspect.unwrap(original))
    def rope_apply(x: Tensor, grid_sizes: Any, freqs: Any, *start: Any, **named: Any) -> Any:
        table = token_table_of(freqs, x) if is_plain(x) else None
        if table is None or not takes(x, table):
            return original(x, grid_sizes, freqs, *start, **named)
        return rms_norm_rope(x, None, table, dtype=torch.float32)

    return rope_apply


def _head_dim_for(size: int) -> int | None:
    """Any will do for a norm over all heads: the longest that a kernel takes."""
    return next((d for d in range(MAX_HEAD_DIM, 7, -1) if size % d == 0), None)


def make_norm_forward(original: Function) -> Function:
    """WanRMSNorm.forward: float32 within, then x's dtype, times the weight."""

    @functools.wraps(original)
    def forward(self: Any, x: Tensor) -> Any:
        weight = self.weight
        head_dim = _head_dim_for(x.shape[-1]) if type(x) is Tensor and x.dim() == 3 else None
        is_float = head_dim is not None and x.dtype in FLOATS and weight.dtype in FLOATS
        if not is_float or weight.shape != x.shape[-1:] or not takes(x, weight):
            return original(self, x)
        dtype = torch.promote_types(x.dtype, weight.dtype)
        heads = x.unflatten(2, (-1, head_dim))
        return rms_norm_rope(heads, weight, eps=self.eps, dtype=dtype).flatten(2)

    return forward
