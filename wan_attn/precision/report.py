# SPDX-License-Identifier: Apache-2.0
"""report.py - what a run in 8 bits cost and what it was off by, layer by layer: table and JSON.

The picture of it is bench's, which draws from the same JSON (`wan-attn precision FILE`).
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from wan_attn import log
from wan_attn.precision.record import Layer
from wan_attn.precision.verdict import largest
from wan_attn.precision.watch import Watch
from wan_attn.store import processes
from wan_attn.version import __version__

FORMAT = 1
SHOWN = 80  # layers in the table of the log


class Report:
    """What a Watch knows, as plain values.

    Args:
        watch: waited for, where a GPU has still to tell something.
    """

    def __init__(self, watch: Watch) -> None:
        watch.finish()
        wishes = watch.wishes
        layers = sorted(watch.layers.values(), key=_order)
        self.found: dict[str, Any] = {
            "format": FORMAT,
            "kind": "precision",
            "wan_attn": __version__,
            "mode": wishes.mode,
            "guard": wishes.guard,
            "budget": wishes.budget,
            "layers": [_layer(layer) for layer in layers],
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


def _order(layer: Layer) -> tuple[Any, ...]:
    """Experts one after the other, and layers in them; what has no layer at the end."""
    far = 1 << 30
    expert = far if layer.expert is None else layer.expert
    return expert, far if layer.layer is None else layer.layer, layer.kind != "self", layer.kind


def _layer(layer: Layer) -> dict[str, Any]:
    kept = [error for _, _, error, stands in layer.measured if stands]
    return {
        "expert": layer.expert,
        "layer": layer.layer,
        "kind": layer.kind,
        "exact_calls": layer.exact_calls,
        "lossy_calls": layer.lossy_calls,
        "exact_seconds": round(layer.exact_seconds, 6),
        "lossy_seconds": round(layer.lossy_seconds, 6),
        "error": _rms(kept),
        "largest_error": largest(kept) if kept else None,
        "measured": [
            {"run": run, "step": step, "error": error, "stands": stands}
            for run, step, error, stands in layer.measured
        ],
        "events": list(layer.events),
    }


def _rms(errors: list[float]) -> float | None:
    return math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else None


HEAD = ("layer", "calls", "8-bit", "ms/call", "8-bit ms", "error", "largest")


def text(found: dict[str, Any]) -> str:
    """The table of a report, from its JSON."""
    rows = [HEAD]
    for layer in found["layers"]:
        calls = layer["exact_calls"] + layer["lossy_calls"]
        rows.append(
            (
                name(layer),
                str(calls),
                str(layer["lossy_calls"]),
                _ms(layer["exact_seconds"], layer["exact_calls"]),
                _ms(layer["lossy_seconds"], layer["lossy_calls"]),
                _percent(layer["error"]),
                _percent(layer["largest_error"]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    events = [event for layer in found["layers"] for event in layer["events"]]
    return "\n".join([_summary(found), *lines, *events])


def name(layer: dict[str, Any]) -> str:
    """Of a line of the table: 7 self, or 1/7 self in expert 1."""
    number = "?" if layer["layer"] is None else str(layer["layer"])
    return (
        f"{layer['expert']}/{number} {layer['kind']}"
        if layer["expert"]
        else (f"{number} {layer['kind']}")
    )


def _summary(found: dict[str, Any]) -> str:
    lossy = sum(layer["lossy_calls"] for layer in found["layers"])
    calls = lossy + sum(layer["exact_calls"] for layer in found["layers"])
    errors = [x["largest_error"] for x in found["layers"] if x["largest_error"] is not None]
    said = f"{found['mode']}: {lossy} of {calls} attention calls had 8-bit scores"
    if errors:
        said += f"; largest measured error {_percent(largest(errors))}"
        said += f", budget {100 * found['budget']:g} %"
    elif lossy:
        said += "; their error is measured in `balanced` and `auto` only"
    return said


def _ms(seconds: float, calls: int) -> str:
    return f"{1e3 * seconds / calls:.2f}" if calls else "-"


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:.2f} %"


def finish(watch: Watch, path: str | None) -> None:
    """At exit: the table in the log, if anything was lossy, and the file, if one is named. Never
    fails a run that has done its work."""
    report = Report(watch)
    if report.is_lossy and log.LOGGER.isEnabledFor(logging.INFO):
        for line in report.as_text().splitlines()[: SHOWN + 2]:
            log.LOGGER.info("%s %s", log.PREFIX, line)
    if path is None or not report.layers:
        return
    file = processes.file_for(Path(path), watch.rank)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(report.as_json(), encoding="utf-8")
    except OSError as error:
        log.LOGGER.warning("%s the precision report was not written: %s", log.PREFIX, error)
