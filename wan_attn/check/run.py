# SPDX-License-Identifier: Apache-2.0
"""run.py - runs workers until every item has a result or the time is over.

A hanging or crashing kernel costs its own item only: the worker is ended, and another one begins
at the next item.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wan_attn import config
from wan_attn.check import private
from wan_attn.check.results import Results
from wan_attn.selfcheck import child

CODE = "from wan_attn.check.worker import main; raise SystemExit(main(sys.argv[1:]))"
STARTUP_S = 90.0  # importing torch and starting CUDA, on a cold machine
GRACE_S = 20.0  # for the item that is running when the time is over


@dataclass(frozen=True)
class Scope:
    """What to check: a device, and steps and rows with commas between; "": all."""

    device: torch.device
    seconds: float
    only: str = ""
    rows: str = ""

    def words(self, start: int, left: float, without: Sequence[str]) -> list[str]:
        """What a worker is told, to begin with item `start`; see worker.py."""
        said = ["--device", str(self.device), f"--start={start}", f"--seconds={left:.1f}"]
        without_them = f"--without={','.join(without)}"
        return [*said, f"--only={self.only}", f"--rows={self.rows}", without_them]


def make_command(words: Sequence[str]) -> list[str]:
    """What starts a worker."""
    return child.command(CODE, words)


Listener = Callable[[Results, "dict[str, Any] | None"], None]


class Run:
    """One check."""

    def __init__(self, scope: Scope, listener: Listener, no_gpu: str = "") -> None:
        """
        Args:
            listener: is told of every change, and of the item that begins (else None).
            no_gpu: why no GPU is checked.
        """
        self.scope, self.listener = scope, listener
        self.results = Results(no_gpu=no_gpu)
        self.began = time.monotonic()
        self.current: int | None = None  # the item that runs
        self.at = ""  # the candidate that runs within it
        self.deadly: list[str] = []  # kernels and candidates that ended a worker: not run again

    def left(self) -> float:
        """Seconds in which an item may still begin."""
        return self.scope.seconds - (time.monotonic() - self.began)

    def all(self) -> Results:
        """Every item, in as many workers as it takes; what is known so far, after Ctrl-C.

        Raises:
            OSError: no process can be started.
        """
        try:
            self._all()
        except KeyboardInterrupt:
            self.results.trouble = "stopped by Ctrl-C"
        self.results.seconds = time.monotonic() - self.began
        self.listener(self.results, None)
        return self.results

    def _all(self) -> None:
        start, is_over = 0, False
        while not is_over and self.left() > 0:
            words = self.scope.words(start, self.left(), self.deadly)
            # A waiting OpenMP thread that spins takes the core from a candidate that has threads of
            # its own: ours would be timed beside the end of torch's. Read when torch starts.
            environment = config.for_child(OMP_WAIT_POLICY="passive")
            worker = child.Child(make_command(words), environment=environment)
            try:
                start, is_over = self._follow(worker, start)
            finally:
                worker.close()
            is_over |= bool(self.results.plan) and start >= len(self.results.plan)

    def _follow(self, worker: child.Child, start: int) -> tuple[int, bool]:
        """Listens to one worker; (the next item to begin with, whether that was all)."""
        self.current, limit, has_said = None, STARTUP_S, False
        while True:
            whole = max(1.0, self.left() + GRACE_S)
            try:
                said = worker.next(min(limit, whole))
            except TimeoutError:
                return self._silent(start, limit, is_blamed=limit <= whole)
            if said is None:
                return self._gone(start, worker.how_it_ended(), has_said)
            if "plan" in said:
                self._planned(said)
                limit = STARTUP_S
            elif "begin" in said:
                self.current, self.at = int(said["begin"]), ""
                limit = float(self.results.plan[self.current]["limit_s"])
                self.listener(self.results, self.results.plan[self.current])
            elif "at" in said:
                self.at = str(said["at"])
            elif "end" in said:
                if said["is_lost"]:
                    self.deadly.append(self._guilty())
                self._end(said["problem"], said["detail"], said["seconds"])
                start, has_said, limit = int(said["end"]) + 1, True, STARTUP_S
                if said["is_lost"]:
                    return start, False
            else:  # done, or out of time
                return start, True

    def _planned(self, said: dict[str, Any]) -> None:
        self.results.plan = said["plan"]
        if not self.results.facts:
            self.results.facts = private.scrub({k: v for k, v in said.items() if k != "plan"})
        self.listener(self.results, None)

    def _end(self, problem: str, detail: dict[str, Any], seconds: float) -> None:
        assert self.current is not None
        ended = {"problem": problem, "detail": detail, "seconds": seconds, "at": self.at}
        self.results.ended[self.current] = private.scrub(ended)
        self.results.seconds = time.monotonic() - self.began
        self.current = None
        self.listener(self.results, None)

    def _guilty(self) -> str:
        """The kernel or the candidate that runs, as sdpa_sm80_d128/bf16 or fa3/bf16."""
        assert self.current is not None
        item = self.results.plan[self.current]
        return str(item["kernel"] or f"{self.at}/{item['argument'].rpartition('/')[2]}")

    def _blame(self, words: str, seconds: float) -> int:
        """Says of the current item how it ended the worker; the next one."""
        assert self.current is not None
        following = self.current + 1
        self.deadly.append(self._guilty())
        self._end(words + (f", while {self.at} ran" if self.at else ""), {}, seconds)
        return following

    def _silent(self, start: int, limit: float, is_blamed: bool) -> tuple[int, bool]:
        if self.current is None:
            self.results.trouble = f"a worker did not begin within {limit:.0f} s"
            return start, True
        if not is_blamed:  # the whole time was over, of which no kernel is guilty
            return start, True
        return self._blame(f"hung: no answer within {limit:.0f} s", limit), False

    def _gone(self, start: int, how: str, has_said: bool) -> tuple[int, bool]:
        if self.current is not None:
            return self._blame(f"crashed: {how}", 0.0), False
        if has_said:  # between two items: its successor begins with the next
            return start, False
        self.results.trouble = private.scrub(f"a worker ended before it began an item: {how}")
        return start, True
