# SPDX-License-Identifier: Apache-2.0
"""list_reference.py - the self-tests' lists of blocks, and a call's result by them in float64;
shares no code with what computes it.

With pools_others the means of the others are rounded to value's dtype once, K's and V's: u of a
number. A score moves by u sum |q k| scale by that, and its weight by as much of itself; u of the
mean's value comes on top. The bounds of reference.py have that beside their own, twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wan_attn.request import BLOCK, Blocks, blocks_of
from wan_attn.selfcheck.reference import (
    HEADS_Q,
    MASKS,
    Case,
    Truth,
    moved_by_8_bits,
    seen_keys,
)

BEHIND = (1 << 31) - 1  # what lies behind the count of a list, and is never read


def listed(case: Case, density: float) -> Tensor:
    """[batch, heads, blocks of queries, blocks of keys] bool on the CPU, the same for the same
    case. The first head's second block of queries has none, the last head's has all."""
    shape = (len(case.k_lens), HEADS_Q, blocks_of(case.seqlen_q), blocks_of(case.seqlen_k))
    made = torch.Generator("cpu").manual_seed(case.seqlen_q + case.seqlen_k)
    found = torch.rand(shape, generator=made, device="cpu") < density
    if density < 1:
        found[:, 0, 1:2] = False
        found[:, -1, 1:2] = True
    return found


def as_blocks(mask: Tensor, pools_others: bool, device: torch.device) -> Blocks:
    """The arguments of a call; block_indices have room for two more."""
    counts = mask.sum(-1, dtype=torch.int32)
    room = (*mask.shape[:3], mask.shape[3] + 2)
    indices = torch.full(room, BEHIND, dtype=torch.int32, device="cpu")
    for at, number in zip(mask.nonzero().tolist(), _places(mask), strict=True):
        indices[at[0], at[1], at[2], number] = at[3]
    return Blocks(counts.to(device), indices.to(device), pools_others)


def _places(mask: Tensor) -> list[int]:
    """Of each block that is listed, in order: the how many-th of its list it is."""
    places: list[int] = (mask.cumsum(-1) - 1)[mask].tolist()
    return places


def attention(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    pools_others: bool,
    unit: float,
    kept: Tensor | None = None,
    is_lossy: bool = False,
) -> Truth:
    """The case's result by lists, and what rounding the means may move it by, as `moved`; or what
    8-bit scores may.

    Args:
        q, k, v: as of reference.attention().
        mask: of listed().
        unit: of UNIT, of value's dtype.
        kept: [batch, rows, heads, blocks of keys] bool: the listed blocks that each row has in its
            result; None: all.
        is_lossy: scores are of 8 bits; nothing is pooled.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device="cpu")
    spread, peak = torch.zeros_like(out), torch.zeros_like(out[..., :1])
    lse = torch.full_like(out[..., 0].transpose(1, 2), -math.inf)
    moved = torch.zeros_like(out), torch.zeros_like(lse)
    group = q.shape[2] // k.shape[2]
    q_lens = case.q_lens or (case.seqlen_q,) * len(case.k_lens)
    for b, (used_q, used_k) in enumerate(zip(q_lens, case.k_lens, strict=True)):
        for h in range(q.shape[2]):
            rows = q[b, :used_q, h].double()
            keys, values = k[b, :used_k, h // group].double(), v[b, :used_k, h // group].double()
            rows_keep = None if kept is None else kept[b, :used_q, h]
            seen, counts = _seen(case, used_q, used_k, mask[b, h], pools_others, rows_keep)
            if pools_others:
                keys, values = (torch.cat((x, _means(x))) for x in (keys, values))
            scores = rows @ keys.T / math.sqrt(q.shape[3])
            peak[b, :used_q, h, 0] = scores.abs().amax(1)
            weighed = (scores + counts.log()).masked_fill(~seen, -math.inf)
            row = torch.logsumexp(weighed, 1)
            weights = torch.exp(weighed - row[:, None]).nan_to_num(0.0)  # rows without keys
            here = weights @ values
            out[b, :used_q, h], lse[b, h, :used_q] = here, row
            spread[b, :used_q, h] = weights @ values.abs()
            if is_lossy:
                scaled = rows / math.sqrt(q.shape[3])
                moved[0][b, :used_q, h], moved[1][b, h, :used_q] = moved_by_8_bits(
                    scaled, keys, values, weights, here
                )
            if pools_others:
                means = slice(used_k, None)
                size = rows.abs() @ keys[means].abs().T / math.sqrt(q.shape[3])
                off = weights[:, means] * size
                by_score = off @ values[means].abs() + off.sum(1, keepdim=True) * here.abs()
                by_value = weights[:, means] @ values[means].abs()
                moved[0][b, :used_q, h] = 2 * unit * (by_score + by_value)
                moved[1][b, h, :used_q] = 2 * unit * off.sum(1)
    return Truth(out, lse, spread, peak, moved)


def _means(x: Tensor) -> Tensor:
    """[length, head_dim] -> [blocks, head_dim]."""
    return torch.stack([part.mean(0) for part in x.split(BLOCK)])


def _seen(
    case: Case,
    used_q: int,
    used_k: int,
    mask: Tensor,
    pools_others: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which keys each row sees, [used_q, keys]; and for how many keys each of these stands. Behind
    the real keys, where they are pooled, are the means."""
    is_causal, window = MASKS[case.mask]
    visible = seen_keys(used_q, used_k, is_causal, window, mask.device)
    of_row = torch.arange(used_q, device="cpu") // BLOCK
    by_block = mask[of_row][:, : blocks_of(used_k)]
    there = by_block if kept is None else by_block & kept[:, : blocks_of(used_k)]
    seen = visible & there.repeat_interleave(BLOCK, 1)[:, :used_k]
    counts = torch.ones(used_k, dtype=torch.float64, device="cpu")
    if not pools_others:
        return seen, counts
    whole = torch.stack([part.all(1) for part in visible.split(BLOCK, 1)], 1)
    sizes = torch.tensor([len(part) for part in counts.split(BLOCK)], device="cpu")
    return torch.cat((seen, whole & ~by_block), 1), torch.cat((counts, sizes.double()))
