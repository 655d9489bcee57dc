# SPDX-License-Identifier: Apache-2.0
"""plots.py - a report as pictures; needs matplotlib (pip install matplotlib)."""

from __future__ import annotations

import importlib
import statistics
from pathlib import Path
from typing import Any

from wan_attn.bench import sparse_plot
from wan_attn.bench.report import Report

MISSING = "no picture: matplotlib is not installed (pip install matplotlib)"
OURS, BASE, THEIRS = "#1f6fb4", "#555555", "#c9b18a"
COLOURS = ("#1f6fb4", "#d1742f", "#3a8f5c", "#8a5fa8", "#b8a12a", "#777777", "#c0504d", "#4bacc6")
_BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # of a number on a line
LABELS_MAX = 4  # calls shown in one picture of bars


class NoPicture(Exception):
    """matplotlib is missing, or there is nothing to draw."""


def pyplot() -> Any:
    """matplotlib.pyplot, set up for files.

    Raises:
        NoPicture: there is no matplotlib.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise NoPicture(MISSING) from error
    matplotlib.use("Agg")
    # Text as text, and no random names: small files, the same ones each time.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "wan_attn", "font.size": 9})
    return importlib.import_module("matplotlib.pyplot")


def save(plt: Any, figure: Any, path: Path) -> None:
    """The same figure makes the same file, whenever it is drawn."""
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def draw(report: Report, stem: Path, suffix: str = ".svg") -> list[Path]:
    """The pictures of this report, STEM-what.svg (or .png); their paths.

    Raises:
        NoPicture: with the reason.
    """
    makers = {
        "kernels": (("bars", _kernel_bars), ("roofline", _roofline)),
        "rope": (("bars", _rope_bars),),
        "sparse": (("errors", sparse_plot.errors_by_density),),
        "step": (("bars", _step_bars),),
        "suite": (("bars", _step_bars), ("frames", _frames)),
    }.get(report.kind, ())
    if not report.rows or not makers:
        raise NoPicture("no picture: nothing was measured")
    plt = pyplot()
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in makers:
        figure = make(plt, report)
        if figure is None:
            continue
        path = stem.with_name(f"{stem.name}-{name}{suffix}")
        save(plt, figure, path)
        paths.append(path)
    return paths


def _caption(figure: Any, report: Report, what: str) -> None:
    facts = report.environment
    figure.suptitle(what, fontsize=11, x=0.01, ha="left")
    figure.text(
        0.01,
        0.01,
        f"{facts.get('device', '')} · torch {facts.get('torch', '')} · wan_attn "
        f"{facts.get('wan_attn', '')} · {str(facts.get('date', ''))[:10]}",
        fontsize=7,
        color="#555555",
    )


def _kernel_bars(pyplot: Any, report: Report) -> Any:
    title = "Attention: times as fast as PyTorch's SDPA (= 1.0), higher is better"
    return _speedups(pyplot, report, "kernel", "torch", title)


def _rope_bars(pyplot: Any, report: Report) -> Any:
    title = "RMS norm and RoPE: times as fast as stock Wan2.2's steps (= 1.0), higher is better"
    return _speedups(pyplot, report, "route", "wan22", title)


def _speedups(pyplot: Any, report: Report, name: str, base: str, title: str) -> Any:
    """One panel for each call: how many times as fast as the base each one is."""
    cases = list(dict.fromkeys((r["shape"], r["dtype"]) for r in report.rows))
    columns = min(len(cases), LABELS_MAX)
    lines = -(-len(cases) // columns)
    most = max(sum((r["shape"], r["dtype"]) == c for r in report.rows) for c in cases)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.4 * columns, lines * (0.9 + 0.24 * most) + 0.6), squeeze=False
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        axis.set_visible(True)
        rows = [r for r in report.rows if (r["shape"], r["dtype"]) == case]
        _bars(
            axis,
            [r[name] for r in rows],
            [r["speedup"] for r in rows],
            [OURS if r["ours"] else BASE if r[name] == base else THEIRS for r in rows],
        )
        axis.set_title(f"{case[0]}  {case[1]}", fontsize=9)
    _caption(figure, report, title)
    figure.tight_layout(rect=(0, 0.03, 1, 0.98))
    return figure


def _bars(axis: Any, names: list[str], values: list[float], colours: list[str]) -> None:
    places = range(len(names))
    axis.barh(places, values, color=colours, height=0.7)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlim(0, max([1.0, *values]) * 1.18)
    for place, value in zip(places, values, strict=True):
        axis.text(value, place, f" {value:.2f}", va="center", fontsize=8, bbox=_BEHIND)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _roofline(pyplot: Any, report: Report) -> Any:
    """TFLOP/s over the number of keys of self-attention, and what the machine can do at most."""
    rows = [r for r in report.rows if r["seqlen_q"] == r["seqlen_k"]]
    head_dims = [r["shape"].rpartition("x")[2] for r in rows]
    rows = [r for r, d in zip(rows, head_dims, strict=True) if d == statistics.mode(head_dims)]
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    lengths = {r["seqlen_k"] for r in rows}
    if len(lengths) < 2:
        return None
    figure, axes = pyplot.subplots(
        1, len(dtypes), figsize=(max(7.5, 5.2 * len(dtypes)), 4.4), squeeze=False
    )
    names = list(dict.fromkeys(r["kernel"] for r in rows))
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for number, name in enumerate(names):
            points = sorted(
                (r["seqlen_k"], r["tflops"])
                for r in rows
                if (r["kernel"], r["dtype"]) == (name, dtype)
            )
            if points:
                is_ours = any(r["ours"] for r in rows if r["kernel"] == name)
                axis.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=4,
                    color=COLOURS[number % len(COLOURS)],
                    linestyle="-" if is_ours else "--",
                    label=name,
                )
        _roof(axis, report, dtype)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(lengths), [f"{n:,}" for n in sorted(lengths)])
        axis.minorticks_off()
        axis.set_yscale("log")
        axis.set_ylim(top=axis.get_ylim()[1] * 1.7)  # room for the roof's label
        axis.set_xlabel("queries = keys")
        axis.set_ylabel("TFLOP/s")
        axis.set_title(dtype, fontsize=9)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 0.04)
    )
    _caption(figure, report, "Self-attention: TFLOP/s over length (solid: ours)")
    figure.tight_layout(rect=(0, 0.16, 1, 0.98))
    return figure


def _roof(axis: Any, report: Report, dtype: str) -> None:
    measured = report.state.get("matmul_tflops", {}).get(dtype)
    if measured:
        axis.axhline(measured, color="black", linewidth=1)
        axis.annotate(
            f"matmul, measured: {measured:.3g}",
            (0.02, measured),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=7,
        )
    sheet = report.state.get("datasheet_tflops")
    if sheet and dtype != "fp32":
        axis.axhline(sheet, color="black", linewidth=1, linestyle=":")
        axis.annotate(
            f"data sheet: {sheet:g}",
            (0.98, sheet),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=7,
            ha="right",
        )


def _step_bars(pyplot: Any, report: Report) -> Any:
    """One panel for each video: a step's time per backend, attention's part of it marked."""
    cases = list(dict.fromkeys((r["video"], r["dtype"]) for r in report.rows))
    columns = min(len(cases), LABELS_MAX)
    lines = -(-len(cases) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.4 * columns, 2.5 * lines + 0.6), squeeze=False
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        axis.set_visible(True)
        rows = [r for r in report.rows if (r["video"], r["dtype"]) == case]
        names = [r["backend"] for r in rows]
        base = rows[0]["p50_ms"]
        whole = [r["p50_ms"] / base for r in rows]
        part = [w * r["attention"] for w, r in zip(whole, rows, strict=True)]
        axis.barh(range(len(rows)), whole, color=THEIRS, height=0.7, label="the rest")
        axis.barh(range(len(rows)), part, color=OURS, height=0.7, label="attention")
        for place, row in enumerate(rows):
            said = f" {row['p50_ms']:,.0f} ms"
            axis.text(whole[place], place, said, va="center", fontsize=8, bbox=_BEHIND)
        axis.set_yticks(range(len(rows)), names)
        axis.invert_yaxis()
        axis.set_xlim(0, max(whole) * 1.35)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{case[0]}  {case[1]}", fontsize=9)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="upper right", ncols=2)
    first = report.rows[0]["backend"]
    _caption(figure, report, f"One denoising step, {first} = 1.0, lower is better")
    figure.tight_layout(rect=(0, 0.03, 1, 0.96))
    return figure


def _frames(pyplot: Any, report: Report) -> Any:
    """Milliseconds of a step over the number of frames."""
    if len({r["frames"] for r in report.rows}) < 2:
        return None
    figure, axis = pyplot.subplots(figsize=(5.4, 4))
    kinds = list(dict.fromkeys((r["backend"], r["width"], r["height"]) for r in report.rows))
    for number, (backend, width, height) in enumerate(kinds):
        rows = [r for r in report.rows if (r["backend"], r["width"], r["height"]) == kinds[number]]
        axis.errorbar(
            [r["frames"] for r in rows],
            [r["p50_ms"] for r in rows],
            yerr=[[0.0] * len(rows), [r["p90_ms"] - r["p50_ms"] for r in rows]],
            marker="o",
            markersize=4,
            capsize=2,
            color=COLOURS[number % len(COLOURS)],
            label=f"{backend}, {width}x{height}",
        )
    axis.set_xlabel("frames")
    axis.set_ylabel("ms a step (median; whisker: 90th percentile)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _caption(figure, report, "One denoising step over the length of the video")
    figure.tight_layout(rect=(0, 0.03, 1, 0.97))
    return figure
