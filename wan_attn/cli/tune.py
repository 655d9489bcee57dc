# SPDX-License-Identifier: Apache-2.0
"""tune.py - `wan-attn tune`: measures which candidate is the fastest for Wan's calls on this
machine, ahead of time, and shows what is known."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from wan_attn import config, console
from wan_attn.bench import progress
from wan_attn.cli import FINE, WRONG, bench_options, refuse
from wan_attn.cli.bench_options import BadOption
from wan_attn.log import dtype_name
from wan_attn.selection import ahead
from wan_attn.selection.ahead import Outcome
from wan_attn.tuning import words
from wan_attn.tuning.candidates import title
from wan_attn.workloads import WORKLOADS, Workload, parse_shape

# The calls that decide how long a video takes; --all measures every named one.
DEFAULT = (
    *("ti2v-5b-720p", "ti2v-5b-720p-cross", "a14b-480p", "a14b-480p-cross"),
    *("a14b-720p", "a14b-720p-cross"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tune`."""
    parser.add_argument(
        "--shape",
        action="append",
        metavar="SHAPE",
        help="BxLxHxD (1x27280x24x128), BxLq:LkxHxD, MODEL:WxHxFRAMES, or a name: "
        f"{', '.join(WORKLOADS)}; several with commas. Default: the calls of Wan2.2's transformers",
    )
    parser.add_argument("--all", action="store_true", help="every named call")
    parser.add_argument(
        "--again", action="store_true", help="measure also what was measured before"
    )
    parser.add_argument(
        "--dtype", default="bf16", metavar="DTYPES", help="bf16, fp16, fp32; several with commas"
    )
    parser.add_argument(
        "--grad", action="store_true", help="the calls of training: forward and its gradients"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    # What bench_options.device() reads beside --device.
    parser.set_defaults(seconds=1.0, rounds=None, threads=None, cpu_time=False)
    parser.epilog = (
        "Exit code: 0 the fastest is known for at least one call; 1 for none; 2 bad arguments. "
        "What was measured is kept in the cache folder, and every later process obeys it."
    )


def main(args: argparse.Namespace) -> int:
    """Measure and print; 0, 1 or 2."""
    try:
        settings = config.refresh()
        device = bench_options.device(args)
        dtypes = bench_options.dtypes(args, "bf16")
        calls = _calls(args)
    except (BadOption, config.ConfigError) as error:
        return refuse("tune", error)
    if settings.tune == "off":
        return refuse("tune", "WAN_ATTN_TUNE=off: nothing would obey what was measured")
    todo = [
        way for dtype in dtypes for way in ahead.ways(calls, dtype, device, settings, args.grad)
    ]
    bar = progress.make(len(todo))
    outcomes = []
    try:
        for call, way, request in todo:
            bar.step(f"{call.name} {dtype_name(request.dtype)}, {way}")
            outcomes.append(ahead.tune(call, way, request, settings, args.again))
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        return refuse("tune", f"the device failed: {text}", WRONG)
    finally:
        bar.close()
    console.emit(json.dumps(_plain(outcomes), indent=1) if args.json else _text(outcomes))
    return FINE if any(outcome.chosen for outcome in outcomes) else WRONG


def _calls(args: argparse.Namespace) -> list[Workload]:
    if args.all:
        return list(WORKLOADS.values())
    found = []
    for text in bench_options.words(args.shape or list(DEFAULT)):
        try:
            call = parse_shape(text)
        except ValueError as error:
            raise BadOption(f"--{error}") from error
        if 0 in (call.seqlen_q, call.seqlen_k):
            raise BadOption(f"--shape must have lengths of at least 1, got {text!r}")
        found.append(call)
    return found


def _plain(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "schema": 1,
        "calls": [
            {
                "name": one.call.name,
                "shape": one.call.shape,
                "dtype": dtype_name(one.request.dtype),
                "way": one.way,
                "chosen": one.chosen.name if one.chosen else None,
                "times_ms": one.entry.times if one.entry else {},
                "left_out": one.entry.left_out if one.entry else {},
                "slice": one.entry.slice if one.entry else "",
                "date": one.entry.date if one.entry else "",
                "is_new": one.is_new,
                "why_not": one.why_not,
            }
            for one in outcomes
        ],
    }


def _text(outcomes: Sequence[Outcome]) -> str:
    """The table, and under it what was left out and why."""
    rows, left_out = [], {}
    for one in outcomes:
        told = one.why_not
        if one.entry is not None:
            told = f"{words.figures(one.entry)}; {one.entry.slice}; {words.age(one.entry)}"
            left_out.update({title(name): why for name, why in one.entry.left_out.items()})
        chosen = one.chosen.title if one.chosen else "not measured"
        rows.append((one.call.name, dtype_name(one.request.dtype), one.way, chosen, told))
    text = console.heading("fastest here", "milliseconds of a part of each call")
    text += "\n" + console.table(rows, ("call", "dtype", "made", "chosen", "measured"))
    if left_out:
        text += f"\n{console.heading('left out')}\n{console.pairs(left_out.items())}"
    return text.lstrip("\n")
