# SPDX-License-Identifier: Apache-2.0
"""timed.py - what is known of each layer, whatever is left out of it: its calls, their time, error
and what happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from wan_attn.observe.pace import Pace
from wan_attn.observe.sampling import Allowance
from wan_attn.tuning import clocks

KEPT_MARKS = 64  # pairs of events of one layer, before those that have passed are read


@dataclass
class TimedLayer:
    """One kind of call of one layer of one expert.

    Attributes:
        exact_calls, lossy_calls, exact_seconds, lossy_seconds: of all runs. A call of which some
            heads are exact is a lossy one.
        groups: the groups of heads that are measured together.
        measured: (run, step, error, whether its result stands): the relative error of each call
            that was measured, of its worst group of heads.
        events: what happened, in words, of all runs.
    """

    expert: int | None
    layer: int | None
    kind: str
    run: int = 0
    exact_calls: int = 0
    lossy_calls: int = 0
    exact_seconds: float = 0.0
    lossy_seconds: float = 0.0
    groups: tuple[tuple[int, int], ...] = ()
    measured: list[tuple[int, int | None, float, bool]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    allowance: Allowance = field(default_factory=Allowance)
    _marks: list[tuple[Any, Any, bool, Pace | None]] = field(default_factory=list)

    def stop(self, begun: Any, device: torch.device, is_lossy: bool, pace: Pace | None) -> None:
        """After a call; `pace` learns what it took, too.

        Args:
            begun: clocks.mark() before it.
        """
        self.lossy_calls += is_lossy
        self.exact_calls += not is_lossy
        ended = clocks.mark(device)
        if isinstance(begun, float):
            self._add(ended - begun, is_lossy, pace)
        elif begun is not None and ended is not None:
            self._marks.append((begun, ended, is_lossy, pace))
            is_waited_for = pace is not None and pace.least() is None
            if is_waited_for or len(self._marks) >= KEPT_MARKS:
                self.drain(wait=False)

    def drain(self, wait: bool) -> None:
        """Turn events into seconds: all after waiting for them, else those that have passed."""
        while self._marks and (wait or self._marks[0][1].query()):
            begin, end, is_lossy, pace = self._marks.pop(0)
            end.synchronize()
            self._add(begin.elapsed_time(end) / 1e3, is_lossy, pace)

    def _add(self, seconds: float, is_lossy: bool, pace: Pace | None) -> None:
        if pace is not None:
            pace.add(seconds, is_lossy)
        if is_lossy:
            self.lossy_seconds += seconds
        else:
            self.exact_seconds += seconds
