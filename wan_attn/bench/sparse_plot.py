# SPDX-License-Identifier: Apache-2.0
"""sparse_plot.py - the picture of `bench sparse`: error against density, a panel for each head."""

from __future__ import annotations

from typing import Any

from wan_attn.bench.report import Report

STYLES = {"raster": ("#8c8c8c", "o--"), "morton": ("#1f6fb8", "o-")}
PER_ROW = 4


def errors_by_density(plt: Any, report: Report) -> Any:
    """The figure: both orders of tokens, one dot for each tau; dense heads have none."""
    heads = list(dict.fromkeys((row["head"], row["dtype"]) for row in report.rows))
    columns = min(len(heads), PER_ROW)
    lines = -(-len(heads) // PER_ROW)
    figure, panels = plt.subplots(
        lines, columns, figsize=(3.2 * columns + 0.6, 2.9 * lines + 0.7), squeeze=False
    )
    for axes in panels.flat[len(heads) :]:
        axes.axis("off")
    for axes, (head, dtype) in zip(panels.flat, heads, strict=False):
        for order, (colour, style) in STYLES.items():
            dots = sorted(
                (100 * row["density"], 100 * row["error"])
                for row in report.rows
                if (row["head"], row["dtype"], row["order"]) == (head, dtype, order)
                and row["tau"] is not None
            )
            axes.plot(*zip(*dots, strict=True), style, color=colour, label=order, markersize=3)
        axes.set_title(f"{head}, {dtype}", fontsize=9)
        axes.set_xlabel("density, %")
        axes.set_ylabel("relative error, %")
        axes.set_ylim(bottom=0)
    panels.flat[0].legend(fontsize=8)
    figure.suptitle(report.title, fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    return figure
