# SPDX-License-Identifier: Apache-2.0
"""verdict.py - what follows from a call's measured error: which heads are computed again, with
which tau they go on, or that they are dense. Each time it says so in the log."""

from __future__ import annotations

import math
from collections.abc import Iterable

from wan_attn import log
from wan_attn.observe import sampling
from wan_attn.observe.names import of_heads, title
from wan_attn.observe.place import Place
from wan_attn.sparse import kernel
from wan_attn.sparse.record import Layer, Note
from wan_attn.sparse.routing import DENSE

TRIES = 3  # times that taus turn out to be too large in a run, after which heads are dense
SMALLEST_THRESHOLD = 0.001
FAR_BELOW = 0.4  # of the budget: a larger tau may do
ENOUGH = 4  # measurements before taus are raised


def read_pending(layer: Layer, budget: float, most: float, wait: bool = False) -> None:
    """What a GPU has told meanwhile, or will have. The results that it is about are in use."""
    while layer.pending and (wait or layer.pending[0].is_there()):
        read(layer, layer.pending.pop(0), budget, most, is_late=True)


def read(layer: Layer, note: Note, budget: float, most: float, is_late: bool) -> list[int]:
    """The groups of heads whose result has an error above the budget.

    Args:
        most: the tau above which none is tried.
        is_late: the call cannot be computed again. If its run is over, nothing follows; nor if
            the layer's threshold has gone down meanwhile.
    """
    if note.counts is not None:
        layer.add_density(note.counts.read())
    if note.guard is not None:
        lost = kernel.lost_mass(note.guard.read())
        layer.lost_mass = lost if layer.lost_mass is None else max(layer.lost_mass, lost)
    squares = [] if note.errors is None else note.errors.read()
    over: list[int] = []
    is_outdated = note.place.run != layer.run or note.threshold > layer.threshold
    for group, square in enumerate(squares):
        if group in layer.why_dense or is_outdated:
            continue
        before = layer.running.get(group)
        running = square if before is None else before + sampling.WEIGHT * (square - before)
        layer.running[group] = running
        if not max(running, square) <= budget**2:  # NaN too
            over.append(group)
    if squares:
        worst = math.sqrt(sampling.largest(squares))
        layer.measured.append((note.place.run, note.place.step, worst, is_late or not over))
        layer.measured_since += 1
    if over:
        _lower(layer, note.place, over, budget, is_late)
    elif layer.measured_since >= ENOUGH:
        _raise(layer, budget, most)
    return over


def _lower(layer: Layer, where: Place, over: list[int], budget: float, is_late: bool) -> None:
    """Less is left out from the next call on."""
    worst = sampling.largest(layer.running[group] for group in over)
    error = "NaN" if math.isnan(worst) else f"{100 * math.sqrt(worst):.2g} %"
    done = "its result was in use already" if is_late else "computed again densely"
    said = f"an error of {error} is above the budget of {100 * budget:g} %; {done}"
    hopeless: list[int | None] = []
    for group in over:
        layer.running.pop(group, None)
        layer.tries[group] = layer.tries.get(group, 0) + 1
        if layer.tries[group] >= TRIES:
            hopeless.append(group)
    if layer.threshold:
        layer.threshold /= 2
        hopeless = [None] if layer.threshold < SMALLEST_THRESHOLD else []
    layer.taus.clear()
    layer.allowance.grant()
    if hopeless:
        go_dense(layer, where, hopeless, said)
    else:
        event(layer, where, over, f"{said}. Less is left out from now on")


def _raise(layer: Layer, budget: float, most: float) -> None:
    """Where errors have been far below the budget, larger taus are looked for."""
    layer.measured_since = 0
    squares = [
        layer.running.get(group, 0.0)
        for group, tau in enumerate(layer.taus)
        if tau not in (DENSE, most)
    ]
    if squares and max(squares) < (FAR_BELOW * budget) ** 2:
        layer.taus.clear()


def go_dense(layer: Layer, where: Place, groups: Iterable[int | None], reason: str) -> None:
    """These groups of heads are dense for the rest of the run; None: all."""
    groups = list(groups)
    layer.why_dense.update(dict.fromkeys(groups, reason))
    every = all(group in layer.why_dense for group in range(len(layer.groups)))
    if every:
        layer.why_dense[None] = reason
    event(layer, where, groups, f"{reason}. Dense for the rest of this run")


def event(layer: Layer, where: Place, groups: Iterable[int | None], what: str) -> None:
    """In the report, and in the log."""
    heads = of_heads([layer.groups[group] for group in groups if group is not None])
    if len(layer.groups) < 2:
        heads = ""
    name = title(layer.expert, layer.layer, layer.kind)
    text = f"{name}{heads}{where.at_step}: {what}"
    layer.events.append(text)
    log.LOGGER.warning("%s %s", log.PREFIX, text)
