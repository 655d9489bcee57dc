# SPDX-License-Identifier: Apache-2.0
"""timing.py - how long calls take: interleaved rounds and their statistics; knows no attention."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from wan_attn.backends._errors import is_device_error
from wan_attn.tuning.clocks import (
    FLUSH_BYTES_MIN,
    Clock,
    CpuTimeClock,
    DeviceClock,
    WallClock,
    clock_for,
)

__all__ = [
    "CPU_TIME_NOTE",
    "FLUSH_BYTES_MIN",
    "ROUNDS_MAX",
    "ROUNDS_MIN",
    "ROUNDS_SLOW",
    "Clock",
    "CpuTimeClock",
    "DeviceClock",
    "Rounds",
    "StepTiming",
    "WallClock",
    "clock_for",
    "describe_failure",
    "interleave",
    "is_fatal",
    "measure_step",
    "no_collection",
    "percentile",
    "summary",
]

ROUNDS_MIN, ROUNDS_MAX = 5, 200
ROUNDS_SLOW = 3  # where even ROUNDS_MIN would take three times as long as there is time


class StepTiming(NamedTuple):
    """What people publish of a denoising step; times in milliseconds."""

    avg_ms: float
    p50_ms: float
    p90_ms: float
    iters: int


CPU_TIME_NOTE = (
    "Times are the process's CPU time over its threads, not the wall clock: other programs ran."
)


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolates linearly between neighbours; NaN if there are no values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(milliseconds: Sequence[float]) -> StepTiming:
    """Returns avg, p50, p90 and how many; NaN if there are no times."""
    average = statistics.fmean(milliseconds) if milliseconds else math.nan
    return StepTiming(
        average, percentile(milliseconds, 50), percentile(milliseconds, 90), len(milliseconds)
    )


def measure_step(
    fn: Callable[[], object],
    warmup: int = 3,
    iters: int = 10,
    *,
    device: torch.device | str | None = None,
) -> StepTiming:
    """Time `fn`, such as one denoising step, as a program runs it: caches are left alone.

    Args:
        fn: called without arguments; what it returns is dropped.
        warmup: calls before the first that counts.
        iters: calls that count.
        device: whose events to read; None: the current CUDA device if this process has used one,
            else the wall clock.

    Returns:
        avg_ms, p50_ms, p90_ms, iters.

    Raises:
        ValueError: warmup is below 0, or iters below 1.
    """
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    if iters < 1:
        raise ValueError(f"iters must be at least 1, got {iters}")
    if device is None:
        used_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        device = torch.device("cuda", torch.cuda.current_device()) if used_cuda else "cpu"
    clock = clock_for(torch.device(device))
    for _ in range(warmup):
        fn()
    clock.wait()
    marks = []
    with no_collection():
        for _ in range(iters):
            begun = clock.begin()
            fn()
            marks.append(clock.end(begun))
    clock.wait()
    return summary([clock.read(mark) for mark in marks])


@contextmanager
def no_collection() -> Any:
    """Python's garbage collector waits, so that its pauses count for no candidate."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass
class Rounds:
    """Milliseconds of every call in every round, and why some have none.

    Attributes:
        times: by name; entry i of each belongs to round i.
        skipped: by name, the reason.
    """

    times: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def describe_failure(error: BaseException) -> str:
    """Returns one line that says what a call raised."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return "out of memory"
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def is_fatal(error: BaseException) -> bool:
    """Whether the device itself is in trouble: no later time would mean anything."""
    return is_device_error(error) and describe_failure(error) != "out of memory"


def interleave(
    calls: Mapping[str, Callable[[], object]],
    clock: Clock,
    *,
    warmup: int = 2,
    seconds: float = 10.0,
    rounds: int | None = None,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> Rounds:
    """Time all calls in rounds, each call once a round, so that a slow minute is slow for all.

    The order rotates and turns round by round: none always runs first, or after the same one.

    Args:
        calls: by name. One that fails is left out with its reason; one that breaks the device is
            raised.
        warmup: untimed rounds, whose last one tells how many rounds `seconds` are enough for.
        seconds: about how long all rounds take; never fewer than ROUNDS_MIN (or ROUNDS_SLOW).
        rounds: how many; `seconds` is then ignored.
        on_round: told (rounds done, rounds in all).
    """
    found = Rounds()
    alive = dict(calls)
    one_round = 0.0
    for _ in range(max(1, warmup)):
        one_round = _warm_up(alive, clock, found)
        if one_round > seconds:  # calls this long need no second one to be warm
            break
    least = ROUNDS_MIN if ROUNDS_MIN * one_round < 3 * seconds else ROUNDS_SLOW
    total = rounds or max(least, min(ROUNDS_MAX, int(seconds / max(one_round, 1e-6))))
    found.times = {name: [] for name in alive}
    with no_collection():
        for number in range(total):
            marks: dict[str, Any] = {}
            for name in _order(list(alive), number):
                clock.flush()
                try:
                    begun = clock.begin()
                    alive[name]()
                    marks[name] = clock.end(begun)
                except Exception as error:
                    if is_fatal(error):
                        raise
                    found.skipped[name] = describe_failure(error)
            clock.wait()
            for name in found.skipped:
                alive.pop(name, None)
                found.times.pop(name, None)
            for name in alive:
                found.times[name].append(clock.read(marks[name]))
            on_round(number + 1, total)
    return found


def _order(names: list[str], number: int) -> Iterable[str]:
    place = number % len(names) if names else 0
    turned = names[place:] + names[:place]
    return turned if number % 2 == 0 else reversed(turned)


def _warm_up(alive: dict[str, Callable[[], object]], clock: Clock, found: Rounds) -> float:
    """Calls each once; returns how many seconds the round took."""
    began = time.perf_counter()
    for name in list(alive):
        clock.flush()
        try:
            alive[name]()
            clock.wait()
        except Exception as error:
            if is_fatal(error):
                raise
            found.skipped[name] = describe_failure(error)
            del alive[name]
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.empty_cache()
    return time.perf_counter() - began
