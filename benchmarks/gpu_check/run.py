# SPDX-License-Identifier: Apache-2.0
"""run.py - runs worker.py processes until every item has a result or the time is over."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu_check.report import Results

ROOT = Path(__file__).resolve().parents[2]
STARTUP_S = 90.0  # importing torch and starting CUDA, on a cold machine
GRACE_S = 10.0


class Worker:
    """One process of worker.py, read line by line with a time limit."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: list[str] = []
        assert self.process.stdout and self.process.stderr
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()
        self._listener = threading.Thread(
            target=self._listen, args=(self.process.stderr,), daemon=True
        )
        self._listener.start()

    def _read(self, stream: TextIO) -> None:
        for line in stream:
            self.lines.put(line)
        self.lines.put(None)

    def _listen(self, stream: TextIO) -> None:
        for line in stream:
            self.errors = [*self.errors[-20:], line.rstrip()]

    def next(self, seconds: float) -> dict[str, Any] | None:
        """What it says next; None: it ended. TimeoutError: it says nothing."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if line is None:
                return None
            if line.startswith("{"):  # a library may print, too
                said: dict[str, Any] = json.loads(line)
                return said

    def stop(self) -> str:
        """End it; how it ended, in words."""
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._listener.join(timeout=1)
        last = next((line for line in reversed(self.errors) if line.strip()), "")
        return f"exit code {code}" + (f": {last[:200]}" if last else "")


def orchestrate(
    command: Sequence[str],
    seconds: float,
    on_change: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Run workers until every item has a result or the time is over.

    Args:
        command: starts a worker; `--start N --seconds S` is added.
    """
    began = time.monotonic()
    results, start = Results(), 0
    while not results.plan or start < len(results.plan):
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            break
        worker = Worker([*command, "--start", str(start), "--seconds", f"{left:.0f}"])
        start, is_over = _follow(worker, results, start, seconds, began, on_change)
        if is_over:
            break
    results.seconds = time.monotonic() - began
    on_change(results)
    return results


def _follow(
    worker: Worker,
    results: Results,
    start: int,
    seconds: float,
    began: float,
    on_change: Callable[[Results], None],
) -> tuple[int, bool]:
    """Listen to one worker; (the next item to begin with, whether that was all)."""
    current: int | None = None
    limit = STARTUP_S
    while True:
        left = seconds + GRACE_S - (time.monotonic() - began)
        try:
            said = worker.next(min(limit, max(1.0, left)))
        except TimeoutError:
            worker.process.kill()
            worker.stop()
            if current is None:
                results.trouble = f"the worker did not begin within {limit:.0f} s"
                return start, True
            hung = left > limit
            problem = f"hung: no answer within {limit:.0f} s" if hung else ""
            if hung:
                results.ended[current] = {"problem": problem, "detail": {}, "seconds": limit}
                on_change(results)
            return current + 1, not hung
        if said is None:
            how = worker.stop()
            if current is None:
                is_done = len(results.ended) == len(results.plan) and bool(results.plan)
                if not is_done:
                    results.trouble = f"the worker ended before it began an item: {how}"
                return start, True
            results.ended[current] = {"problem": f"crashed: {how}", "detail": {}, "seconds": 0.0}
            on_change(results)
            return current + 1, False
        if "plan" in said:
            results.plan = said["plan"]
            results.facts = results.facts or {k: v for k, v in said.items() if k != "plan"}
            if not results.plan:
                worker.stop()
                return start, True
        elif "begin" in said:
            current = int(said["begin"])
            limit = float(results.plan[current]["limit_s"])
        elif "end" in said:
            number = int(said["end"])
            results.ended[number] = {k: said[k] for k in ("problem", "detail", "seconds")}
            start, current, limit = number + 1, None, STARTUP_S
            on_change(results)
            if start == len(results.plan):
                worker.stop()
                return start, True
        elif "out_of_time" in said:
            worker.stop()
            return start, True
