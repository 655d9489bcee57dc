# SPDX-License-Identifier: Apache-2.0
"""skip_calls.py - the self-tests' calls with a skip_threshold, and what is wrong with an answer.

Which blocks of keys a kernel leaves out is its own affair within the contract, and is seen in its
result: a value is not 0 in the channel of its block alone, so that out has each block's share of a
row's weights, and 0 where it was left out. By these shares everything is judged in float64: that
out and lse are those of the blocks which a row has kept; that none was left out whose largest
weight is not below the threshold, or of which a row sees a part; that lost_mass is no less than
what was lost, and hardly more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from wan_attn.request import BLOCK, Blocks, blocks_of
from wan_attn.selfcheck import list_reference
from wan_attn.selfcheck.reference import HEADS_Q, MASKS, UNIT, Case, difference, draw, seen_keys

SEQLEN_Q, SEQLEN_K = 197, 833  # both ragged; 14 blocks of keys, of which the last has one
THRESHOLD = 0.05
WEAK = (2, 3, 4, 8)  # below the threshold for all rows: they weigh some percent together
PARTLY = (1, 7, 10)  # for every other 32 rows
STRONG = 5  # before or behind them: maxima rise when some have been left out
ABOVE = 9  # the threshold, by little
SPOILED = 8  # sample 0 has a NaN in its values: it is kept
SHIFT, MORE = -0.9375, 0.25  # of their scores: -3.75 and 1, or a little more
ONE = 2.0**15  # of a value: float16 has normal numbers for small shares of it

Operands = tuple[Tensor, Tensor, Tensor]
# run(query, key, value, q_lens, k_lens, mask, blocks, guard) -> out, lse
Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str, Blocks, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SkipCall:
    """One call. density: the share of blocks that is listed; 1: it has no lists."""

    name: str
    mask: str = "full"
    density: float = 1.0
    pools_others: bool = False

    @property
    def has_lists(self) -> bool:
        return self.density < 1

    def case(self, head_dim: int) -> Case:
        return Case(SEQLEN_Q, SEQLEN_K, head_dim, self.mask)


CALLS = (
    SkipCall("skip_threshold"),
    SkipCall("skip_threshold and lists", "causal", 0.7),
    SkipCall("skip_threshold and means", "full", 0.6, pools_others=True),
)


@dataclass(frozen=True)
class Known:
    """A call's operands, and which blocks are listed."""

    operands: Operands
    listed: Tensor
    blocks: Blocks


def _q_lens(case: Case) -> tuple[int, int]:
    return case.q_lens or (SEQLEN_Q, SEQLEN_Q)


@lru_cache(maxsize=2 * len(CALLS))
def _known(call: SkipCall, head_dim: int) -> Known:
    """Numbers that every dtype has exactly, NaN behind the real ones."""
    case, made = call.case(head_dim), torch.Generator("cpu").manual_seed(head_dim)
    q_lens = _q_lens(case)
    query = draw(made, 2, SEQLEN_Q, HEADS_Q, head_dim, lens=q_lens) / 8
    key = draw(made, 2, SEQLEN_K, 1, head_dim, lens=case.k_lens)
    block = torch.arange(SEQLEN_K, device="cpu") // BLOCK
    is_even = torch.arange(SEQLEN_Q, device="cpu")[:, None] // 32 % 2 == 0
    size = math.ceil(math.sqrt(head_dim))  # times 4, by the scale: 4 or a little more
    query[..., 0] = query[..., 0] * 0 + 4
    query[..., 1] = query[..., 1] * 0 + 4 * is_even
    key[..., :2] *= 0
    for channel, blocks in enumerate((WEAK, PARTLY)):
        for n in blocks:
            key[:, block == n, :, channel] += SHIFT * size
    key[:, block == STRONG, :, 0] += MORE * size
    key[:, block == ABOVE, :, 0] -= MORE * size
    value = key * 0
    value[:, torch.arange(SEQLEN_K), :, block] += ONE
    if not call.has_lists:
        value[0, SPOILED * BLOCK + 5, 0, -1] = math.nan
    listed = list_reference.listed(case, call.density)
    given = Blocks()
    if call.has_lists:
        given = list_reference.as_blocks(listed, call.pools_others, torch.device("cpu"))
    return Known((query, key, value), listed, given._replace(skip_threshold=THRESHOLD))


