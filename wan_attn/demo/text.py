# SPDX-License-Identifier: Apache-2.0
"""text.py - the findings in words: the lines that the terminal shows, and report.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

from wan_attn.demo.compare import FACTOR, Comparison, Difference
from wan_attn.demo.options import Options
from wan_attn.demo.report import Findings, machine

SAME = "the same video, up to rounding"
DIFFERENT = "NOT the same video: rounding does not explain the difference"
ADVICE = "run `wan-attn doctor`, and please report this with report.json"


def opening(options: Options) -> str:
    """Says what is about to run."""
    size = options.size
    return (
        f"wan_attn demo: diffusers' WanPipeline, {options.title}, seed {options.seed}\n"
        f"  {size.frames} frames of {size.width}x{size.height}, {size.steps} steps, "
        f"{options.dtype_name} on {options.device}\n"
        f'  "{options.prompt}"\n'
    )


def closing(found: Findings) -> str:
    """The result, in a few lines."""
    probe = found.probe
    names = (found.video.name, found.picture.name, "report.md", "report.json")
    rows = [
        (
            "speed",
            f"{found.speed_ratio:.2f}x of stock: a step takes "
            f"{duration(found.ours.median_step_seconds)}, "
            f"stock {duration(found.stock.median_step_seconds)}",
        ),
        (
            "",
            f"attention alone ({probe.shape}): {duration(probe.our_seconds)}, "
            f"stock {duration(probe.stock_seconds)}",
        ),
        (
            "exactness",
            f"error of that call against float64: {probe.our_error:.1e}, "
            f"stock {probe.stock_error:.1e}",
        ),
        *(
            (
                "difference" if i == 0 else "",
                f"{row.name}: {_max_rms(row.ours)}; rounding alone: {_max_rms(row.rounding)}",
            )
            for i, row in enumerate(found.comparisons)
        ),
        ("files", f"{found.options.output}: {', '.join(names)}"),
    ]
    lines = [f"\nResult: {SAME if found.is_same else DIFFERENT}."]
    lines += [f"  too far: {line}" for line in too_far(found)]
    lines += [f"  note: {line}" for line in found.warnings]
    if not found.is_same:
        lines.append(f"  What to do: {ADVICE}.")
    lines += [f"  {name:<11} {text}" for name, text in rows]
    return "\n".join(lines)


def too_far(found: Findings) -> list[str]:
    """Says what broke its bound."""
    probe, lines = found.probe, []
    if not probe.is_ok:
        lines.append(
            f"one attention call: error {probe.our_error:.1e}, allowed {probe.allowed_error:.1e}"
        )
    return lines + [_excess(row) for row in found.comparisons if not row.is_ok]


def _excess(row: Comparison) -> str:
    if not math.isfinite(row.ours.max):
        return f"{row.name}: NaN or infinity"
    return f"{row.name}: {_max_rms(row.ours)}, allowed {_max_rms(row.allowed)}"


def markdown(found: Findings) -> str:
    """The content of report.md."""
    probe = found.probe
    sections = [
        f"# wan_attn demo: {SAME if found.is_same else DIFFERENT}",
        "\n".join(
            [f"- too far: {line}" for line in too_far(found)]
            + [f"- note: {line}" for line in found.warnings]
        ),
        _what_ran(found),
        "## Speed",
        _speeds(found),
        "The first step of a run, which also warms up, is left out. Above 1x wan_attn is faster.",
        "## Difference",
        _differences(found),
        "Largest value and root mean square (RMS). *Rounding alone* is stock diffusers against"
        " itself on torch's unfused attention: the same mathematics, rounded in another order."
        f" wan_attn may differ by {FACTOR:g} times that, plus about one rounding of a latent.",
        f"One attention call against float64: largest error {probe.our_error:.2e}, torch's"
        f" {probe.stock_error:.2e}, allowed {probe.allowed_error:.2e}.",
        "## Attention calls",
        _calls(found),
        f"![stock, wan_attn and their difference]({found.picture.name})",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _what_ran(found: Findings) -> str:
    options, size = found.options, found.options.size
    facts = machine(options.device)
    named = ("wan_attn", "torch", "diffusers", "transformers")
    rows = [
        ("Pipeline", f"diffusers' WanPipeline, {options.title}, seed {options.seed}"),
        ("Prompt", options.prompt),
        (
            "Video",
            f"{size.frames} frames of {size.width}x{size.height}, {size.steps} steps, "
            f"{found.tokens} tokens",
        ),
        ("Runs in", f"{options.dtype_name} on {facts['gpu'] or facts['cpu']}"),
        ("Attention by", f"{found.recorder.titles}, in {found.layers} layers"),
        ("System", f"{facts['system']}, {facts['threads']} threads, Python {facts['python']}"),
        ("Versions", ", ".join(f"{name} {facts[name]}" for name in named)),
    ]
    return _table(("What", "Value"), rows)


def _speeds(found: Findings) -> str:
    step = (found.stock.median_step_seconds, found.ours.median_step_seconds)
    call = (found.probe.stock_seconds, found.probe.our_seconds)
    rows = [
        (name, duration(stock), duration(ours), f"{stock / ours:.2f}x")
        for name, (stock, ours) in (
            ("one step, median", step),
            (f"one attention call, {found.probe.shape}", call),
        )
    ]
    return _table(("", "stock", "wan_attn", "speed"), rows)


def _differences(found: Findings) -> str:
    rows = [
        (
            row.name,
            *_cells(row.ours),
            *_cells(row.rounding),
            *_cells(row.allowed),
            "ok" if row.is_ok else "**too far**",
        )
        for row in found.comparisons
    ]
    pairs = ("wan_attn: max", "RMS", "rounding alone: max", "RMS", "allowed: max", "RMS")
    return _table(("", *pairs, ""), rows)


def _calls(found: Findings) -> str:
    rows = [
        (str(shape), str(count), found.recorder.chosen[shape].title)
        for shape, count in found.recorder.calls.items()
    ]
    return _table(("batch x length(:keys) x heads x head_dim", "calls", "computed by"), rows)


def _cells(difference: Difference) -> tuple[str, str]:
    return f"{difference.max:.2e}", f"{difference.rms:.2e}"


def _max_rms(difference: Difference) -> str:
    return f"max {difference.max:.1e}, RMS {difference.rms:.1e}"


def duration(seconds: float) -> str:
    """Writes three digits, in a unit that people read."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Makes a Markdown table; a bar in a cell would end the cell."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)
