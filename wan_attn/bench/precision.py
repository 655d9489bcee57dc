# SPDX-License-Identifier: Apache-2.0
"""precision.py - the picture of a precision report: error by layer and step, time by layer; needs
matplotlib (pip install matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wan_attn.bench.plots import BASE, OURS, NoPicture, pyplot, save
from wan_attn.precision.report import name

OVER = "#c0504d"  # of an error above the budget, and of layers that went exact
NOT_LOSSY = "#e8e8e8"


def draw(found: dict[str, Any], path: Path) -> Path:
    """The picture of this report, as SVG or PNG by the suffix of `path`, which is returned.

    Args:
        found: what the JSON file holds.

    Raises:
        NoPicture: with the reason.
    """
    layers = [x for x in found["layers"] if x["lossy_calls"]] or found["layers"]
    layers = [x for x in layers if x["layer"] is not None] or layers
    if not layers:
        raise NoPicture("no picture: the report has no layer")
    plt = pyplot()
    height = min(2.4 + 0.2 * len(layers), 14.0)
    figure, (left, right) = plt.subplots(
        *(1, 2),
        figsize=(11.0, height),
        sharey=True,
        gridspec_kw={"width_ratios": (3, 2)},
        layout="constrained",
    )
    _errors(plt, figure, left, layers, found["budget"])
    _times(right, layers)
    kinds = sorted({layer["kind"] for layer in layers})
    labels = [name(layer) if len(kinds) > 1 else _number(layer) for layer in layers]
    left.set_yticks(range(len(layers)), labels, fontsize=8)
    has_experts = any(layer["expert"] for layer in layers)
    what = "expert / layer" if has_experts else "layer"
    left.set_ylabel(what if len(kinds) > 1 else f"{what} ({kinds[0]}-attention)")
    figure.suptitle(f"wan_attn {found['wan_attn']}, mode {found['mode']}: 8-bit scores by layer")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(plt, figure, path)
    return path


def _number(layer: dict[str, Any]) -> str:
    return name(layer).partition(" ")[0]


def _errors(plt: Any, figure: Any, axes: Any, layers: list[dict[str, Any]], budget: float) -> None:
    """A square for each layer and step: its largest measured error; grey without one."""
    steps = [
        one["step"] for layer in layers for one in layer["measured"] if one["step"] is not None
    ]
    count = max(steps, default=0) + 1
    grid: list[list[float]] = [[float("nan")] * count for _ in layers]
    for row, layer in enumerate(layers):
        for one in layer["measured"]:
            at, error = one["step"] or 0, 100 * one["error"]
            grid[row][at] = error if grid[row][at] != grid[row][at] else max(grid[row][at], error)
    colours = plt.get_cmap("viridis").with_extremes(bad=NOT_LOSSY, over=OVER)
    image = axes.imshow(grid, aspect="auto", cmap=colours, vmin=0.0, vmax=100 * budget)
    bar = figure.colorbar(image, ax=axes, extend="max", fraction=0.05, pad=0.04)
    bar.ax.set_title("%", fontsize=9)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    said = f"measured error (budget {100 * budget:g} %); grey: exact, or not measured"
    if any(layer["events"] for layer in layers):
        said += "; !: see the table"
    axes.set_title(said, fontsize=9)
    if not any(layer["measured"] for layer in layers):
        middle = ((count - 1) / 2, (len(layers) - 1) / 2)
        axes.annotate("no error was measured", middle, ha="center", va="center")
        axes.set_xticks([])
    for row, layer in enumerate(layers):
        if layer["events"]:
            at = (count - 0.5, row)
            marks = {"color": OVER, "va": "center", "weight": "bold", "annotation_clip": False}
            axes.annotate("!", at, (4, 0), textcoords="offset points", **marks)
        if row and layer["expert"] != layers[row - 1]["expert"]:
            axes.axhline(row - 0.5, color="black", linewidth=0.8)


def _times(axes: Any, layers: list[dict[str, Any]]) -> None:
    rows = range(len(layers))
    for kind, colour, shift in (("exact", BASE, -0.2), ("lossy", OURS, 0.2)):
        times = [
            1e3 * layer[f"{kind}_seconds"] / layer[f"{kind}_calls"] if layer[f"{kind}_calls"] else 0
            for layer in layers
        ]
        title = "exact" if kind == "exact" else "8-bit"
        axes.barh([row + shift for row in rows], times, height=0.4, color=colour, label=title)
    axes.set_xlabel("ms a call, guard and measurement included")
    axes.set_title("time", fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncol=2, frameon=False)
