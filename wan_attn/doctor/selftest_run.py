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
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from wan_attn.doctor import selftest
from wan_attn.doctor.selftest import Path, Result
from wan_attn.doctor.selftest_paths import paths
from wan_attn.selfcheck import child as process

MARK = process.MARK
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

    def started(path: Path) -> None:
        process.say(start=[path.device, path.kind, path.name])

    with _quiet():
        chosen = (path for path in paths() if path.key not in skip)
        for result in selftest.check_all(chosen, started):
            process.say(result=dataclasses.asdict(result))
    process.say(end=True)
    return 0


CODE = "from wan_attn.doctor.selftest_run import child; raise SystemExit(child(sys.argv[1:]))"


def _command(skip: Sequence[str]) -> list[str]:
    return process.command(CODE, [f"--skip={key}" for key in skip])


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
    started = process.Child(command)
    try:
        for message in started.lines(timeout):
            if "end" in message:
                return None, None
            if "start" in message:
                current = message["start"]
            else:
                results.append(Result(**message["result"]))
                current = None
        return current, started.how_it_ended()
    except TimeoutError as error:
        return current, str(error)
    finally:
        started.close()
