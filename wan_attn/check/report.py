# SPDX-License-Identifier: Apache-2.0
"""report.py - what a check found: the file for an issue, and the text for the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from wan_attn import console
from wan_attn.bench.report import Column, cell
from wan_attn.check.results import (
    BAD,
    ENDED_A_WORKER,
    PASSED,
    SKIPPED,
    UNKNOWN,
    WRONG,
    Results,
    as_dict,
    best_of_ours,
    best_of_torch,
    line,
)

SPEED_COLUMNS = (
    Column("kernel", "kernel"),
    Column("p10_ms", "p10 ms", ".3f"),
    Column("p50_ms", "p50 ms", ".3f"),
    Column("p90_ms", "p90 ms", ".3f"),
    Column("tflops", "TFLOP/s", ".3g"),
    Column("of_matmul", "% matmul", ".0f", 100),
    Column("times", "x torch", ".2f"),
    Column("extra_mib", "extra MiB", ".1f"),
    Column("max_error", "max error", ".1e"),
)
FACTS = ("wan_attn", "torch", "cuda", "cudnn", "driver", "python", "system", "proof", "date")


def default_path(results: Results) -> Path:
    """In the current folder, with the name of the device in its own."""
    name = re.sub(r"[^a-z0-9]+", "-", results.device.lower()).strip("-")
    return Path(f"wan_attn-check-{name[:60]}.md")


def save(path: Path, results: Results) -> None:
    """Writes the file for an issue.

    Raises:
        OSError: it cannot be written.
    """
    path.write_text(as_markdown(results), encoding="utf-8")


def title_of(item: dict[str, Any]) -> str:
    """As Item.title has it."""
    return " ".join(word for word in (item["step"], item["kernel"], item["argument"]) if word)


def problems(results: Results) -> list[str]:
    """Everything that is wrong, a line each."""
    found = [
        f"{title_of(item)}: {item['problem']}" for item in results.items() if item["state"] == WRONG
    ]
    found += [f"{name}, while it was timed: {why}" for name, why in results.broken().items()]
    return found + ([results.trouble] if results.trouble else [])


def counts(results: Results) -> str:
    """How many items passed, failed, were skipped or did not run."""
    states = [item["state"] for item in results.items()]
    return ", ".join(
        f"{states.count(state)} {state}" for state in dict.fromkeys((PASSED, WRONG, *states))
    )


def table_of_kernels(results: Results) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: every kernel, its verdict, and each step."""
    items = [item for item in results.items() if item["kernel"]]
    steps = list(dict.fromkeys(item["step"] for item in items))
    rows = []
    for name, verdict in results.kernels().items():
        cells = []
        for step in steps:
            mine = [i["state"] for i in items if (i["kernel"], i["step"]) == (name, step)]
            cells.append(_cell(mine))
        rows.append([name, verdict, *cells])
    return ["kernel", "verdict", *steps], rows


def _cell(states: list[str]) -> str:
    if not states:
        return "-"
    if WRONG in states:
        return "FAILED"
    ran = states.count(PASSED)
    if not ran:
        return states[0]
    return "ok" if ran == len(states) else f"ok {ran}/{len(states)}"


def table_of_times(results: Results, detail: dict[str, Any]) -> list[list[str]]:
    """A row of SPEED_COLUMNS for each candidate, the fastest first."""
    states, product = results.kernels(), products(results).get(detail["dtype"])
    base = best_of_torch(detail)
    rows = []
    for row in sorted(detail["rows"], key=lambda row: row["p50_ms"] or 0.0):
        is_timed = bool(row["p50_ms"])
        state = states.get(f"{row['kernel']}/{detail['dtype']}")
        values = {
            **row,
            "kernel": f"{row['kernel']} ({BAD})" if state == BAD else row["kernel"],
            "times": base["p50_ms"] / row["p50_ms"] if base and is_timed else None,
            "of_matmul": row["tflops"] / product if product and is_timed else None,
        }
        rows.append([cell(column, values.get(column.key)) for column in SPEED_COLUMNS])
    return rows


def clocks(detail: dict[str, Any]) -> list[str]:
    """The state of the machine around a measurement."""
    before, after = detail["before"], detail["after"]
    said = [
        f"{name} {value:g} -> {after[name]:g}" for name, value in before.items() if name in after
    ]
    return [*([f"before -> after: {', '.join(said)}"] if said else []), *detail["notes"]]


def not_timed(results: Results) -> list[str]:
    """Candidates without a time, each reason once, with its calls unless it is so for all."""
    places: dict[tuple[str, str], list[str]] = {}
    speeds = results.speeds()
    for item in speeds:
        for name, why in item["detail"]["skipped_peers"].items():
            places.setdefault((name, why), []).append(item["argument"])
    return [
        f"{name} not timed: {why}" + ("" if len(at) == len(speeds) else f" ({', '.join(at)})")
        for (name, why), at in places.items()
    ]


def notes(results: Results) -> list[str]:
    """What makes times doubtful, or must be known of them, each kind once."""
    found = [note for item in results.speeds() for note in item["detail"]["notes"]]
    kinds = {note.partition(" (")[0]: note for note in reversed(found)}
    return list(reversed(kinds.values()))


