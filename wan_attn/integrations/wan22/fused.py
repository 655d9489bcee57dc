# SPDX-License-Identifier: Apache-2.0
"""fused.py - Wan2.2's self-attention with the norm and the rotation of q and of k in one pass each:
forwards that stand where Wan2.2's were.

q and k leave that pass in the dtype that attention computes in, instead of float32. What our
kernels do not take is done by Wan2.2's own steps, one after the other.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from wan_attn.integrations._rope import FLOATS, HALF, is_plain, rms_norm_rope, takes
from wan_attn.integrations.wan22.rope import Function, fits, table_of, token_table_of, world

Norms = dict[type, Function]
"""The classes of norms that are Wan2.2's, and the forward of ours that each has now."""


def _norm_of(norm: Any, norms: Norms) -> tuple[Tensor | None, float | None] | None:
    """(weight, eps) of a norm that is ours to fuse; None: it is another, or has hooks."""
    if norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return None
    if type(norm) is torch.nn.Identity:
        return None, None
    is_ours = norms.get(type(norm)) is type(norm).forward
    return (norm.weight, norm.eps) if is_ours else None


def _out_dtype(attention: Any, v: Tensor) -> torch.dtype:
    """What q and k are wanted in. Attention returns q's dtype, which the projection behind it must
    take: without autocast only one of the weight's own dtype."""
    is_cast = torch.is_autocast_enabled(v.device.type)
    is_half = v.dtype in HALF and (is_cast or attention.o.weight.dtype == v.dtype)
    return v.dtype if is_half else torch.float32


def _turned(
    norm: Any, y: Tensor, heads: int, norms: Norms, angles: Function, dtype: torch.dtype
) -> Tensor | None:
    """norm and rotation of a projection [batch, seqlen, heads * head_dim]; None: not by us."""
    found = _norm_of(norm, norms)
    if found is None or type(y) is not Tensor or y.dtype not in FLOATS:
        return None
    x = y.unflatten(2, (heads, -1))
    given = angles(x)
    if given is None or not is_plain(x):
        return None
    weight, eps = found
    table, grid_sizes, offset = given
    if not takes(x, weight, table, grid_sizes):
        return None
    return rms_norm_rope(x, weight, table, grid_sizes, eps=eps, seqlen_offset=offset, dtype=dtype)


def by_grid(grid_sizes: Any, freqs: Any, x: Tensor) -> tuple[Any, ...] | None:
    table = table_of(freqs, x, grid_sizes)
    return (table, grid_sizes, 0) if table is not None and fits(grid_sizes, x.shape[1]) else None


def by_token(_: Any, freqs: Any, x: Tensor) -> tuple[Any, ...] | None:
    table = token_table_of(freqs, x)
    return None if table is None else (table, None, 0)


def make_attention_forward(original: Function, norms: Norms, angles: Function) -> Function:
    """forward of WanSelfAttention and its like; `angles` is by_grid or by_token."""
    names = original.__globals__

    @functools.wraps(original)
    def forward(self: Any, x: Tensor, seq_lens: Any, grid_sizes: Any, freqs: Any) -> Any:
        b, s, n, d = *x.shape[:2], self.num_heads, self.head_dim
        v = self.v(x).view(b, s, n, d)
        dtype = _out_dtype(self, v)
        of_token = functools.partial(angles, grid_sizes, freqs)

        def turned(norm: Any, y: Tensor) -> Tensor:
            ours = _turned(norm, y, n, norms, of_token, dtype)
            if ours is not None:
                return ours
            rotated: Tensor = names["rope_apply"](norm(y).view(b, s, n, d), grid_sizes, freqs)
            return rotated

        x = names["flash_attention"](
            q=turned(self.norm_q, self.q(x)),
            k=turned(self.norm_k, self.k(x)),
            v=v,
            k_lens=seq_lens,
            window_size=self.window_size,
        )
        return self.o(x.flatten(2))

    return forward


def make_parallel_forward(
    original: Function, norms: Norms, rotation: str, has_token_angles: bool
) -> Function:
    """sp_attn_forward of wan.distributed.sequence_parallel, and s2v's, whose tokens have angles of
    their own; `rotation` is the name of the function that rotates there."""
    names = original.__globals__

    @functools.wraps(original)
    def sp_attn_forward(
        self: Any,
        x: Tensor,
        seq_lens: Any,
        grid_sizes: Any,
        freqs: Any,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Any:
        b, s, n, d = *x.shape[:2], self.num_heads, self.head_dim

        def angles(y: Tensor) -> tuple[Any, ...] | None:
            if has_token_angles:
                return by_token(grid_sizes, freqs, y)
            size, rank = world(names)
            table = table_of(freqs, y, grid_sizes)
            is_ours = table is not None and fits(grid_sizes, size * s)
            return (table, grid_sizes, rank * s) if is_ours else None

        def half(y: Tensor) -> Tensor:
            return y if y.dtype in HALF else y.to(dtype)

        def turned(norm: Any, y: Tensor) -> Tensor:
            ours = _turned(norm, y, n, norms, angles, dtype) if dtype in HALF else None
            if ours is not None:
                return ours
            return half(names[rotation](norm(y).view(b, s, n, d), grid_sizes, freqs))

        x = names["distributed_attention"](
            turned(self.norm_q, self.q(x)),
            turned(self.norm_k, self.k(x)),
            half(self.v(x).view(b, s, n, d)),
            seq_lens,
            window_size=self.window_size,
        )
        return self.o(x.flatten(2))

    return sp_attn_forward
