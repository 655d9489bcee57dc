# SPDX-License-Identifier: Apache-2.0
"""child.py - a Python process that tries what may end it: started with this process's modules,
listened to line by line, and ended when it says nothing for too long."""

from __future__ import annotations

import json
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "@@wan_attn "  # before each line that is meant: libraries print, too


def why_no_python() -> str | None:
    """Why no other process can be started here; None: one can. A program with Python inside may
    name itself as sys.executable, and would be started a second time."""
    name = Path(sys.executable or "").name
    if getattr(sys, "frozen", False) or not re.match(r"(?i)(python|pypy)", name):
        return (
            f"this program has no Python to start ({sys.executable or 'sys.executable is empty'})"
        )
    return None


def command(code: str, words: Sequence[str]) -> list[str]:
    """Runs `code` in another Python with this one's sys.path, so that it imports the same files.

    Args:
        words: its sys.argv[1:].
    """
    before = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    return [sys.executable, "-c", before + code, json.dumps(sys.path), *words]


def say(**words: Any) -> None:
    """To the process that listens."""
    sys.stdout.write(f"\n{MARK}{json.dumps(words)}\n")  # a library may have begun a line
    sys.stdout.flush()


class Child:
    """A process that says something now and then."""

    def __init__(
        self,
        command: Sequence[str],
        handles: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            handles: open files that it is to keep; not on Windows.
            environment: None: this process's.

        Raises:
            OSError: it cannot be started.
        """
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        try:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                # Ctrl-C is for the one who waits: it ends this process, and knows why.
                start_new_session=True,
                env=environment,
                pass_fds=() if sys.platform == "win32" else tuple(handles),
            )
        except BaseException:
            self._errors.close()
            raise
        self._said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                self._said.put(line[len(MARK) :])
        self._said.put(None)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """What it says next; None: it says no more.

        Raises:
            TimeoutError: nothing came in this time.
        """
        try:
            line = self._said.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise TimeoutError(f"no answer within {seconds:.0f} s") from None
        said: dict[str, Any] | None = None if line is None else json.loads(line)
        return said

    def lines(self, seconds: float) -> Iterator[dict[str, Any]]:
        """All that it says, until its output closes; see next()."""
        while (said := self.next(seconds)) is not None:
            yield said

    def how_it_ended(self) -> str:
        """Waits for its end, which is near; in words."""
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "the process did not end by itself"
        self._errors.seek(0)
        return f"the process {_how(code)}{_last_words(self._errors.read())}"

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()
        self._errors.close()


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
