# SPDX-License-Identifier: Apache-2.0
"""profile.py - what WAN_ATTN_PROFILE found: where the time of a run went, per layer, and spikes."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_attn import console
from wan_attn.bench import facts
from wan_attn.bench.timing import percentile
from wan_attn.selection.profile import ATTENTION, ROPE
from wan_attn.store import processes

if TYPE_CHECKING:
    from wan_attn.selection.profile import Mark, Recorder

SPIKE = 1.5  # times the median of its kind
SPIKE_MS = 0.5  # and at least this much above it: a tiny call doubles for no reason
SHOWN = 12


def finish(recorder: Recorder, seconds: float) -> None:
    """Write the file, print the summary on stderr; never fails a run that has done its work."""
    if not recorder.marks:
        if not processes.is_child():
            said = "wan_attn profile: no attention call went through wan_attn"
            if recorder.not_timed:
                said += f" outside a CUDA graph ({recorder.not_timed} were captured in one)"
            sys.stderr.write(f"{said}\n")
        return
    found = analyse(recorder.marks, seconds)
    found["not_timed"] = recorder.not_timed
    found = {"format": 1, "kind": "profile", "date": recorder.date, **found}
    found["environment"] = facts.environment(recorder.device)
    path = processes.file_for(Path(recorder.path), recorder.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        where = f"written to {path}"
    except OSError as error:
        where = f"not written: {error}"
    sys.stderr.write(f"{as_text(found)}\n  {where}\n")


def analyse(marks: Sequence[Mark], seconds: float) -> dict[str, Any]:
    """Everything but the machine; times in milliseconds on the device's own time line."""
    attention = sum(mark.ms for mark in marks if mark.part == ATTENTION)
    rope = sum(mark.ms for mark in marks if mark.part == ROPE)
    calls = [mark for mark in marks if mark.part == ATTENTION]
    first = min(mark.begin_ms for mark in marks)
    last = max(mark.begin_ms + mark.ms for mark in marks)
    forwards = _forwards(calls)
    # The host's clock where the two lines meet: the first call's end on the host is close enough.
    before = max(0.0, marks[0].host * 1e3 - marks[0].ms)
    between = last - first
    return {
        "run_seconds": seconds,
        "calls": len(calls),
        "rope_calls": len(marks) - len(calls),
        "where": {
            "before_first_call_ms": before,
            "attention_ms": attention,
            "norm_and_rope_ms": rope,
            "between_calls_ms": max(0.0, between - attention - rope),
            "after_last_call_ms": max(0.0, seconds * 1e3 - before - between),
        },
        "attention_share": attention / between if between > 0 else 1.0,
        "forwards": forwards,
        "sites": [
            {"line": key[0], "kind": key[1], "title": key[2], **_numbers(group, attention + rope)}
            for key, group in _grouped(marks, lambda m: (m.site.line, m.kind, m.title)).items()
        ],
        "layers": [
            {"model": key[0], "layer": key[1], "line": key[2], **_numbers(group, attention)}
            for key, group in _grouped(
                calls, lambda m: (m.site.model, m.site.layer, m.site.line)
            ).items()
        ],
        "spikes": _spikes(marks),
    }


def _grouped(marks: Sequence[Mark], key: Any) -> dict[Any, list[Mark]]:
    groups: dict[Any, list[Mark]] = {}
    for mark in marks:
        groups.setdefault(key(mark), []).append(mark)
    return groups


def _numbers(marks: Sequence[Mark], whole: float) -> dict[str, Any]:
    times = [mark.ms for mark in marks]
    total = sum(times)
    return {
        "calls": len(times),
        "total_ms": total,
        "share": total / whole if whole else 0.0,
        "p50_ms": percentile(times, 50),
        "p90_ms": percentile(times, 90),
        "max_ms": max(times),
    }


def _forwards(marks: Sequence[Mark]) -> dict[str, Any]:
    """Forwards of models: from one first call to the next of the same model."""
    first: dict[str, tuple[str, str]] = {}
    starts: dict[str, list[int]] = {}
    for number, mark in enumerate(marks):
        if not mark.site.model:
            continue
        layer = (mark.site.layer, mark.site.line)
        if first.setdefault(mark.site.model, layer) == layer:
            starts.setdefault(mark.site.model, []).append(number)
    found = {}
    for model, numbers in starts.items():
        begins = [marks[n].begin_ms for n in numbers]
        gaps = [b - a for a, b in zip(begins, begins[1:], strict=False)]
        if not gaps:
            continue
        usual = statistics.median(gaps)
        slow = [
            {"forward": i + 1, "ms": gap}
            for i, gap in enumerate(gaps)
            if gap > SPIKE * usual and gap > usual + SPIKE_MS
        ]
        found[model] = {
            "count": len(begins),
            "p50_ms": usual,
            "p90_ms": percentile(gaps, 90),
            "max_ms": max(gaps),
            "spikes": slow,
        }
    return found


