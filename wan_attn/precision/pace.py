# SPDX-License-Identifier: Apache-2.0
"""pace.py - whether 8-bit scores are faster than exact ones here, for one kind of call."""

from __future__ import annotations

from dataclasses import dataclass, field

ENOUGH = 3  # calls of each sort: the first ones find cold caches, or kernels not yet loaded
EXACT_TURNS = frozenset((1, 3, 5))
"""Which of the calls that may be lossy are exact, counted from 0, where no other call is."""


@dataclass(slots=True)
class Pace:
    """The least seconds of exact and of 8-bit calls, with all that belongs to these."""

    _exact: list[float] = field(default_factory=list)
    _lossy: list[float] = field(default_factory=list)
    _turns: int = 0
    _is_told: bool = False

    def is_turn_of_exact(self) -> bool:
        """Before a call that may be lossy: whether it has to show what an exact one takes."""
        turn, self._turns = self._turns, self._turns + 1
        return turn in EXACT_TURNS and len(self._exact) < ENOUGH

    def add(self, seconds: float, is_lossy: bool) -> None:
        """After a call."""
        kept = self._lossy if is_lossy else self._exact
        if len(kept) < ENOUGH:
            kept.append(seconds)

    def least(self) -> tuple[float, float] | None:
        """Seconds of an exact and of a lossy call; None: too few calls to know."""
        if min(len(self._exact), len(self._lossy)) < ENOUGH:
            return None
        return min(self._exact), min(self._lossy)

    def news(self) -> tuple[float, float] | None:
        """The same, but once only."""
        if self._is_told:
            return None
        least = self.least()
        self._is_told = least is not None
        return least
