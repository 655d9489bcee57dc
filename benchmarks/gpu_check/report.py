# SPDX-License-Identifier: Apache-2.0
"""report.py - gpu_check's results as JSON and as two tables: what passed, and how fast."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Results:
    """What is known so far."""

    plan: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    ended: dict[int, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    trouble: str = ""

    @property
    def failures(self) -> list[int]:
        return [n for n, end in sorted(self.ended.items()) if end["problem"]]


def title_of(item: dict[str, Any]) -> str:
    return " ".join(word for word in (item["step"], item["row"], item["argument"]) if word)


def as_dict(results: Results, is_dry: bool) -> dict[str, Any]:
    """The content of the JSON file."""
    items = []
    for number, item in enumerate(results.plan):
        end = results.ended.get(number)
        state = "not run" if end is None else "failed" if end["problem"] else "passed"
        if end is not None and isinstance(end["detail"].get("skipped"), str):
            state = "skipped"
        items.append({**item, "state": state, **(end or {})})
    return {
        "format": 1,
        "kind": "gpu_check",
        "dry_run_on_cpu": is_dry,
        "seconds": round(results.seconds, 1),
        "trouble": results.trouble,
        **results.facts,
        "items": items,
    }


def as_markdown(found: dict[str, Any]) -> str:
    """Two tables: what passed, and how fast it is."""
    facts = found.get("environment", {})
    name = facts.get("device", "unknown device")
    lines = [f"# gpu_check on {name}", ""]
    if found["dry_run_on_cpu"]:
        lines += [
            "**A dry run with CPU kernels: it shows that the checks work. No GPU was used; its "
            "times mean nothing.**",
            "",
        ]
    lines.append(
        f"wan_attn {facts.get('wan_attn')}, torch {facts.get('torch')}, driver "
        f"{facts.get('driver')}, {facts.get('date')}, {found['seconds']:.0f} s"
    )
    if found["trouble"]:
        lines += ["", f"**{found['trouble']}**"]
    lines += ["", *_checks_table(found["items"])]
    failed = [item for item in found["items"] if item["state"] == "failed"]
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"- {title_of(item)}: {item['problem']}" for item in failed]
    lines += ["", *_speed_table(found), ""]
    return "\n".join(lines)


def _checks_table(items: list[dict[str, Any]]) -> list[str]:
    checks = [item for item in items if item["row"]]
    steps = list(dict.fromkeys(item["step"] for item in checks))
    if not steps:
        return ["No kernel was checked."]
    lines = ["| kernel | " + " | ".join(steps) + " |", "|---|" + "---|" * len(steps)]
    for row in dict.fromkeys(item["row"] for item in checks):
        cells = []
        for step in steps:
            states = [i["state"] for i in checks if (i["row"], i["step"]) == (row, step)]
            done = states.count("passed")
            ran = len(states) - states.count("not run") - states.count("skipped")
            word = "FAILED" if "failed" in states else "ok" if ran else states[0] if states else "-"
            cells.append(f"{word} {done}/{len(states)}" if len(states) > 1 else word)
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    others = [item for item in items if item["step"] == "sanitizer"]
    lines += ["", *[f"compute-sanitizer {i['argument']}: {i['state']}" for i in others]]
    return lines


def _speed_table(found: dict[str, Any]) -> list[str]:
    items = [i for i in found["items"] if i["step"] == "speed" and i["state"] == "passed"]
    peak: dict[str, float] = next(
        (i["detail"] for i in found["items"] if i["step"] == "matmul" and i["state"] == "passed"),
        {},
    )
    lines = []
    if peak:
        said = ", ".join(f"{name} {value:.4g}" for name, value in peak.items())
        lines.append(f"Matrix product of torch, measured: {said} TFLOP/s.")
    for item in items:
        detail = item["detail"]
        flash = {r["dtype"]: r["p50_ms"] for r in detail["results"] if r["kernel"] == "torch-flash"}
        lines += ["", f"{detail['shape']}", ""]
        lines.append("| kernel | dtype | p10 ms | p50 ms | p90 ms | TFLOP/s | % matmul | x flash |")
        lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
        for r in sorted(detail["results"], key=lambda r: (r["dtype"], r["p50_ms"])):
            share = f"{r['tflops'] / peak[r['dtype']]:.0%}" if peak.get(r["dtype"]) else "-"
            base = flash.get(r["dtype"])
            ratio = f"{base / r['p50_ms']:.2f}" if base else "-"
            name = f"**{r['kernel']}**" if r["ours"] else r["kernel"]
            times = " | ".join(f"{r[k]:.3f}" for k in ("p10_ms", "p50_ms", "p90_ms"))
            lines.append(
                f"| {name} | {r['dtype']} | {times} | {r['tflops']:.4g} | {share} | {ratio} |"
            )
        clocks = detail["clocks"]
        lines += ["", f"clocks and power before {clocks['before']}, after {clocks['after']}"]
        if clocks["throttled"]:
            lines.append(f"**held down: {', '.join(clocks['throttled'])}**")
        lines += [f"- {name}: {why}" for name, why in detail["skipped"].items()]
    return lines or ["No speed was measured."]


def file_stem(folder: Path, results: Results, is_dry: bool) -> Path:
    name = str(results.facts.get("environment", {}).get("device", "unknown"))
    if is_dry:
        return folder / "gpu_check-dry-run"
    return folder / f"gpu_check-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"


def save(folder: Path, results: Results, is_dry: bool) -> Path:
    """The JSON and Markdown files; the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem(folder, results, is_dry)
    found = as_dict(results, is_dry)
    stem.with_name(stem.name + ".json").write_text(json.dumps(found, indent=1) + "\n")
    path = stem.with_name(stem.name + ".md")
    path.write_text(as_markdown(found))
    return path
