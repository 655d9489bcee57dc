# SPDX-License-Identifier: Apache-2.0
"""verdict.py - what follows from a call's guard and from its measured error: which heads of its
layer are exact for the rest of the run. Each time it says so in the log."""

from __future__ import annotations

import math
from collections.abc import Iterable

from wan_attn import log
from wan_attn.precision import guard, sampling
from wan_attn.precision.place import Place
from wan_attn.precision.record import Layer, Note, title


def read_pending(layer: Layer, budget: float | None, wait: bool = False) -> None:
    """What a GPU has told meanwhile, or will have. The results that it is about are in use."""
    while layer.pending and (
        wait or all(one is None or one.is_there() for one in layer.pending[0][1:])
    ):
        read(layer, layer.pending.pop(0), budget, is_late=True)


def read(layer: Layer, note: Note, budget: float | None, is_late: bool) -> list[int | None]:
    """The groups of heads that are exact from now on; None among them: all.

    Args:
        budget: None: errors are only kept for the report.
        is_late: the call cannot be computed again. If its run is over, nothing follows.
    """
    where, watched, errors = note
    what_now = "its result was in use already" if is_late else "computed again exactly"
    hit = None if watched is None else guard.Words.of(watched.read()).hit()
    if hit is not None:
        if None not in layer.why_exact and where.run == layer.run:
            _switch(layer, where, [None], f"{hit}; {what_now}")
        return [None]
    squares = [] if errors is None else errors.read()
    over: dict[int | None, float] = {}
    for group, square in enumerate(squares):
        if group in layer.why_exact or where.run != layer.run:
            continue
        before = layer.running.get(group)
        running = square if before is None else before + sampling.WEIGHT * (square - before)
        layer.running[group] = running
        if budget is not None and not running <= budget**2:  # NaN too
            over[group] = running
    if over and budget is not None:
        worst = largest(over.values())
        error = "NaN" if math.isnan(worst) else f"{100 * math.sqrt(worst):.2g} %"
        reason = f"an error of {error} is above the budget of {100 * budget:g} %; {what_now}"
        _switch(layer, where, over, reason)
    if squares:
        worst = math.sqrt(largest(squares))
        layer.measured.append((where.run, where.step, worst, is_late or not over))
    return list(over)


def largest(errors: Iterable[float]) -> float:
    """NaN is larger than any other."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def _switch(layer: Layer, where: Place, groups: Iterable[int | None], reason: str) -> None:
    layer.why_exact.update(dict.fromkeys(groups, reason))
    name = title(layer.expert, layer.layer, layer.kind)
    heads = _heads([layer.groups[group] for group in groups if group is not None])
    if len(layer.groups) < 2:
        heads = ""
    text = f"{name}{heads}{where.at_step}: {reason}. It is exact for the rest of this run"
    layer.events.append(text)
    log.LOGGER.warning("%s %s", log.PREFIX, text)


def _heads(ranges: list[tuple[int, int]]) -> str:
    """Of a layer: ", heads 0-4, 7", where neighbours are one range."""
    merged: list[tuple[int, int]] = []
    for first, behind in ranges:
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], behind)
        else:
            merged.append((first, behind))
    parts = [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in merged]
    if not parts:
        return ""
    is_one = len(merged) == 1 and merged[0][1] - merged[0][0] == 1
    return f", {'head' if is_one else 'heads'} {', '.join(parts)}"
