# SPDX-License-Identifier: Apache-2.0
"""proof_calls.py - the calls that a row of the kernel table has to get right on a card before it
runs there: every tile of the row, every pass beside it, every kind of mask, a guard, and a captured
graph. Rows for lists of blocks get lists, in all of them.

Lengths are those of first_call.py: rings go round, and both blocks of a cluster have rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from wan_attn.native.kernels import KernelInfo
from wan_attn.request import Blocks
from wan_attn.request.blocks import DENSE
from wan_attn.selfcheck import list_reference, skip_calls
from wan_attn.selfcheck.first_call import SEQLEN_K, SEQLEN_Q
from wan_attn.selfcheck.reference import (
    UNIT,
    Case,
    Truth,
    difference,
    make_inputs,
    reference,
)

Operands = tuple[Tensor, Tensor, Tensor]
Answer = tuple[Tensor, Tensor]  # out, lse


@dataclass(frozen=True)
class ProofCall:
    """One call. All have two samples of different lengths with NaN behind them, twice as many heads
    of query as of key, and want the log-sum-exp."""

    name: str
    seqlen_q: int = SEQLEN_Q
    seqlen_k: int = SEQLEN_K
    mask: str = "full"
    qk_is_f32: bool = False  # beside a half value
    is_unaligned: bool = False  # views that begin an element behind where copies could begin
    lens_on_device: bool = False
    # Where the row is for lists of blocks: the share of blocks that is listed, and the others.
    density: float = 0.5
    pools_others: bool = False  # but for rows of 8-bit scores, which take lists alone

    def pools(self, row: KernelInfo) -> bool:
        """Whether the row gets this call with pools_others."""
        return self.pools_others and row.is_for_lists and not row.is_lossy

    def case(self, head_dim: int) -> Case:
        return Case(self.seqlen_q, self.seqlen_k, head_dim, self.mask)

    def place(self, x: Tensor, dtype: torch.dtype, is_value: bool, device: torch.device) -> Tensor:
        """An operand as this call has it."""
        wanted = torch.float32 if self.qk_is_f32 and not is_value else dtype
        if not self.is_unaligned:
            return x.to(device, wanted)
        store = torch.empty(x.numel() + 1, dtype=wanted, device=device)
        return store[1:].view(x.shape).copy_(x)


# 1: Hopper's d128 has a tile of its own for so few rows. 2: more keys than one split has; rows of
# Hopper refuse it. Sample 1 has half the keys: none in the last split.
CALLS = (
    ProofCall("ragged", density=1.0),
    ProofCall("causal", mask="causal"),
    ProofCall("window", mask="window", density=0.3),
    ProofCall("few rows", seqlen_q=101, lens_on_device=True, pools_others=True),  # 1
    ProofCall("split", seqlen_q=37, seqlen_k=4999, density=0.2),  # 2
    ProofCall("float32 query and key", mask="causal", qk_is_f32=True, pools_others=True),
    ProofCall("unaligned", is_unaligned=True, density=0.1, pools_others=True),
)
GRAPH, GUARDED = "graph", "guarded"


class Card(Protocol):
    """What calls run on: torch's CUDA device, or the tests' mock GPU."""

    skipped: list[str]  # what cannot be tried there, with the reason

    def device(self) -> torch.device:
        """Where operands must be."""

    def rows(self) -> list[KernelInfo]:
        """The rows that it can run."""

    def why_not(self, row: KernelInfo, dtype: torch.dtype, call: ProofCall) -> str | None:
        """Why the row does not take this call by design; None: it does."""

    def run(
        self,
        row: KernelInfo,
        operands: Operands,
        q_lens: Tensor | None,
        k_lens: Tensor,
        case: Case,
        guard: Tensor | None = None,
        blocks: Blocks = DENSE,
    ) -> Answer:
        """torch.ops.wan_attn.sdpa with this row and no other; guard: as native.run has it."""

    def captured(self, attend: Callable[[], Any]) -> Callable[[], Any] | None:
        """The call as a graph, to be replayed; None: there are no graphs (see `skipped`)."""


@dataclass(frozen=True)
class Known:
    """A call's operands, what goes with them, and its result.

    Attributes:
        has_moved: the bounds of the result have Truth.moved in them.
    """

    operands: Operands
    truth: Truth
    blocks: Blocks = DENSE
    has_moved: bool = False

    def difference(self, case: Case, answer: Answer, dtype: torch.dtype) -> str | None:
        """What is beyond its bound, in words; None: nothing."""
        return difference(case, self.truth, *answer, UNIT[dtype], self.has_moved)

    def blocks_on(self, device: torch.device) -> Blocks:
        """Its lists there, in memory of their own."""
        counts, indices = self.blocks.block_counts, self.blocks.block_indices
        if counts is None or indices is None:
            return self.blocks
        counts, indices = (x.to(device, copy=True) for x in (counts, indices))
        return self.blocks._replace(block_counts=counts, block_indices=indices)


@lru_cache(maxsize=2 * len(CALLS))
def _dense(case: Case, is_lossy: bool) -> Known:
    operands = make_inputs(case)
    return Known(operands, reference(case, *operands, is_lossy), has_moved=is_lossy)


@lru_cache(maxsize=2 * len(CALLS))
def _listed(
    case: Case, density: float, pools_others: bool, dtype: torch.dtype, is_lossy: bool
) -> Known:
    operands, mask = make_inputs(case), list_reference.listed(case, density)
    given = (case, *operands, mask, pools_others, UNIT[dtype])
    truth = list_reference.attention(*given, is_lossy=is_lossy)
    blocks = list_reference.as_blocks(mask, pools_others, torch.device("cpu"))
    return Known(operands, truth, blocks, has_moved=True)


def _known(row: KernelInfo, dtype: torch.dtype, call: ProofCall, case: Case) -> Known:
    if row.is_for_lists:
        return _listed(case, call.density, call.pools(row), dtype, row.is_lossy)
    return _dense(case, row.is_lossy)


def _lens(call: ProofCall, case: Case, device: torch.device) -> tuple[Tensor | None, Tensor]:
    # The CPU by name: the program may have another default device.
    where = device if call.lens_on_device else torch.device("cpu")
    q_lens = None if case.q_lens is None else torch.tensor(case.q_lens, device=where)
    return q_lens, torch.tensor(case.k_lens, device=where)


def wrong(card: Card, row: KernelInfo, dtype: torch.dtype) -> str | None:
    """What this row gets wrong on this card, in words; None: nothing.

    Raises:
        RuntimeError: what a call raised.
    """
    for call in CALLS:
        if card.why_not(row, dtype, call) is not None:
            continue
        case = call.case(row.head_dim_max)
        known = _known(row, dtype, call, case)
        operands = _placed(call, known.operands, dtype, card.device())
        lens, blocks = _lens(call, case, card.device()), known.blocks_on(card.device())
        first = card.run(row, operands, *lens, case, blocks=blocks)
        # The first result is still held: the second cannot lie in its memory and look written.
        second = card.run(row, operands, *lens, case, blocks=blocks)
        for answer in (first, second):
            found = known.difference(case, answer, dtype)
            if found is not None:
                return f"{call.name}: {found}"
        if not (torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])):
            return f"{call.name}: the same call gave other bits the second time, [{case}]"
    found = _wrong_guard(card, row, dtype) or _wrong_graph(card, row, dtype)
    skips = row.is_for_lists and not row.is_lossy
    return found or (_wrong_skip(card, row, dtype) if skips else None)


def _placed(call: ProofCall, x: Operands, dtype: torch.dtype, device: torch.device) -> Operands:
    query, key, value = (call.place(x[n], dtype, is_value=n == 2, device=device) for n in range(3))
    return query, key, value


def _wrong_guard(card: Card, row: KernelInfo, dtype: torch.dtype) -> str | None:
    """A guard adds what a call's v and out tell, first of a harmless call, then of a bad value."""
    call = ProofCall(GUARDED, density=1.0)
    case = call.case(row.head_dim_max)
    known = _known(row, dtype, call, case)
    query, key, value = _placed(call, known.operands, dtype, card.device())
    lens, blocks = _lens(call, case, card.device()), known.blocks_on(card.device())
    words = torch.zeros(4, dtype=torch.int32, device=card.device())
    real = [float(known.operands[2][b, :used].abs().max()) for b, used in enumerate(case.k_lens)]
    answer = card.run(row, (query, key, value), *lens, case, guard=words, blocks=blocks)
    found = known.difference(case, answer, dtype) or _unlike(words, max(real), 0, 0)
    if found is None:
        value = value.clone()
        value[0, 5, 0, 3] = math.inf
        out, _ = card.run(row, (query, key, value), *lens, case, guard=words, blocks=blocks)
        bad = int((~torch.isfinite(out)).sum())
        found = _unlike(words, math.inf, 1, bad) if bad else "an infinity in v is not in out"
    return None if found is None else f"{GUARDED}: {found}"


