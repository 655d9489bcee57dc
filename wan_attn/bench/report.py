# SPDX-License-Identifier: Apache-2.0
"""report.py - one result: rows and columns, what was left out, notes, the machine; four formats."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_attn import console

FORMAT = 1  # of the JSON and CSV files; compare.py asks for it
MISSING = "-"


@dataclass(frozen=True)
class Column:
    """One column of a table: the key in the files, what people read, how a number is written."""

    key: str
    heading: str
    style: str = ""
    factor: float | None = None


@dataclass
class Report:
    """One table and what belongs to it.

    Attributes:
        kind: "kernels", "step", "suite" or "compare".
        columns: what people see; the files hold every key of the rows.
        rows: key -> value.
        skipped: (where, what, reason), for what has no row.
        notes: sentences that a reader needs in order not to be misled.
    """

    kind: str
    title: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def note(self, sentences: Iterable[str]) -> None:
        """Adds notes; each is said once."""
        self.notes += [text for text in sentences if text not in self.notes]


def cell(column: Column, value: Any) -> str:
    """One value as people read it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    scaled = value if column.factor is None else value * column.factor
    return format(scaled, column.style) if column.style else str(value)


def _cells(report: Report) -> list[list[str]]:
    return [[cell(c, row.get(c.key)) for c in report.columns] for row in report.rows]


def as_text(report: Report) -> str:
    """The report for a terminal."""
    lines = [console.heading(report.title)]
    body = _cells(report)
    if body:
        heads = [c.heading for c in report.columns]
        widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]
        is_number = [bool(c.style) for c in report.columns]
        for cells in [heads, *body]:
            aligned = (
                f"{word:>{w}}" if number else f"{word:<{w}}"
                for word, w, number in zip(cells, widths, is_number, strict=True)
            )
            lines.append(("  " + "  ".join(aligned)).rstrip())
    else:
        lines.append("  nothing could be measured")
    if report.skipped:
        lines.append(console.heading("Not measured"))
        lines.append(console.table(_grouped(report.skipped)))
    if report.notes:
        lines.append("")
        lines += [console.wrap(text, "  - ", "    ") for text in report.notes]
    return "\n".join(lines)


def _grouped(skipped: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Returns (what, reason and where); the same reason is told once."""
    places: dict[tuple[str, str], list[str]] = {}
    for where, what, reason in skipped:
        places.setdefault((what, reason), []).append(where)
    everywhere = len(dict.fromkeys(where for where, _, _ in skipped))
    rows = []
    for (what, reason), found in places.items():
        at = dict.fromkeys(found)
        is_all = len(at) == everywhere or not any(at)
        rows.append((what, reason if is_all else f"{reason} ({', '.join(at)})"))
    return rows


def as_markdown(report: Report) -> str:
    """The report as Markdown, to paste into an issue."""
    lines = [f"### {report.title}", ""]
    lines.append("| " + " | ".join(c.heading for c in report.columns) + " |")
    lines.append("|" + "|".join("---:" if c.style else "---" for c in report.columns) + "|")
    lines += ["| " + " | ".join(map(_escape, row)) + " |" for row in _cells(report)]
    if report.skipped:
        lines += ["", "Not measured:", ""]
        lines += [f"- {_escape(what)}: {_escape(why)}" for what, why in _grouped(report.skipped)]
    lines += ["", *[f"- {text}" for text in report.notes]]
    facts = report.environment
    told = [f"{k} {facts[k]}" for k in ("wan_attn", "torch", "cuda", "driver") if facts.get(k)]
    lines += ["", f"`{facts.get('device', '?')}` · {' · '.join(told)} · {facts.get('date', '')}"]
    lines += ["", "<details><summary>environment</summary>", "", "```json"]
    lines += [json.dumps({**facts, **report.state}, indent=1), "```", "", "</details>", ""]
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def as_dict(report: Report) -> dict[str, Any]:
    """The content of the JSON file."""
    return {
        "format": FORMAT,
        "kind": report.kind,
        "title": report.title,
        "seconds": round(report.seconds, 1),
        "environment": report.environment,
        "state": report.state,
        "rows": [{k: _plain(v) for k, v in row.items()} for row in report.rows],
        "skipped": [dict(zip(("where", "what", "reason"), s, strict=True)) for s in report.skipped],
        "notes": report.notes,
    }


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity; six digits are more than any clock has."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return [_plain(v) for v in value] if isinstance(value, list) else value


def as_csv(report: Report) -> str:
    """Returns CSV with every key of every row; rounds are numbers with spaces between."""
    keys = list(dict.fromkeys(key for row in report.rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        plain = {k: _plain(v) for k, v in row.items()}
        writer.writerow(
            {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in plain.items()}
        )
    return text.getvalue()


def write(report: Report, stem: Path) -> list[Path]:
    """Writes STEM.csv, STEM.json and STEM.md; returns their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, text in (
        (".csv", as_csv(report)),
        (".json", json.dumps(as_dict(report), indent=1) + "\n"),
        (".md", as_markdown(report)),
    ):
        path = stem.with_name(stem.name + suffix)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
