# SPDX-License-Identifier: Apache-2.0
"""block_oracle.py - attention by block lists in float64, as the contract of csrc/wan_attn.h says.

Slow and plain: every score is there, and what is not listed is taken out of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BLOCK = 64


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    indices: Tensor,
    *,
    real: list[int] | None = None,
    scale: float | None = None,
    pools_others: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64. `real`: how many keys of each sample are real."""
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf)
    for b in range(q.shape[0]):
        length = k.shape[2] if real is None else real[b]
        for h in range(q.shape[1]):
            keys, values = k[b, h, :length], v[b, h, :length]
            for i in range(0, q.shape[2], BLOCK):
                row = i // BLOCK
                listed = set(indices[b, h, row, : int(counts[b, h, row])].tolist())
                logits, weighed = [], []
                for j in range(0, length, BLOCK):
                    part, its_values = keys[j : j + BLOCK], values[j : j + BLOCK]
                    if j // BLOCK in listed:
                        logits.append(scale * q[b, h, i : i + BLOCK] @ part.T)
                        weighed.append(its_values)
                    elif pools_others:
                        score = scale * q[b, h, i : i + BLOCK] @ part.mean(0)
                        logits.append(score[:, None] + math.log(len(part)))
                        weighed.append(its_values.mean(0)[None])
                if logits:
                    s = torch.cat(logits, dim=1)
                    outs[b, h, i : i + BLOCK] = s.softmax(1) @ torch.cat(weighed)
                    lses[b, h, i : i + BLOCK] = s.logsumexp(1)
    return outs.transpose(1, 2), lses


def off(found: Tensor, wanted: Tensor, dims: Any = None) -> float:
    """Relative L2."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())
