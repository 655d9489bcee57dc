# SPDX-License-Identifier: Apache-2.0
"""report.py - what a run in 8 bits cost and what it was off by, layer by layer: table and JSON.

The picture of it is bench's, which draws from the same JSON (`wan-attn precision FILE`).
"""

from __future__ import annotations

import json
from typing import Any

from wan_attn.observe import table
from wan_attn.precision.watch import Watch
from wan_attn.version import __version__

KIND, FORMAT = "precision", 1


class Report:
    """What a Watch knows, as plain values.

    Args:
        watch: waited for, where a GPU has still to tell something.
    """

    def __init__(self, watch: Watch) -> None:
        watch.finish()
        wishes = watch.wishes
        layers = sorted(watch.layers.values(), key=table.order)
        self.found: dict[str, Any] = {
            "format": FORMAT,
            "kind": KIND,
            "wan_attn": __version__,
            "mode": wishes.mode,
            "guard": wishes.guard,
            "budget": wishes.budget,
            "layers": [table.plain(layer) for layer in layers],
        }

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One for each layer and kind of call; see docs/precision.md for the names."""
        found: list[dict[str, Any]] = self.found["layers"]
        return found

    @property
    def is_lossy(self) -> bool:
        """Whether anything was computed in 8 bits."""
        return any(layer["lossy_calls"] for layer in self.layers)

    def as_text(self) -> str:
        """The table."""
        return text(self.found)

    def as_json(self) -> str:
        """What `wan-attn precision` reads."""
        return json.dumps(self.found, indent=1) + "\n"


HEAD = ("layer", "calls", "8-bit", "ms/call", "8-bit ms", "error", "largest")


def text(found: dict[str, Any]) -> str:
    """The table of a report, from its JSON."""
    rows = [
        (
            table.name(layer),
            str(layer["exact_calls"] + layer["lossy_calls"]),
            str(layer["lossy_calls"]),
            table.ms(layer["exact_seconds"], layer["exact_calls"]),
            table.ms(layer["lossy_seconds"], layer["lossy_calls"]),
            table.percent(layer["error"]),
            table.percent(layer["largest_error"]),
        )
        for layer in found["layers"]
    ]
    events = [event for layer in found["layers"] for event in layer["events"]]
    return "\n".join([_summary(found), *table.lines(HEAD, rows), *events])


def _summary(found: dict[str, Any]) -> str:
    lossy, calls = table.calls(found)
    largest = table.largest_error(found)
    said = f"{found['mode']}: {lossy} of {calls} attention calls had 8-bit scores"
    if largest is not None:
        said += f"; largest measured error {table.percent(largest)}"
        said += f", budget {100 * found['budget']:g} %"
    elif lossy:
        said += "; their error is measured in `balanced` and `auto` only"
    return said


def finish(watch: Watch, path: str | None) -> None:
    """At exit: the table in the log, if anything was lossy, and the file, if one is named."""
    report = Report(watch)
    if report.is_lossy:
        table.tell(report.as_text())
    if path is not None and report.layers:
        table.write(path, watch.rank, report.as_json(), "precision report")
