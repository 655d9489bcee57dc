# SPDX-License-Identifier: Apache-2.0
"""_mask_plan.py - a written-out attention mask as calls without one, where it is such a mask.

Programs that know nothing of lengths and windows write every pair of query and key into a mask.
Most such masks say no more than "these keys are padding", "causal" or "a window": this finds out
which, by looking at the mask itself, and gives up with a reason where it says anything else. So a
mask is obeyed or refused, never guessed at. Knows no host.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan_attn import attention

_REMEMBERED = 8  # masks: all layers of a model share one, or a few kinds


class _Run(NamedTuple):
    """Rows of one sample that follow each other, and the keys that they see, in one rule."""

    row: int
    rows: int
    key: int
    keys: int
    is_causal: bool
    left: int  # keys seen to the left of the diagonal; -1: all


_NOTHING = _Run(0, 0, 0, 0, False, -1)


@dataclass(frozen=True, slots=True)
class Part:
    """One call: a slice of the batch, of its rows and of its keys."""

    samples: slice
    rows: slice
    keys: slice
    q_lens: Tensor | None
    k_lens: Tensor | None
    is_causal: bool
    window: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """A mask as calls; rows that are in no call are 0.

    Attributes:
        parts: the calls.
        reason: why the mask cannot be expressed that way; "" if it can.
    """

    parts: tuple[Part, ...] = ()
    reason: str = ""


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None) -> Tensor:
    """Attention under the mask that `plan` was made of; all tensors are BSHD."""
    batch, seqlen_q = query.shape[:2]
    out: Tensor | None = None
    for part in plan.parts:
        result = attention.sdpa(
            query[part.samples, part.rows],
            key[part.samples, part.keys],
            value[part.samples, part.keys],
            q_lens=part.q_lens,
            k_lens=part.k_lens,
            scale=scale,
            is_causal=part.is_causal,
            window=part.window,
        )
        assert isinstance(result, Tensor)
        if len(plan.parts) == 1 and result.shape[:2] == (batch, seqlen_q):
            return result
        if out is None:
            out = query.new_zeros(query.shape)
        out[part.samples, part.rows] = result
    return query.new_zeros(query.shape) if out is None else out


def visible_keys(mask: Tensor) -> Tensor | None:
    """The mask as booleans; None if it is a bias: values beside 0 and "minus infinity"."""
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    # Hosts write the lowest number, -inf, or the sum of two of those.
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return visible if bool((visible | hidden).all()) else None


def make_plan(mask: Tensor, batch: int, seqlen_q: int, seqlen_k: int) -> Plan:
    """What a mask says.

    Args:
        mask: [batch or 1, heads or 1, seqlen_q, seqlen_k or more]; bool, True where a row sees the
            key, or a float that is added to the scores.
    """
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[2] in (1, seqlen_q)
    if not fits or mask.shape[3] < seqlen_k:
        return Plan(reason=f"its mask has the shape {list(mask.shape)}")
    if mask.shape[1] != 1 and mask.stride(1) != 0:
        return Plan(reason="its mask differs from head to head")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return Plan(reason=f"its mask is {str(mask.dtype).removeprefix('torch.')}")
    visible = visible_keys(mask[:, 0, :, :seqlen_k])
    if visible is None:
        return Plan(reason="its mask is a bias")
    rows = _intervals(visible.expand(-1, seqlen_q, -1))
    if rows is None:
        return Plan(reason="its mask has holes")
    samples = [_read(*(part[b] for part in rows)) for b in range(visible.shape[0])]
    known = [runs for runs in samples if runs is not None]
    if len(known) != len(samples):
        return Plan(reason="its mask is neither padding nor causal nor a window")
    if len(known) == 1:
        known *= batch
    moving, ending = zip(*known, strict=True) if known else ((), ())
    return Plan((*_parts(moving), *_parts(ending)))


def _intervals(visible: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """(first, last, count) of the keys that each row sees, on the CPU; None if there are gaps."""
    seqlen_k = visible.shape[-1]
    if seqlen_k == 0:
        empty = torch.zeros(visible.shape[:2], dtype=torch.int64, device="cpu")
        return empty, empty - 1, empty
    numbers = visible.to(torch.uint8)  # argmax takes no bool, and finds the first of equals
    count = visible.sum(-1)
    first = numbers.argmax(-1)
    last = seqlen_k - 1 - numbers.flip(-1).argmax(-1)
    first, last, count = torch.stack((first, last, count)).cpu()
    has_gap = (count > 0) & (last - first + 1 != count)
    return None if bool(has_gap.any()) else (first, last, count)


def _read(first: Tensor, last: Tensor, count: Tensor) -> tuple[_Run, _Run] | None:
    """One sample's rows as two runs; None if two do not do.

    In the first run the last key may move by one with each row, as in a causal mask; in the second
    it has come to the last one that there is: right padding, or the end of a window to both sides.
    """
    seeing = count.nonzero().flatten()
    if not len(seeing):
        return _NOTHING, _NOTHING
    row, end = int(seeing[0]), int(seeing[-1]) + 1
    if end - row != len(seeing):
        return None
    arrived = row + int((last[row:end] == last[row:end].max()).int().argmax())
    if arrived == row:
        run = _run(first, last, row, end)
        return None if run is None else (run, _NOTHING)
    moving = _run(first, last, row, arrived + 1)
    ending = _run(first, last, arrived + 1, end) if arrived + 1 < end else _NOTHING
    return None if moving is None or ending is None else (moving, ending)


def _run(first: Tensor, last: Tensor, row: int, end: int) -> _Run | None:
    """Rows `row` to `end` in one rule; None if there is none for them."""
    first, last = first[row:end], last[row:end]
    start, stop = int(first[0]), int(last[-1]) + 1
    # Aligned at the bottom right, as the contract has it.
    diagonal = torch.arange(stop - (end - row), stop, device=last.device)
    is_causal = bool((last == diagonal).all())
    if not is_causal and not bool((last == stop - 1).all()):
        return None
    left = -1 if bool((first == start).all()) else stop - 1 - int(first[-1])
    if left >= 0 and not bool((first == (diagonal - left).clamp(min=start)).all()):
        return None
    # One row is causal or not: as not, it is of one kind with more rows that see the same.
    return _Run(row, end - row, start, stop - start, is_causal and end - row > 1, left)


def _parts(runs: tuple[_Run, ...]) -> tuple[Part, ...]:
    """One call for the whole batch where lengths can tell its samples apart; else one for each."""
    kinds = {(run.row, run.key, run.is_causal, run.left) for run in runs}
    # A sample without rows here must not have zeros written over what it has elsewhere.
    if len(kinds) == 1 and all(run.rows for run in runs):
        return (_part(0, runs, runs[0]),)
    return tuple(_part(b, (run,), run) for b, run in enumerate(runs) if run.rows)


def _part(first: int, runs: tuple[_Run, ...], one: _Run) -> Part:
    rows, keys = max(run.rows for run in runs), max(run.keys for run in runs)
    return Part(
        samples=slice(first, first + len(runs)),
        rows=slice(one.row, one.row + rows),
        keys=slice(one.key, one.key + keys),
        q_lens=_lengths([run.rows for run in runs]),
        k_lens=_lengths([run.keys for run in runs]),
        is_causal=one.is_causal,
        window=(one.left, -1),
    )


def _lengths(lengths: list[int]) -> Tensor | None:
    is_same = len(set(lengths)) == 1
    return None if is_same else torch.tensor(lengths, dtype=torch.int32, device="cpu")


class Planner:
    """Remembers the plans of the last masks, of which every layer of a model gets the same ones.

    A mask that was written into since, and one of inference mode, whose versions torch does not
    count, are read again.

    Args:
        reader: reads masks in make_plan's place, for a caller to whom they mean something else.
    """

    def __init__(self, reader: Callable[[Tensor, int, int, int], Plan] | None = None) -> None:
        self._local = threading.local()
        self._reader = reader

    def plan(self, mask: Tensor, batch: int, seqlen_q: int, seqlen_k: int) -> Plan:
        """make_plan(), or what it said about this very mask before."""
        read = self._reader or make_plan
        if mask.is_inference():
            return read(mask, batch, seqlen_q, seqlen_k)
        known: list[tuple[Any, ...]] = self._local.__dict__.setdefault("known", [])
        kind = (mask._version, batch, seqlen_q, seqlen_k)
        for reference, its_kind, plan in known:
            if reference() is mask and its_kind == kind:
                return plan  # type: ignore[no-any-return]
        made = read(mask, batch, seqlen_q, seqlen_k)
        known.append((weakref.ref(mask), kind, made))
        del known[:-_REMEMBERED]
        return made
