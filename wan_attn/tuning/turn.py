# SPDX-License-Identifier: Apache-2.0
"""turn.py - when a kind of call is measured, and the measuring itself.

A measurement costs so many runs of a slice that is a known share of the call: its cost is counted
in calls, without a clock. It may cost COST of the attention that the kind has needed so far, this
call included. A long call can pay at once; the others wait until enough of them have run, which is
the same number in every process. Nothing is timed, and nothing waits for the device, before that.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_attn import config, log
from wan_attn.request import Request
from wan_attn.request.transforms import innermost_transform
from wan_attn.tuning import book, measure, slices, words
from wan_attn.tuning.candidates import Candidate, version
from wan_attn.tuning.kinds import Kind, kind_of, machine, why_never, work
from wan_attn.tuning.slices import Operands, Slice

COST = 0.05
# FLOP a second that cards, or one thread of a CPU with AVX2 or NEON, reach: what a slice may be, so
# that all its runs end within measure.SECONDS_MAX.
RATE = {"cpu": 3e10, "cuda": 2e13}
# How much more than its share of the call a slice takes: keys are packed for fewer rows, and the
# slower candidates run as well. Measured with benchmarks/measured_order.py: up to 1.4.
OVERHEAD = 1.5
# What comparing one candidate with float64 costs beside its runs, in FLOP of a call of that time.
CHECK = {"cpu": 5e8, "cuda": 2e11}

_calls: dict[Kind, int] = {}
_CALLS_MAX = 4096
_measuring = threading.Lock()
_given_up: set[Kind] = set()


def forget() -> None:
    """Count from 0 again, as a new process does."""
    _calls.clear()
    _given_up.clear()


config.memory(forget)


def may_decide(request: Request, settings: config.Settings) -> bool:
    """Whether a measurement may decide calls like this."""
    if settings.tune == "off" or settings.forced_backend is not None or why_never(request):
        return False
    return machine(request.device) is not None


def entry_of(request: Request) -> book.Entry | None:
    """What is known of calls like this, which may_decide() admits."""
    return book.look_up(kind_of(request), machine(request.device) or {})


@dataclass(frozen=True, slots=True)
class Turn:
    """What calls of a kind wait for until they are decided by measurement.

    Attributes:
        candidates: in today's order.
        part: the slice that will be measured.
        needed: as many calls pay for it.
    """

    request: Request
    candidates: tuple[Candidate, ...]
    kind: Kind
    part: Slice
    needed: int

    @classmethod
    def of(cls, request: Request, candidates: tuple[Candidate, ...]) -> Turn:
        """For calls like `request`, which why_never() does not refuse."""
        part = part_of(request, len(candidates))
        needed = calls_needed(request, part, len(candidates))
        return cls(request, candidates, kind_of(request), part, needed)

    def take(self, operands: Operands) -> book.Entry | None:
        """Counts a call that is about to run, and measures on its operands if it is time.

        Returns:
            The measurement that holds now; None: not yet, or not here.
        """
        known = book.look_up(self.kind, machine(self.request.device) or {})
        if known is not None and not _is_open(known, self.candidates):
            return known  # since this plan was made
        if len(_calls) >= _CALLS_MAX:
            _calls.clear()
        _calls[self.kind] = _calls.get(self.kind, 0) + 1
        if _calls[self.kind] < self.needed or self.kind in _given_up:
            return None
        why_not = _why_not_now(self.request, operands)
        if why_not:
            log.once(("tuning", why_not), logging.INFO, f"Nothing is measured: {why_not}")
            return None
        if not _measuring.acquire(blocking=False):
            return None  # another thread measures; this one does not wait
        try:
            limit = measure.SECONDS_MAX[self.request.device.type]
            entry = measured(self.request, self.candidates, operands, self.part, seconds_max=limit)
        finally:
            _measuring.release()
        if _is_open(entry, self.candidates):  # another process had other candidates
            _given_up.add(self.kind)
        return entry


def turn_for(
    request: Request, candidates: tuple[Candidate, ...], entry: book.Entry | None
) -> Turn | None:
    """The turn that calls like this wait for; None: there is nothing to measure, or no need.

    Calls that want a gradient wait for none: `tune --grad` measures them ahead of time. Activation
    checkpoints run a call twice and compare what both have kept, so that another kernel must not be
    chosen in between.
    """
    if request.needs_grad:
        return None
    if len(candidates) < 2 or (entry is not None and not _is_open(entry, candidates)):
        return None
    return Turn.of(request, candidates)


def _is_open(entry: book.Entry, candidates: tuple[Candidate, ...]) -> bool:
    """Whether a candidate came since. One for which there was no time waits for `tune`."""
    return entry.is_whole and not all(map(entry.knows, candidates))


def part_of(request: Request, candidates: int) -> Slice:
    """The slice that is measured: what one call pays for, or as little as tells the order."""
    runs = measure.runs(candidates)
    kind = request.device.type
    units = 1 if kind == "cuda" else torch.get_num_threads()
    most = measure.SECONDS_MAX[kind] * RATE[kind] * units / runs
    return slices.choose(request, COST / (OVERHEAD * runs), most)


def calls_needed(request: Request, part: Slice, candidates: int) -> int:
    """How many calls pay for a measurement."""
    fixed = candidates * CHECK[request.device.type] / max(work(request), 1.0)
    price = OVERHEAD * measure.runs(candidates) * part.share + fixed
    return max(1, math.ceil(price / COST - 1e-9))


def _why_not_now(request: Request, operands: Operands) -> str:
    """Why this very call cannot be measured on; "": it can."""
    query, key, value, _ = operands
    if request.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, whose kernels cannot be waited for"
    if innermost_transform() is not None or any(type(x) not in _PLAIN for x in (query, key, value)):
        return "torch.func or a tensor subclass wraps this call"
    if torch.are_deterministic_algorithms_enabled():
        return (
            "torch.use_deterministic_algorithms is on; `python -m wan_attn tune` decides ahead of"
            " time, and the same file gives the same kernels"
        )
    return ""


_PLAIN = (Tensor, torch.nn.Parameter)


def measured(
    request: Request,
    candidates: tuple[Candidate, ...],
    operands: Operands,
    part: Slice,
    *,
    seconds_max: float = math.inf,
    replaces: bool = False,
) -> book.Entry:
    """Measures now, keeps it, and says so."""
    found = machine(request.device)
    assert found is not None  # may_measure() has asked
    kind = kind_of(request)
    before = book.look_up(kind, found)
    figures = measure.measure(candidates, request, operands, part, seconds_max=seconds_max)
    names = [one.name for one in candidates if one.name in figures.times]
    entry = book.Entry(
        kind=kind.text,
        machine=found,
        times={name: figures.times[name] for name in names},
        least={name: figures.least[name] for name in names},
        left_out=figures.left_out,
        versions={b: v for b in {one.backend for one in candidates} if (v := version(b))},
        is_whole=figures.is_whole,
        slice=words.slice_words(part, request),
        date=book.today(),
        seconds=max(figures.seconds, 1e-6),
    )
    # One that lacks a candidate of today is out of date, and goes; else the first writer's stays.
    is_old = before is not None or config.current().tune == "again"
    entry = book.keep(kind, entry, replaces=replaces or is_old, is_lasting=figures.is_lasting)
    log.LOGGER.info("%s %s", log.PREFIX, words.outcome(entry, entry.best(candidates), request))
    return entry
