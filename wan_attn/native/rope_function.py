# SPDX-License-Identifier: Apache-2.0
"""rope_function.py - wan_attn.rms_norm_rope: the op, with arguments that are looked at first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wan_attn.request import gate, refuse

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rms_norm_rope(
    x: Tensor,
    weight: Tensor | None = None,
    table: Tensor | None = None,
    grid_sizes: Tensor | Sequence[Sequence[int]] | None = None,
    *,
    eps: float | None = None,
    per_head: bool = False,
    round_norm: bool = True,
    seqlen_offset: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """RMS norm, rotary position embedding, or both, of a query or a key, in one pass.

    By our kernels on the CPU and on NVIDIA's GPUs; elsewhere, and for gradients, by torch's
    operators. The log says so where a GPU's call is left to those.

    Args:
        x: [batch, seqlen, heads, head_dim], float32, float16 or bfloat16, last stride 1.
        weight: [heads * head_dim], or [head_dim] with per_head; None: 1.
        table: cos and sin of each pair of head_dim in turn, float64 or float32. With grid_sizes
            [positions, head_dim], for all three axes (Wan2.2's `freqs` as
            `torch.view_as_real(freqs).flatten(-2)`); else shaped like x. None: no rotation.
        grid_sizes: [batch, 3] integers: frames, height and width. Tokens behind are not rotated.
        eps: None: no norm.
        per_head: the norm of each head by itself, not of all heads of a token.
        round_norm: round the norm to x's dtype before the weight, and the product too, as Wan2.2
            does. False is more accurate.
        seqlen_offset: which token of the sequence x begins with.
        dtype: of the result; None: x's.

    Returns:
        Shaped like x, contiguous.

    Raises:
        RuntimeError: names the argument, what it must be and what was given.
    """
    for name, value in (("x", x), ("weight", weight), ("table", table)):
        if value is not None or name == "x":
            gate.dense(name, value)
    if isinstance(grid_sizes, Tensor):
        gate.dense("grid_sizes", grid_sizes)
    elif grid_sizes is not None:
        rule = "a tensor or a list of (frames, height, width)"
        if not isinstance(grid_sizes, (list, tuple)):
            refuse("grid_sizes", rule, gate.shown(grid_sizes))
        sizes = [gate.integers("grid_sizes", sample, rule) for sample in grid_sizes]
        if any(len(sample) != 3 for sample in sizes):
            refuse("grid_sizes", rule, gate.shown(grid_sizes))
        grid_sizes = torch.tensor(sizes, dtype=torch.int64, device="cpu").view(-1, 3)
    if dtype is not None and dtype not in _DTYPES:
        refuse("dtype", "float32, float16 or bfloat16", gate.shown(dtype))
    result: Tensor = torch.ops.wan_attn.rms_norm_rope(
        x,
        weight,
        table,
        grid_sizes,
        eps=None if eps is None else gate.number("eps", eps),
        per_head=gate.flag("per_head", per_head),
        round_norm=gate.flag("round_norm", round_norm),
        seqlen_offset=gate.integer("seqlen_offset", seqlen_offset, at_least=0),
        dtype=dtype,
    )
    return result
