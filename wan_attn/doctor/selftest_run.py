# SPDX-License-Identifier: Apache-2.0
"""selftest_run.py - runs the self-test here or, as doctor does, in a process of its own.

A kernel that uses an instruction the CPU lacks, or a library with a broken driver behind it, does
not raise: it ends the process. Therefore the parent only reads lines; when the child dies or hangs,
the path it had announced is the failure, and a new child goes on with the others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from wan_attn.doctor import selftest
from wan_attn.doctor.selftest import Path, Result
from wan_attn.doctor.selftest_paths import paths

MARK = "@@wan_attn-selftest "
TIMEOUT = 120.0  # seconds without a word from the child
MAX_CHILDREN = 12  # paths that may each kill a child before the rest is given up


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides log lines: the calls inside are not the user's, and the lines would confuse."""
    logger = logging.getLogger("wan_attn")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def run_here(skip: Collection[str] = ()) -> Iterator[Result]:
    """Runs the self-test in this process."""
    with _quiet():
        yield from selftest.check_all(path for path in paths() if path.key not in skip)


def child(argv: Sequence[str]) -> int:
    """The program of the child: announces a path, reports it, takes the next."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip", action="append", default=[])
    skip = set(parser.parse_args(argv).skip)

    def say(what: str, value: object) -> None:
        print(MARK + json.dumps({what: value}), flush=True)

    def started(path: Path) -> None:
        say("start", [path.device, path.kind, path.name])

    with _quiet():
        chosen = (path for path in paths() if path.key not in skip)
        for result in selftest.check_all(chosen, started):
            say("result", dataclasses.asdict(result))
    say("end", True)
    return 0


def _command(skip: Sequence[str]) -> list[str]:
    # sys.path goes along, so that the child tests the package that the parent has imported.
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
        "from wan_attn.doctor.selftest_run import child; raise SystemExit(child(sys.argv[1:]))"
    )
    skips = [f"--skip={key}" for key in skip]
    return [sys.executable, "-c", code, json.dumps(sys.path), *skips]


@dataclasses.dataclass
class Outcome:
    """All results, and why the self-test as a whole ended early, if it did."""

    results: list[Result]
    error: str | None = None


def run_isolated(
    make_command: Any = _command, timeout: float = TIMEOUT, max_children: int = MAX_CHILDREN
) -> Outcome:
    """Runs the self-test in child processes."""
    outcome = Outcome([])
    for _ in range(max_children):
        done = [result.key for result in outcome.results]
        unfinished, death = _run_one(make_command(done), timeout, outcome.results)
        if death is None:
            return outcome
        if unfinished is None:
            outcome.error = f"it stopped between two paths: {death}"
            return outcome
        device, kind, name = unfinished
        result = Result(kind, name, device, calls=1)
        result.fail(death)
        outcome.results.append(result)
    outcome.error = f"given up after {max_children} crashes"
    return outcome


def _run_one(
    command: list[str], timeout: float, results: list[Result]
) -> tuple[list[str] | None, str | None]:
    """Runs one child: (the path it had begun, how it died), or (None, None) after a proper end."""
    current: list[str] | None = None
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True
        )
        try:
            for line in _lines(process, timeout):
                message = json.loads(line)
                if "end" in message:
                    return None, None
                if "start" in message:
                    current = message["start"]
                else:
                    results.append(Result(**message["result"]))
                    current = None
            code = process.wait(timeout=10)
        except queue.Empty:
            return current, f"no answer within {timeout:.0f} s"
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        return current, f"the process {_how(code)}{_last_words(errors.read())}"


def _lines(process: subprocess.Popen[str], timeout: float) -> Iterator[str]:
    """Yields the child's marked lines until its output closes; queue.Empty after a long silence."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                lines.put(line[len(MARK) :])
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get(timeout=timeout)) is not None:
        yield line


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with code {code:#x}" if code > 255 else f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""
