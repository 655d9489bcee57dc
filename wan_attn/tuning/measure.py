# SPDX-License-Identifier: Apache-2.0
"""measure.py - times the candidates for a call on a slice of it, the right ones alone."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from wan_attn.backends._errors import is_device_error
from wan_attn.request import Request
from wan_attn.transient import is_interruption, is_out_of_memory
from wan_attn.tuning import agree
from wan_attn.tuning.candidates import Candidate, Run, alone
from wan_attn.tuning.clocks import Clock, DeviceClock, WallClock
from wan_attn.tuning.slices import Operands, Slice, cut, quarter

_now = time.perf_counter

ROUNDS = 5
CLOSE = 1.5  # candidates within this factor of the best one's first time get the other rounds
FINALISTS = 3  # as many are expected to be close
# Seconds in which all runs of one measurement should be over. On a card the first run of a
# candidate may compile or plan; what did not end in time is not decided within a call.
SECONDS_MAX = {"cuda": 1.0, "cpu": 10.0}


@dataclass
class Figures:
    """What was found out.

    Attributes:
        times: by the name of a candidate, the median milliseconds of the slice.
        least: likewise, of the fastest round.
        left_out: by the name, why it was not timed: it is wrong, or it failed.
        is_whole: every candidate was tried; else the time was over.
        is_lasting: no candidate was left out for want of memory, which another process may have.
        seconds: what all of it took.
    """

    times: dict[str, float] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    is_whole: bool = True
    is_lasting: bool = True
    seconds: float = 0.0


def runs(candidates: int) -> float:
    """How many runs of the slice a measurement of so many candidates costs at most."""
    return 1.25 * candidates + ROUNDS * min(candidates, FINALISTS)


def clock_for(device: torch.device) -> Clock:
    """What is read before and after a run. Caches stay as they are, as between a model's calls."""
    return DeviceClock(device, flush_bytes=0) if device.type == "cuda" else WallClock()


def measure(
    candidates: Sequence[Candidate],
    request: Request,
    operands: Operands,
    part: Slice,
    *,
    seconds_max: float = math.inf,
) -> Figures:
    """Times all candidates on a slice of the operands.

    Args:
        candidates: in today's order.
        request: the call that `operands` belong to.
        operands: of the whole call, or of the slice: more than `part` of them is left alone.
        part: the slice.
        seconds_max: when this is over, no other candidate is begun.

    Raises:
        RuntimeError: the device is in trouble. Exception: what a signal handler raised.
    """
    figures, began = Figures(), _now()
    clock = clock_for(request.device)
    alive: dict[str, Run] = {}
    with torch.no_grad():
        for candidate in candidates:
            if _now() - began > seconds_max:
                figures.is_whole = False
                break
            _try(candidate, request, operands, part, clock, figures, alive)
        else:
            figures.is_whole = _rounds(
                alive, cut(*operands, part), clock, figures, began + seconds_max
            )
    figures.seconds = _now() - began
    return figures


def _try(
    candidate: Candidate,
    request: Request,
    operands: Operands,
    part: Slice,
    clock: Clock,
    figures: Figures,
    alive: dict[str, Run],
) -> None:
    """The first run, on a quarter, which is checked; and one on the whole slice, which is timed."""
    run, small = alone(candidate, request.needs_grad), cut(*operands, quarter(part))
    reason: str | None = None
    try:
        reason = agree.wrong(*small, *run(*small))
        if reason is None:
            first = _time(run, cut(*operands, part), clock)
            figures.times[candidate.name] = figures.least[candidate.name] = first
            alive[candidate.name] = run
    except Exception as error:  # noqa: BLE001 - foreign code; _failure raises what is no fault of it
        reason = _failure(error, figures)
    if reason is not None:
        for found in (figures.times, figures.least):
            found.pop(candidate.name, None)
        figures.left_out[candidate.name] = reason


def _failure(error: Exception, figures: Figures) -> str:
    """Why a candidate is left out; raises what is no fault of its own."""
    if is_interruption(error):
        raise error
    if is_out_of_memory(error):
        figures.is_lasting = False
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return "out of memory"
    if is_device_error(error):
        raise error
    text = " ".join(str(error).split())[:200]
    return (
        f"failed ({type(error).__name__}: {text})" if text else f"failed ({type(error).__name__})"
    )


def _time(run: Run, operands: Operands, clock: Clock) -> float:
    begun = clock.begin()
    run(*operands)
    mark: Any = clock.end(begun)
    clock.wait()
    return clock.read(mark)


def _rounds(
    alive: dict[str, Run],
    operands: Operands,
    clock: Clock,
    figures: Figures,
    end: float,
) -> bool:
    """The rounds of the first and of those that are close to the best; each once a round, in an
    order that turns. Returns whether there was time for them."""
    best = min(figures.times.values(), default=0.0)
    # The first is what would run: it does not go because one run was disturbed.
    names = [
        name for name in alive if figures.times[name] <= CLOSE * best or name == next(iter(alive))
    ]
    if len(names) < 2:
        return True
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(ROUNDS):
        if _now() > end:
            return False
        place = number % len(names)
        turned = names[place:] + names[:place]
        for name in turned if number % 2 == 0 else reversed(turned):
            if name not in figures.left_out:
                try:
                    found[name].append(_time(alive[name], operands, clock))
                except Exception as error:  # noqa: BLE001 - likewise
                    figures.left_out[name] = _failure(error, figures)
    for name in names:
        if name in figures.left_out:
            del figures.times[name], figures.least[name]
        else:
            figures.times[name] = statistics.median(found[name])
            figures.least[name] = min(found[name])
    return True
