# SPDX-License-Identifier: Apache-2.0
"""merge.py - joins attention over two disjoint sets of keys into attention over both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wan_attn.request import gate, refuse

_LSE_DTYPES = (torch.float32, torch.float64)
_OUT_DTYPES = (torch.float16, torch.bfloat16, *_LSE_DTYPES)


def merge_states(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Join two attention results of the same queries over disjoint keys, exactly.

    With weights w_i = exp(lse_i) the result is (w1·out1 + w2·out2) / (w1 + w2) and lse = log(w1 +
    w2): what one softmax over all keys would have given, up to rounding (Ye et al., FlashInfer,
    arXiv 2501.01005, section 2.2). It is what blocks of keys, ring attention over several GPUs and
    cached prefixes are put together with. The order of the two does not matter, and merging is
    associative.

    Args:
        out1, out2: [batch, seqlen_q, num_heads, head_dim], float16, bfloat16, float32 or float64.
        lse1, lse2: [batch, num_heads, seqlen_q] float32 or float64, natural log of the sum of
            exp(scale · score), as `wan_attn.sdpa(..., return_lse=True)` returns it. -inf says that
            the row saw no key on that side; its out is then ignored.

    Returns:
        out [batch, seqlen_q, num_heads, head_dim] in the wider of the two dtypes, and lse
        [batch, num_heads, seqlen_q]. A row that saw no key on either side gets 0 and -inf. Merge in
        float32 when there are many parts: each merge rounds out once to its dtype.

    Raises:
        RuntimeError: the shapes do not fit each other, or a dtype is another.

    Differentiable in all four. NaN in a row's lse makes that row NaN.
    """
    for name, part in (("out1", out1), ("lse1", lse1), ("out2", out2), ("lse2", lse2)):
        gate.dense(name, part)
        dtypes = _OUT_DTYPES if name.startswith("out") else _LSE_DTYPES
        if part.dtype not in dtypes:
            names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
            refuse(name, f"{', '.join(names[:-1])} or {names[-1]}", part.dtype)
        if part.device != out1.device:
            refuse(name, f"on out1's device {out1.device}", part.device)
    for name, out, lse in (("out1", out1, lse1), ("out2", out2, lse2)):
        if out.ndim != 4 or out.shape != out1.shape:
            refuse(name, "[batch, seqlen_q, num_heads, head_dim] like out1", list(out.shape))
        if lse.shape != (out.shape[0], out.shape[2], out.shape[1]):
            number = name[-1]
            rule = f"[batch, num_heads, seqlen_q] of out{number}"
            refuse(f"lse{number}", rule, list(lse.shape))
    dtype = torch.promote_types(out1.dtype, out2.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    # Any shift gives the same result, so the maximum takes no part in the derivative.
    largest = torch.maximum(lse1, lse2).detach()
    shift = torch.where(largest == -math.inf, 0.0, largest)
    weight1, weight2 = torch.exp(lse1 - shift), torch.exp(lse2 - shift)
    total = weight1 + weight2
    sees_none = total == 0
    total = total.masked_fill(sees_none, 1.0)
    lse = (shift + torch.log(total)).masked_fill(sees_none, -math.inf)

    def share(out: Tensor, lse_part: Tensor, weight: Tensor) -> Tensor:
        rows = (weight / total).to(wide).transpose(1, 2).unsqueeze(-1)
        unseen = (lse_part == -math.inf).transpose(1, 2).unsqueeze(-1)
        return out.to(wide).masked_fill(unseen, 0.0) * rows

    return (share(out1, lse1, weight1) + share(out2, lse2, weight2)).to(dtype), lse
