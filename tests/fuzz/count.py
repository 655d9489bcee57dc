# SPDX-License-Identifier: Apache-2.0
"""count.py - what a campaign has found, as its last line says it and run.py adds it up."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"counted: (\d+) calls, (\d+) crashes, (\d+) wrong, (\d+) accepted")


@dataclass
class Count:
    """Calls that were made, and those that ended badly.

    Attributes:
        crashes: the process died, or hung.
        wrong: a wrong result, wrong words, something left behind.
        accepted: a call that had to be refused was computed without a word.
    """

    calls: int = 0
    crashes: int = 0
    wrong: int = 0
    accepted: int = 0

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, {self.crashes} crashes, {self.wrong} wrong,"
            f" {self.accepted} accepted"
        )

    def __add__(self, other: Count) -> Count:
        return Count(
            self.calls + other.calls,
            self.crashes + other.crashes,
            self.wrong + other.wrong,
            self.accepted + other.accepted,
        )

    @property
    def is_bad(self) -> bool:
        return bool(self.crashes or self.wrong or self.accepted)

    def end(self) -> int:
        """Prints the line; returns the exit status of the campaign."""
        print(f"counted: {self}", flush=True)
        return int(self.is_bad)


def counted(line: str) -> Count | None:
    """What a line of a campaign's output counts; None: it is another line."""
    found = _LINE.fullmatch(line.strip())
    return None if found is None else Count(*map(int, found.groups()))
