# SPDX-License-Identifier: Apache-2.0
"""record.py - what is known of each layer: why it went exact, and what a GPU has still to tell."""

from __future__ import annotations

from dataclasses import dataclass, field

from wan_attn.observe.later import Later
from wan_attn.observe.place import Place
from wan_attn.observe.timed import TimedLayer

Note = tuple[Place, Later | None, Later | None]
"""What a call says of itself: where it stood, its guard, and the square errors of its heads."""


@dataclass
class Layer(TimedLayer):
    """One kind of call of one layer of one expert.

    Attributes:
        running: group of heads -> square of its running error.
        why_exact: group of heads -> why it is exact for the rest of the run; None as a group: all.
        pending: what a GPU has still to tell.
    """

    running: dict[int, float] = field(default_factory=dict)
    why_exact: dict[int | None, str] = field(default_factory=dict)
    pending: list[Note] = field(default_factory=list)

    def begin(self, run: int) -> None:
        """A call of this run: what was decided in another one is forgotten."""
        if run != self.run:
            self.run = run
            self.running.clear()
            self.why_exact.clear()
