# SPDX-License-Identifier: Apache-2.0
"""agree.py - whether a candidate's result is right: some rows of it against float64.

Straight from the definition, for the first and the last head and a few rows of each, on the real
operands. Exact kernels differ from float64 by some units in the last place of the dtype; one that
quantises, reads padding or mistakes a mask is off by ten times that and more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wan_attn.backends._common import outside_autocast
from wan_attn.request import Call
from wan_attn.selfcheck.reference import UNIT

KEYS_AT_ONCE = 1 << 13  # converted to float64 at a time
TF32_UNIT = 2.0**-11
_SUMS = 2.0**-24  # half a unit in the last place of float32, in which all candidates sum


def wrong(
    query: Tensor, key: Tensor, value: Tensor, call: Call, out: Tensor, lse: Tensor | None
) -> str | None:
    """What a result gets wrong, in words; None: nothing.

    Args:
        query: [batch, rows, heads, head_dim]; key, value: [batch, keys, heads_k, head_dim].
        call: with lengths for these operands.
        out: like query; lse: [batch, heads, rows], or None where it is not wanted.
    """
    if out.shape != query.shape or (lse is None) is call.return_lse:
        return f"its result has shape {list(out.shape)}, not {list(query.shape)}"
    batch, _, heads, _ = query.shape
    with torch.no_grad(), outside_autocast(query.device):
        for b, h in {(0, 0), (batch - 1, heads - 1)} if batch and heads else ():
            found = _wrong_head(query, key, value, call, out, lse, b, h)
            if found is not None:
                return found
    return None


def _wrong_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    out: Tensor,
    lse: Tensor | None,
    b: int,
    h: int,
) -> str | None:
    q_len, k_len = _length(call.q_lens, b, query), _length(call.k_lens, b, key)
    padding = out[b, q_len:, h]
    if bool((padding != 0).any()):  # NaN is not 0
        return "rows of padding are not 0"
    if q_len == 0:
        return None
    rows = sorted({0, q_len // 3, q_len // 2, q_len - 1})
    at = torch.tensor(rows, device=query.device)
    kv = h // (query.shape[2] // key.shape[2])
    scale = 1 / math.sqrt(query.shape[3]) if call.scale is None else call.scale
    operands = query[b, at, h].double(), key[b, :k_len, kv], value[b, :k_len, kv]
    truth, truth_lse, size, spread = _rows(*operands, _seen(call, at, q_len, k_len), scale)
    unit = UNIT.get(value.dtype, UNIT[torch.float32])
    if value.is_cuda and value.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        unit = TF32_UNIT
    # Rounding query and key moves a score by its unit times `spread`, and so each weight.
    bound = unit * (4 + 4 * spread) + _SUMS * math.sqrt(max(1, k_len))
    off = float((out[b, at, h].double() - truth).norm())
    if not off <= bound * float(size):  # NaN is wrong
        part = off / float(size) if float(size) else math.inf
        return f"it is off by {part:.2g} of the result's size, where {bound:.2g} is the bound"
    if lse is not None:
        got = lse[b, h, at].double()
        same = (got == truth_lse) | ((got - truth_lse).abs() <= bound * (1 + truth_lse.abs()))
        if not bool(same.all()):
            return "its log-sum-exp is wrong"
    return None


def _length(lengths: Tensor | None, b: int, x: Tensor) -> int:
    return int(x.shape[1]) if lengths is None else max(0, min(int(lengths[b]), int(x.shape[1])))


def _seen(call: Call, rows: Tensor, q_len: int, k_len: int) -> Tensor:
    """Which keys these rows see: bool [rows, k_len]."""
    ahead = torch.arange(k_len, device=rows.device) - (rows.unsqueeze(1) + k_len - q_len)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    left, right = call.window
    if call.is_causal:
        seen &= ahead <= 0
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def _rows(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor, float, float]:
    """(out [rows, head_dim] and lse [rows] in float64, the size that errors are measured by, and
    how far scores spread: query's norm times the largest of key's, per root of head_dim)."""
    blocks = range(0, key.shape[0], KEYS_AT_ONCE)
    norms = [float(key[i : i + KEYS_AT_ONCE].double().norm(dim=1).amax()) for i in blocks]
    parts = [query @ key[i : i + KEYS_AT_ONCE].double().T for i in blocks]
    scores = torch.cat(parts, dim=1) * scale if parts else query.new_zeros(len(query), 0)
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, dim=1)
    weights = torch.exp(scores - lse.unsqueeze(1)).nan_to_num(0.0)  # a row without a key
    out, walk = torch.zeros_like(query), 0.0
    for i in blocks:
        values, part = value[i : i + KEYS_AT_ONCE].double(), weights[:, i : i + KEYS_AT_ONCE]
        out += part @ values
        walk += float((part.square() @ values.square()).sum())
    # Where values cancel, the result is as small as a random walk of its terms.
    size = max(float(out.norm()), math.sqrt(walk))
    longest = float(query.norm(dim=1).amax())
    spread = abs(scale) * longest * max(norms, default=0.0) / math.sqrt(query.shape[1])
    return out, lse, size, spread