def _spikes(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """Calls that took far longer than others of their kind, the worst first."""
    usual = {
        key: statistics.median(mark.ms for mark in group)
        for key, group in _grouped(marks, lambda m: (m.site.line, m.kind)).items()
    }
    found = []
    for number, mark in enumerate(marks):
        median = usual[mark.site.line, mark.kind]
        if mark.ms > SPIKE * median and mark.ms > median + SPIKE_MS:
            entry = {"call": number + 1, "ms": mark.ms, "usual_ms": median, "at_ms": mark.begin_ms}
            found.append({**entry, "layer": mark.site.layer, "line": mark.site.line})
    return sorted(found, key=lambda spike: spike["usual_ms"] - spike["ms"])


def _rope_row(found: dict[str, Any]) -> list[tuple[str, str]]:
    if not found["rope_calls"]:
        return []
    seconds = found["where"]["norm_and_rope_ms"] / 1e3
    return [("norm and RoPE", f"{seconds:.2f} s in {found['rope_calls']} calls")]


def as_text(found: dict[str, Any]) -> str:
    """The summary, as short as it can be read."""
    where = found["where"]
    rows = [
        ("before the first call", f"{where['before_first_call_ms'] / 1e3:.2f} s"),
        (
            "attention",
            f"{where['attention_ms'] / 1e3:.2f} s in {found['calls']} calls, "
            f"{found['attention_share']:.0%} of the time from the first call to the last",
        ),
        *_rope_row(found),
        ("between the calls", f"{where['between_calls_ms'] / 1e3:.2f} s"),
        ("after the last call", f"{where['after_last_call_ms'] / 1e3:.2f} s"),
    ]
    lines = [console.heading("Where the time went (wan_attn profile)"), console.pairs(rows)]
    table = [
        (
            f"{s['share']:.0%}",
            str(s["calls"]),
            f"{s['p50_ms']:.2f}",
            f"{s['p90_ms']:.2f}",
            f"{s['max_ms']:.2f}",
            f"{s['kind']}, {s['title']}, at {s['line']}",
        )
        for s in sorted(found["sites"], key=lambda s: -s["total_ms"])[:SHOWN]
    ]
    lines += [
        console.heading("Call sites"),
        console.table(table, ("share", "calls", "p50 ms", "p90 ms", "max ms", "call")),
    ]
    layers = [layer for layer in found["layers"] if layer["layer"]]
    if len(layers) > 1:
        slow = max(layers, key=lambda layer: layer["p50_ms"])
        fast = min(layers, key=lambda layer: layer["p50_ms"])
        said = (
            f"{len(layers)} layers, from {fast['p50_ms']:.2f} ms ({fast['layer']}) to "
            f"{slow['p50_ms']:.2f} ms ({slow['layer']})"
        )
        lines += [console.heading("Layers"), console.wrap(said)]
    for model, forward in found["forwards"].items():
        said = (
            f"{model}: {forward['count']} forwards, {forward['p50_ms']:.1f} ms each (p90 "
            f"{forward['p90_ms']:.1f}, max {forward['max_ms']:.1f})"
        )
        if forward["spikes"]:
            numbers = [f"{s['forward']} ({s['ms']:.0f} ms)" for s in forward["spikes"][:SHOWN]]
            said += f"; slow ones: {', '.join(numbers)}"
        lines.append(console.wrap(said))
    spikes = found["spikes"]
    if spikes:
        worst = ", ".join(
            f"{s['ms']:.1f} instead of {s['usual_ms']:.1f} ms ({s['layer'] or s['line']})"
            for s in spikes[:3]
        )
        lines.append(console.wrap(f"{len(spikes)} calls were spikes; the worst: {worst}"))
    if found.get("not_timed"):
        lines.append(console.wrap(f"{found['not_timed']} calls were in a CUDA graph, not timed"))
    return str(console.redact("\n".join(lines)))
