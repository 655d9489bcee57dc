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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan_attn import attention

_REMEMBERED = 8  # masks: all layers of a model share one, or a few kinds


class _Sample(NamedTuple):
    """What one sample of a batch computes: rows and keys that attend, and how."""

    row: int
    rows: int
    key: int
    keys: int
    is_causal: bool
    window: int  # keys that a row sees, itself included; -1: no bound


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
        reason: why the mask cannot be had that way; "" if it can.
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
        if result.shape[:2] == (batch, seqlen_q):
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

    A row of a causal mask that does not see its own position is padding, and computes nothing; so
    it is in FlashAttention.

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
    samples = [_read(*(part[b] for part in rows), seqlen_k) for b in range(visible.shape[0])]
    known = [sample for sample in samples if sample is not None]
    if len(known) != len(samples):
        return Plan(reason="its mask is neither padding nor causal nor a window")
    return Plan(_parts(known * batch if len(known) == 1 else known))


def _intervals(visible: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """(first, last, count) of the keys that each row sees, on the CPU; None if there are gaps."""
    seqlen_k = visible.shape[-1]
    if seqlen_k == 0:
        empty = torch.zeros(visible.shape[:2], dtype=torch.int64)
        return empty, empty - 1, empty
    numbers = visible.to(torch.uint8)  # argmax takes no bool, and finds the first of equals
    count = visible.sum(-1)
    first = numbers.argmax(-1)
    last = seqlen_k - 1 - numbers.flip(-1).argmax(-1)
    first, last, count = torch.stack((first, last, count)).cpu()
    has_gap = (count > 0) & (last - first + 1 != count)
    return None if bool(has_gap.any()) else (first, last, count)


def _read(first: Tensor, last: Tensor, count: Tensor, seqlen_k: int) -> _Sample | None:
    """One sample's rows in words; None if there are none for it."""
    seeing = count.nonzero().flatten()
    if not len(seeing):
        return _Sample(0, 0, 0, 0, False, -1)
    row, end = int(seeing[0]), int(seeing[-1]) + 1
    if end - row != len(seeing):
        return None
    first, last, count = first[row:end], last[row:end], count[row:end]
    start = int(first[0])
    if bool((first == start).all() and (last == last[0]).all()):
        return _Sample(row, end - row, start, int(count[0]), False, -1)
    # Causal: the last key moves by one with the row, until the sample's real tokens end.
    place = torch.arange(row, end)
    diagonal = place + int((last - place).max())
    is_real = last == diagonal
    rows = int(is_real.sum())
    rest = ~is_real
    is_padding = (last[rest] == last.max()) & (diagonal[rest] < seqlen_k)
    if not bool(is_real[:rows].all() and is_padding.all()):
        return None
    first, last, count = first[:rows], last[:rows], count[:rows]
    window = -1 if bool((first == start).all()) else int(count.max())
    if window > 0 and not bool((first == (last - window + 1).clamp(min=start)).all()):
        return None
    return _Sample(row, rows, start, int(last[-1]) + 1 - start, True, window)


def _parts(samples: list[_Sample]) -> tuple[Part, ...]:
    """One call for the whole batch where lengths can tell its samples apart; else one for each."""
    busy = [sample for sample in samples if sample.rows]
    if not busy:
        return ()
    if len({(s.row, s.key, s.is_causal, s.window) for s in busy}) == 1:
        return (_part(0, samples, busy[0]),)
    return tuple(_part(b, [sample], sample) for b, sample in enumerate(samples) if sample.rows)


def _part(first: int, samples: list[_Sample], one: _Sample) -> Part:
    rows, keys = max(s.rows for s in samples), max(s.keys for s in samples)
    return Part(
        samples=slice(first, first + len(samples)),
        rows=slice(one.row, one.row + rows),
        keys=slice(one.key, one.key + keys),
        q_lens=_lengths([s.rows for s in samples]),
        k_lens=_lengths([s.keys for s in samples]),
        is_causal=one.is_causal,
        window=(one.window - 1, 0) if one.window > 0 else (-1, -1),
    )


def _lengths(lengths: list[int]) -> Tensor | None:
    is_same = len(set(lengths)) == 1
    return None if is_same else torch.tensor(lengths, dtype=torch.int32)


class Planner:
    """Remembers the plans of the last masks, of which every layer of a model gets the same ones.

    A mask that was written into since, and one of inference mode, whose versions torch does not
    count, are read again.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def plan(self, mask: Tensor, batch: int, seqlen_q: int, seqlen_k: int) -> Plan:
        """make_plan(), or what it said about this very mask before."""
        if mask.is_inference():
            return make_plan(mask, batch, seqlen_q, seqlen_k)
        known: list[tuple[Any, ...]] = self._local.__dict__.setdefault("known", [])
        kind = (mask._version, batch, seqlen_q, seqlen_k)
        for reference, its_kind, plan in known:
            if reference() is mask and its_kind == kind:
                return plan  # type: ignore[no-any-return]
        made = make_plan(mask, batch, seqlen_q, seqlen_k)
        known.append((weakref.ref(mask), kind, made))
        del known[:-_REMEMBERED]
        return made
