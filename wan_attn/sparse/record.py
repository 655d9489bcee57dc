# SPDX-License-Identifier: Apache-2.0
"""record.py - what is known of a layer whose calls leave blocks out: how many, by which tau, what
was lost by it, and why heads of it went dense."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from wan_attn.observe.later import Later
from wan_attn.observe.place import Place
from wan_attn.observe.sampling import Allowance
from wan_attn.observe.timed import TimedLayer

SHARE, ROWS, COST = 0.005, 64, 490
"""Of measuring, as in observe/sampling.py. An error is that of a row's block, not of the whole
call, as with 8 bits, so that more rows have to tell."""


class Note(NamedTuple):
    """What a call says of itself.

    Attributes:
        errors: [groups] square errors; None: it was not measured.
        counts: [heads] the share of blocks that each head has computed; None: no lists.
        guard: words of wan_attn_guard; None: not watched.
        threshold: by which it left blocks out; 0: not by one.
    """

    place: Place
    errors: Later | None = None
    counts: Later | None = None
    guard: Later | None = None
    threshold: float = 0.0

    def is_there(self) -> bool:
        """Whether reading it would not wait."""
        return all(one is None or one.is_there() for one in (self.errors, self.counts, self.guard))


@dataclass
class Layer(TimedLayer):
    """One kind of call of one layer of one expert.

    Attributes:
        taus: of each group of heads, -inf being dense; []: not known yet.
        threshold: below which near_exact leaves a block out; it goes down where that costs much.
        running: group of heads -> square of its running error.
        tries: group of heads -> how often its tau was too large, in this run.
        measured_since: measurements since taus were chosen.
        why_dense: group of heads -> why it is dense for the rest of the run; None as a group: all.
        densities: [heads], the sum over calls of the share that each has computed.
        lost_mass: the largest share of a row's weight that a call has certainly not lost more of.
        pending: what a GPU has still to tell.
    """

    allowance: Allowance = field(default_factory=lambda: Allowance(SHARE, ROWS, COST))
    taus: list[float] = field(default_factory=list)
    threshold: float = 0.0
    running: dict[int, float] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
    measured_since: int = 0
    why_dense: dict[int | None, str] = field(default_factory=dict)
    densities: list[float] = field(default_factory=list)
    counted: int = 0
    lost_mass: float | None = None
    pending: list[Note] = field(default_factory=list)

    def begin(self, run: int) -> None:
        """A call of this run. Of another one its taus stay: what a layer needs is its own."""
        if run != self.run:
            self.run = run
            self.running.clear()
            self.tries.clear()
            self.why_dense.clear()
            self.measured_since = 0
            self.allowance.grant()

    def add_density(self, shares: list[float]) -> None:
        """After a call, of each head."""
        if len(self.densities) != len(shares):
            self.densities, self.counted = [0.0] * len(shares), 0
        self.densities = [a + b for a, b in zip(self.densities, shares, strict=True)]
        self.counted += 1