def products(results: Results) -> dict[str, float]:
    """TFLOP/s of torch's matrix product by dtype; empty: not measured."""
    found = (item for item in results.items() if item["step"] == "matmul")
    return next((item["detail"] for item in found if item["state"] == PASSED), {})


def peak(results: Results) -> str:
    """What torch's matrix product reaches; "": not measured."""
    said = ", ".join(f"{name} {value:.3g}" for name, value in products(results).items())
    return f"torch's own matrix product reaches {said} TFLOP/s here" if said else ""


def other_lines(results: Results) -> list[str]:
    """What the sanitizer said, and what was skipped: each reason once."""
    lines, skipped = [], dict[str, list[str]]()
    for item in results.items():
        if item["step"] == "sanitizer" and item["state"] == PASSED:
            lines.append(f"{title_of(item)}: {item['detail']['said']}")
        if item["state"] == SKIPPED:
            reason = item["detail"]["skipped"]
            what = item["kernel"] if reason == ENDED_A_WORKER else item["step"]
            skipped.setdefault(reason, []).append(what)
    return lines + [f"{', '.join(dict.fromkeys(at))}: {why}" for why, at in skipped.items()]


# --- the file ---------------------------------------------------------------------------------


def as_markdown(results: Results) -> str:
    """Everything, as text that GitHub shows well, with the JSON object at the end."""
    found = as_dict(results)
    lines = [f"# wan_attn check: {results.device}", "", f"**{line(results)}**", ""]
    if results.no_gpu:
        lines += [f"No GPU was checked: {results.no_gpu}. This is about the CPU's kernels.", ""]
    environment = results.facts.get("environment", {})
    told = [f"{name} {environment[name]}" for name in FACTS if environment.get(name)]
    lines += [f"{', '.join(told)}; {counts(results)}, {results.seconds:.0f} s", ""]
    if bad := problems(results):
        lines += ["## Wrong", "", *(f"- {_escape(text)}" for text in bad), ""]
    lines += ["## Kernels", "", *_markdown(*table_of_kernels(results)), ""]
    lines += [f"- {_escape(text)}" for text in other_lines(results)] + [""]
    lines += ["## Speed", "", peak(results), ""]
    for item in results.speeds():
        lines += _speed(results, item["detail"])
    lines += [f"- {_escape(text)}" for text in not_timed(results)]
    lines += ["", "<details><summary>everything, as JSON</summary>", "", "```json"]
    lines += [json.dumps(found, indent=None, allow_nan=False), "```", "", "</details>", ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _speed(results: Results, detail: dict[str, Any]) -> list[str]:
    shape = "" if detail["shape"] in detail["title"] else f" ({detail['shape']})"
    lines = [f"### {detail['title']} {detail['dtype']}{shape}", ""]
    heads = [column.heading for column in SPEED_COLUMNS]
    lines += [*_markdown(heads, table_of_times(results, detail)), ""]
    lines += [f"- {_escape(text)}" for text in clocks(detail)]
    return [*lines, ""]


def _markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# --- the terminal -----------------------------------------------------------------------------


def as_text(results: Results) -> str:
    """What people see at the end, but for the last line, which is line()."""
    lines = [console.heading(f"check of {results.device}", f"{results.seconds:.0f} s")]
    lines.append(console.pairs([("items", counts(results))]))
    lines.append(console.heading("kernels", "against float64"))
    lines.append(console.table([(name, _verdict(results, name)) for name in results.kernels()]))
    if bad := problems(results):
        lines += [console.heading("wrong"), *(console.wrap(text, "  - ", "    ") for text in bad)]
    lines += [console.heading("speed", peak(results)), _times(results)]
    lines += [console.wrap(text, "  - ", "    ") for text in (*notes(results), *not_timed(results))]
    if results.no_gpu:
        lines.append(console.heading("no GPU was checked", results.no_gpu))
    return "\n".join(lines).lstrip("\n")


def _verdict(results: Results, name: str) -> str:
    verdict = results.kernels()[name]
    if verdict in (BAD, UNKNOWN):
        return verdict
    items = [item for item in results.items() if item["kernel"] == name]
    steps = dict.fromkeys(item["step"] for item in items if item["state"] == PASSED)
    return f"{verdict}: {', '.join(steps)}"


def _times(results: Results) -> str:
    rows = []
    for item in results.speeds():
        detail = item["detail"]
        ours, torchs = best_of_ours(results, detail), best_of_torch(detail)
        others = sorted(
            (r for r in detail["rows"] if not r["ours"] and not r["kernel"].startswith("torch")),
            key=lambda row: row["p50_ms"] or 0.0,
        )
        said = [f"{r['kernel']} {r['p50_ms']:.4g}" for r in (ours, torchs, *others) if r]
        rows.append((detail["title"], detail["dtype"], ", ".join(said)))
    if not rows:
        return "  not measured"
    return console.table(rows, ("call", "dtype", "ms: our best, torch's best, others"))
