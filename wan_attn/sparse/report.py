# SPDX-License-Identifier: Apache-2.0
"""report.py - what a run with blocks left out computed, saved and was off by, layer by layer: table
and JSON, with which a next run can begin.

The picture of it is bench's, which draws from the same JSON (`wan-attn precision FILE`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from wan_attn.observe import table
from wan_attn.observe.report import AnyReport
from wan_attn.observe.report import finish as at_exit
from wan_attn.request import gate
from wan_attn.sparse.record import Layer
from wan_attn.sparse.routing import DENSE
from wan_attn.sparse.watch import Watch
from wan_attn.version import __version__

KIND, FORMAT = "sparse", 1

Profile = tuple[tuple[tuple[int | None, int | None, str], tuple[float, ...]], ...]


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
            "budget": wishes.budget,
            "layers": [_layer(layer) for layer in layers],
        }
        super().__init__(found, text)


def _layer(layer: Layer) -> dict[str, Any]:
    shares = [share / layer.counted for share in layer.densities]
    taus = [
        None if group in layer.why_dense or tau == DENSE else tau
        for group, tau in enumerate(layer.taus)
    ]
    return {
        **table.plain(layer),
        "density": sum(shares) / len(shares) if shares else None,
        "densities": [round(share, 4) for share in shares],
        "taus": taus,
        "threshold": layer.threshold or None,
        "lost_mass": layer.lost_mass,
        "saved_seconds": _saved(layer),
    }


def _saved(layer: Layer) -> float | None:
    """What the calls with blocks left out would have taken more, densely; None: no call was dense,
    or all were."""
    if not layer.exact_calls or not layer.lossy_calls:
        return None
    dense = layer.exact_seconds / layer.exact_calls
    return round(dense * layer.lossy_calls - layer.lossy_seconds, 6)


HEAD = (
    "layer",
    "calls",
    "sparse",
    "density",
    "ms/call",
    "sparse ms",
    "saved s",
    "error",
    "largest",
)


def text(found: dict[str, Any]) -> str:
    """The table of a report, from its JSON."""
    rows = [
        (
            table.name(layer),
            str(layer["exact_calls"] + layer["lossy_calls"]),
            str(layer["lossy_calls"]),
            table.percent(layer["density"]),
            table.ms(layer["exact_seconds"], layer["exact_calls"]),
            table.ms(layer["lossy_seconds"], layer["lossy_calls"]),
            "-" if layer["saved_seconds"] is None else f"{layer['saved_seconds']:.2f}",
            table.percent(layer["error"]),
            table.percent(layer["largest_error"]),
        )
        for layer in found["layers"]
    ]
    events = [event for layer in found["layers"] for event in layer["events"]]
    return "\n".join([_summary(found), *table.lines(HEAD, rows), *events])


def _summary(found: dict[str, Any]) -> str:
    lossy, calls = table.calls(found)
    said = f"{found['mode']}: {lossy} of {calls} self-attention calls left blocks out"
    saved = [x["saved_seconds"] for x in found["layers"] if x["saved_seconds"] is not None]
    if saved:
        said += f" and took {sum(saved):.2f} s less"
    lost = [x["lost_mass"] for x in found["layers"] if x["lost_mass"] is not None]
    if lost:
        said += f"; no row lost more than {table.percent(max(lost))} of its weights"
    largest = table.largest_error(found)
    if largest is not None:
        said += f"; largest measured error {table.percent(largest)}"
        said += f", budget {100 * found['budget']:g} %"
    return said


def finish(watch: Watch, path: str | None) -> None:
    """At exit: the table in the log, if anything was left out, and the file, if one is named."""
    at_exit(Report(watch), watch.rank, path, "sparse report")


def profile(named: Any, name: str, budget: float) -> Profile:
    """The taus that a report has.

    Args:
        named: a file, or what it holds.
        name: what a message calls it.
        budget: of the run that begins: taus of another one are of no use.

    Raises:
        ValueError: it cannot be read, or it is none; says which and why.
    """
    found = named
    if isinstance(named, str | Path):
        try:
            found = json.loads(Path(named).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} must be a JSON file, got {str(named)!r} ({error})") from None
    if not isinstance(found, dict) or (found.get("kind"), found.get("format")) != (KIND, FORMAT):
        raise ValueError(f"{name} must be a sparse report of this version, got {gate.shown(found)}")
    if found.get("budget") != budget or found.get("mode") != "sparse":
        theirs = gate.shown(found.get("budget"))
        raise ValueError(f"{name} must be of mode sparse and a budget of {budget:g}, got {theirs}")
    try:
        return tuple(_taus(layer) for layer in found["layers"] if layer["taus"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} must have layers with taus, got others") from None


def _taus(
    layer: dict[str, Any],
) -> tuple[tuple[int | None, int | None, str], tuple[float, ...]]:
    taus = tuple(DENSE if tau is None else float(tau) for tau in layer["taus"])
    if any(math.isnan(tau) for tau in taus):
        raise ValueError
    return (layer["expert"], layer["layer"], str(layer["kind"])), taus
