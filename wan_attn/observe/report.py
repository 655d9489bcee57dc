# SPDX-License-Identifier: Apache-2.0
"""report.py - what a watched run tells of its layers: as plain values, as JSON, at exit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from wan_attn.observe import table

Text = Callable[[dict[str, Any]], str]


class AnyReport:
    """One of either kind.

    Args:
        found: plain values, with "layers".
        text: makes their table.
    """

    def __init__(self, found: dict[str, Any], text: Text) -> None:
        self.found, self._text = found, text

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One for each layer and kind of call; see docs/precision.md and docs/sparse.md."""
        found: list[dict[str, Any]] = self.found["layers"]
        return found

    @property
    def is_lossy(self) -> bool:
        """Whether anything was computed otherwise than exactly."""
        return any(layer["lossy_calls"] for layer in self.layers)

    def as_text(self) -> str:
        """The table."""
        return self._text(self.found)

    def as_json(self) -> str:
        """What `wan-attn precision` reads, and a next run that begins with it."""
        return json.dumps(self.found, indent=1) + "\n"


def finish(report: AnyReport, rank: int | None, path: str | None, what: str) -> None:
    """At exit: the table in the log, if anything was lossy, and the file, if one is named."""
    if report.is_lossy:
        table.tell(report.as_text())
    if path is not None and report.layers:
        table.write(path, rank, report.as_json(), what)
