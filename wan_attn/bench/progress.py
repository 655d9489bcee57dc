# SPDX-License-Identifier: Apache-2.0
"""progress.py - how far a measurement is: a bar of tqdm or rich on a terminal, else plain lines."""

from __future__ import annotations

import importlib
import sys
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """One line for what is being done now, out of so many."""

    def step(self, text: str) -> None:
        """Says that the next thing begins."""

    def close(self) -> None:
        """Says that everything is done."""


class PlainLines:
    """Prints lines: for files, pipes, and where no package draws a bar."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.total, self.stream, self.done = total, stream, 0

    def step(self, text: str) -> None:
        self.done += 1
        print(f"[{self.done}/{self.total}] {text}", file=self.stream, flush=True)

    def close(self) -> None:
        """Does nothing: lines need no end."""


class TqdmBar:
    """A bar of tqdm, which diffusers users have."""

    def __init__(self, tqdm: Any, total: int, stream: TextIO) -> None:
        self.bar = tqdm(total=total, file=stream, leave=False, ncols=100)
        self.is_first = True

    def step(self, text: str) -> None:
        if not self.is_first:
            self.bar.update(1)
        self.is_first = False
        self.bar.set_description_str(text[:48])

    def close(self) -> None:
        self.bar.close()


class RichBar:
    """A bar of rich."""

    def __init__(self, rich_progress: Any, rich_console: Any, total: int, stream: TextIO) -> None:
        console = rich_console.Console(file=stream)
        self.bar = rich_progress.Progress(transient=True, console=console)
        self.bar.start()
        self.task = self.bar.add_task("", total=total)
        self.is_first = True

    def step(self, text: str) -> None:
        self.bar.update(self.task, description=text[:48], advance=0 if self.is_first else 1)
        self.bar.refresh()  # a call may keep Python busy until the next thing
        self.is_first = False

    def close(self) -> None:
        self.bar.stop()


def make(total: int, stream: TextIO | None = None) -> Progress:
    """Returns the best that can be drawn on `stream` (default: stderr)."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        return PlainLines(total, stream)
    try:
        return TqdmBar(importlib.import_module("tqdm").tqdm, total, stream)
    except ImportError:
        pass
    try:
        bars, consoles = map(importlib.import_module, ("rich.progress", "rich.console"))
        return RichBar(bars, consoles, total, stream)
    except ImportError:
        return PlainLines(total, stream)
