# SPDX-License-Identifier: Apache-2.0
"""parts.py - one call of which some heads are computed in 8 bits, and the others exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wan_attn.backends import native
from wan_attn.native.library import QK8
from wan_attn.observe.heads import Operands, Result, Run, of_heads
from wan_attn.precision.schedule import Heads
from wan_attn.request import Call


def without(heads: Heads, gone: tuple[int, int]) -> Heads:
    """These ranges without that one."""
    left: list[tuple[int, int]] = []
    for first, last in heads:
        for a, b in ((first, min(last, gone[0])), (max(first, gone[1]), last)):
            if a < b:
                left.append((a, b))
    return tuple(left)


def attend(
    exact: Run, lossy: Heads, operands: Operands, call: Call, watched: Tensor | None
) -> Result:
    """The lossy heads in 8 bits, the others by `exact`.

    Args:
        watched: the guard of the lossy ones; None: nobody looks.
    """
    options: dict[str, Any] = {} if watched is None else {"guard": watched}
    heads = operands[0].shape[2]
    if lossy == ((0, heads),):
        return native.run(*operands, call, precision=QK8, **options)
    cuts = sorted({0, heads, *(end for part in lossy for end in part)})
    outs: list[Tensor] = []
    lses: list[Tensor | None] = []
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        part = of_heads(operands, first, last)
        if any(a <= first and last <= b for a, b in lossy):
            out, lse = native.run(*part, call, precision=QK8, **options)
        else:
            out, lse = exact(*part, call)
        outs.append(out)
        lses.append(lse)
    whole = torch.cat([out.to(outs[0].dtype) for out in outs], dim=2)
    if not call.return_lse:
        return whole, None
    return whole, torch.cat([lse for lse in lses if lse is not None], dim=1)