def _unlike(words: Tensor, largest: float, bad_values: int, bad_results: int) -> str | None:
    """What is otherwise in a guard than it should be, in words; None: nothing."""
    size = int(torch.tensor(largest, device="cpu").view(torch.int32))
    want = torch.tensor([size, 0, bad_values, bad_results], dtype=torch.int32, device="cpu")
    got = words.cpu()
    if torch.equal(got, want):
        return None
    numbers = [float(got[:1].view(torch.float32)), *got[1:].tolist()]
    return f"the guard says {numbers} instead of {[largest, 0, bad_values, bad_results]}"


def _wrong_graph(card: Card, row: KernelInfo, dtype: torch.dtype) -> str | None:
    """A captured call is replayed with other contents in the same memory, other lengths and other
    lists."""
    call = ProofCall(GRAPH, lens_on_device=True)
    case = call.case(row.head_dim_max)
    known = _known(row, dtype, call, case)
    operands = _placed(call, known.operands, dtype, card.device())
    q_lens, k_lens = _lens(call, case, card.device())
    blocks = known.blocks_on(card.device())
    held = [x for x in (*operands, k_lens, *blocks[:2]) if x is not None]
    real = [x.clone() for x in held]
    for x in held:
        x.fill_(1 if x is k_lens else 0)
    replay = card.captured(lambda: card.run(row, operands, q_lens, k_lens, case, blocks=blocks))
    if replay is None:
        return None
    for here, x in zip(held, real, strict=True):
        here.copy_(x)
    found = known.difference(case, replay(), dtype)
    return None if found is None else f"{GRAPH}: {found}"


def _wrong_skip(card: Card, row: KernelInfo, dtype: torch.dtype) -> str | None:
    """Calls with a skip_threshold."""
    head_dim = row.head_dim_max

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_lens: Tensor,
        k_lens: Tensor,
        mask: str,
        blocks: Blocks,
        guard: Tensor,
    ) -> Answer:
        case = Case(query.shape[1], key.shape[1], head_dim, mask)
        return card.run(row, (query, key, value), q_lens, k_lens, case, guard, blocks)

    return skip_calls.wrong(run, card.device(), dtype, head_dim)
