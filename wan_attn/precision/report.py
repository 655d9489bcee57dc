# SPDX-License-Identifier: Apache-2.0
"""report.py - what a run in 8 bits cost and what it was off by, layer by layer: table and JSON.

The picture of it is bench's, which draws from the same JSON (`wan-attn precision FILE`).
"""

from __future__ import annotations

from typing import Any

from wan_attn.observe import table
from wan_attn.observe.report import AnyReport
from wan_attn.observe.report import finish as at_exit
from wan_attn.precision.watch import Watch
from wan_attn.version import __version__

KIND, FORMAT = "precision", 1


class Report(AnyReport):
    """What a Watch knows, as plain values.

    Args:
        watch: waited for, where a GPU has still to tell something.
    """

    def __init__(self, watch: Watch) -> None:
        watch.finish()
        wishes = watch.wishes
        layers = sorted(watch.layers.values(), key=table.order)
        found: dict[str, Any] = {
            "format": FORMAT,
            "kind": KIND,
            "wan_attn": __version__,
            "mode": wishes.mode,
            "guard": wishes.guard,
            "budget": wishes.budget,
            "layers": [table.plain(layer) for layer in layers],
        }
        super().__init__(found, text)


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
    at_exit(Report(watch), watch.rank, path, "precision report")