def wrong(run: Run, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What `run` gets wrong on this device, in words; None: nothing."""
    for call in CALLS:
        found = wrong_in(run, call, device, dtype, head_dim)
        if found is not None:
            return f"{call.name}: {found}"
    return None


def first_wrong(
    answer: Callable[..., tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> str | None:
    """The same of the first call alone, as first_call.py has its calls run."""

    def run(*given: Any) -> tuple[Tensor, Tensor]:
        *operands, mask, blocks, guard = given
        return answer(*operands, MASKS[mask][0], blocks, guard=guard)

    found = wrong_in(run, CALLS[0], device, dtype, head_dim)
    return None if found is None else f"{CALLS[0].name}: {found}"


def wrong_in(
    run: Run, call: SkipCall, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Of one call, which runs twice: the second time its guard knows of a larger share."""
    known, case = _known(call, head_dim), call.case(head_dim)
    query, key, value = (x.to(device, dtype) for x in known.operands)
    counts, indices = (x if x is None else x.to(device, copy=True) for x in known.blocks[:2])
    blocks = known.blocks._replace(block_counts=counts, block_indices=indices)
    # The CPU by name: the program may have another default device.
    lens = [torch.tensor(given, device="cpu") for given in (_q_lens(case), case.k_lens)]
    told = []
    for before in (0.0, 0.875):
        guard = torch.tensor([0.0, 0.0, 0.0, 0.0, before], device=device).view(torch.int32)
        out, lse = run(query, key, value, lens[0], lens[1], call.mask, blocks, guard)
        told.append(float(guard[4:].cpu().view(torch.float32)))
        found = judged(call, head_dim, out.cpu(), lse.cpu(), told[0], UNIT[dtype])
        if found is not None:
            return found
    if told[1] != 0.875:
        return f"lost_mass was 0.875 before, and is {told[1]:g}"
    return None


def judged(
    call: SkipCall, head_dim: int, out: Tensor, lse: Tensor, told: float, unit: float
) -> str | None:
    """What is wrong with an answer, in words; None: nothing.

    Args:
        told: lost_mass of a guard that had 0.
        unit: of UNIT, of value's dtype.
    """
    known, case = _known(call, head_dim), call.case(head_dim)
    query, key, value = known.operands
    kept = out[..., : blocks_of(SEQLEN_K)] > 0
    used_q = _q_lens(case)[0]
    if not call.has_lists:
        if not out[0, :used_q, :, -1].isnan().all():
            return "a block with a NaN among its values was left out"
        out, value = out.clone(), value.clone()
        out[0, :used_q, :, -1] = value[0, : case.k_lens[0], 0, -1] = 0.0
    shared = (case, query, key, value, known.listed, call.pools_others, unit)
    truth, whole = (list_reference.attention(*shared, keep) for keep in (kept, None))
    found = _wrongly_left_out(call, case, known, kept, whole.lse)
    found = found or difference(case, truth, out, lse, unit, has_moved=True)
    lost = float((-torch.expm1(truth.lse - whole.lse)).nan_to_num(0.0).max())
    return found or wrong_certificate(told, lost)


def _wrongly_left_out(
    call: SkipCall, case: Case, known: Known, kept: Tensor, lse: Tensor
) -> str | None:
    """A block that a row must have, or, without lists, must not. lse: of all that is seen."""
    query, key, _ = known.operands
    is_causal, window = MASKS[case.mask]
    q_lens = _q_lens(case)
    of_row = torch.arange(SEQLEN_Q, device="cpu") // BLOCK
    for b, (used_q, used_k) in enumerate(zip(q_lens, case.k_lens, strict=True)):
        visible = seen_keys(used_q, used_k, is_causal, window, key.device)
        parts = visible.split(BLOCK, 1)
        some = torch.stack([part.any(1) for part in parts], 1)
        every = torch.stack([part.all(1) for part in parts], 1)
        for h in range(HEADS_Q):
            scores = query[b, :used_q, h].double() @ key[b, :used_k, 0].double().T
            scores = (scores / math.sqrt(case.head_dim)).masked_fill(~visible, -math.inf)
            top = torch.stack([part.amax(1) for part in scores.split(BLOCK, 1)], 1)
            is_listed = known.listed[b, h][of_row[:used_q], : len(parts)]
            most = top.masked_fill(~is_listed, -math.inf).amax(1)
            if call.pools_others:  # a mean may be the maximum, too
                most = lse[b, h, :used_q]
            gone = some & is_listed & ~kept[b, :used_q, h, : len(parts)]
            for words, is_wrong in (
                ("of which it sees a part", gone & ~every),
                ("that weighs", gone & (top - most[:, None] >= math.log(THRESHOLD) + 0.01)),
            ):
                if bool(is_wrong.any()):
                    row, n = is_wrong.nonzero()[0].tolist()
                    return f"row {row} of head {h} of sample {b} lacks block {n}, {words}"
            # With a NaN, more may be kept: what is packed together.
            here = [n for n in WEAK if n < (len(parts) if b else SPOILED)]
            if not call.has_lists and not bool(gone[:, here].all()):
                return "blocks that weigh next to nothing were not left out"
    return None


def wrong_certificate(told: float, true: float) -> str | None:
    """What is wrong with a lost_mass, in words; None: nothing. It has its own rounding in it: a
    thousandth."""
    if true <= told <= 1.003 * true + 1e-28:
        return None
    return f"lost_mass is {told:g} where {true:g} was lost"
