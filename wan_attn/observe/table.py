# SPDX-License-Identifier: Apache-2.0
"""table.py - what reports share: layers as plain values, their table, and the file at exit."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_attn import log
from wan_attn.observe import sampling
from wan_attn.observe.timed import TimedLayer
from wan_attn.store import processes

SHOWN = 80  # layers in the table of the log


def order(layer: TimedLayer) -> tuple[Any, ...]:
    """Experts one after the other, and layers in them; what has no layer at the end."""
    far = 1 << 30
    expert = far if layer.expert is None else layer.expert
    return expert, far if layer.layer is None else layer.layer, layer.kind != "self", layer.kind


def plain(layer: TimedLayer) -> dict[str, Any]:
    """A layer as JSON has it."""
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
        "largest_error": sampling.largest(kept) if kept else None,
        "measured": [
            {"run": run, "step": step, "error": error, "stands": stands}
            for run, step, error, stands in layer.measured
        ],
        "events": list(layer.events),
    }


def _rms(errors: list[float]) -> float | None:
    return math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else None


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under their heads: the first to the left, the others to the right."""
    every = [head, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in every
    ]


def name(layer: dict[str, Any]) -> str:
    """Of a line of the table: 7 self, or 1/7 self in expert 1."""
    number = "?" if layer["layer"] is None else str(layer["layer"])
    return (
        f"{layer['expert']}/{number} {layer['kind']}"
        if layer["expert"]
        else (f"{number} {layer['kind']}")
    )


def calls(found: dict[str, Any]) -> tuple[int, int]:
    """Lossy ones, and all, of a report."""
    lossy = sum(layer["lossy_calls"] for layer in found["layers"])
    return lossy, lossy + sum(layer["exact_calls"] for layer in found["layers"])


def largest_error(found: dict[str, Any]) -> float | None:
    """Of all layers; None: none was measured."""
    errors = [x["largest_error"] for x in found["layers"] if x["largest_error"] is not None]
    return sampling.largest(errors) if errors else None


def ms(seconds: float, calls: int) -> str:
    """Of one call."""
    return f"{1e3 * seconds / calls:.2f}" if calls else "-"


def percent(error: float | None) -> str:
    """To a hundredth."""
    return "-" if error is None else f"{100 * error:.2f} %"


def tell(text: str) -> None:
    """The table in the log."""
    if log.LOGGER.isEnabledFor(logging.INFO):
        for line in text.splitlines()[: SHOWN + 2]:
            log.LOGGER.info("%s %s", log.PREFIX, line)


def write(path: str, rank: int | None, text: str, what: str) -> None:
    """This process's own file. Never fails a run that has done its work."""
    file = processes.file_for(Path(path), rank)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        log.LOGGER.warning("%s the %s was not written: %s", log.PREFIX, what, error)
