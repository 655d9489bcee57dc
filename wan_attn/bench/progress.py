# SPDX-License-Identifier: Apache-2.0
"""progress.py - how far it is: tqdm's bar on a terminal that has one, plain lines anywhere else."""

from __future__ import annotations

import importlib
import sys
from typing import Any, TextIO


class Progress:
    """One line for what is being done now, out of so many."""

    def __init__(self, total: int, stream: TextIO, tqdm: Any = None) -> None:
        self.total, self.stream, self.done = total, stream, 0
        self.bar = tqdm and tqdm(total=total, file=stream, leave=False, ncols=100)

    def step(self, text: str) -> None:
        """The next thing begins."""
        self.done += 1
        if self.bar:
            self.bar.n = self.done - 1
            self.bar.set_description_str(text[:48])
        else:
            print(f"[{self.done}/{self.total}] {text}", file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Says that everything is done."""
        if self.bar:
            self.bar.close()


def make(total: int, stream: TextIO | None = None) -> Progress:
    """The best that can be drawn on `stream` (default: stderr)."""
    stream = sys.stderr if stream is None else stream
    try:
        tqdm = importlib.import_module("tqdm").tqdm if stream.isatty() else None
    except ImportError:
        tqdm = None
    return Progress(total, stream, tqdm)
