# SPDX-License-Identifier: Apache-2.0
"""check.py - `wan-attn check`: is every kernel that this machine can run right, and how fast: one
file to attach to an issue, and one line to paste."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from wan_attn import config, console
from wan_attn.bench import progress
from wan_attn.check import report, run
from wan_attn.check.plan import STEPS
from wan_attn.check.results import Results, as_dict, line
from wan_attn.cli import FINE, USAGE, WRONG, bench_options, refuse
from wan_attn.cli.bench_options import BadOption
from wan_attn.doctor.facts import cuda_devices
from wan_attn.native import op

SECONDS = 420.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `check`."""
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help=f"no item begins after so long (default: {SECONDS:g})",
    )
    parser.add_argument(
        "--only", default="", metavar="STEPS", help=f"some of {', '.join(STEPS)}, with commas"
    )
    parser.add_argument(
        "--rows", default="", metavar="NAMES", help="only these rows of the kernel table"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the report goes (default: this folder, under the name of the device)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.epilog = (
        "Kernels run in other processes: one that hangs or crashes costs its own item. The report"
        " is written after every item. It names no user, no machine and no folder. Exit code: 0"
        " everything that ran is right; 1 something is wrong; 2 nothing was checked."
    )


def main(args: argparse.Namespace) -> int:
    """Check, print and write; 0, 1 or 2."""
    try:
        config.refresh()
        scope, no_gpu = _scope(args)
        _check_out(args.out)
    except (BadOption, config.ConfigError) as error:
        return refuse("check", error)
    watcher = _Watcher(args.out)
    try:
        results = run.Run(scope, watcher, no_gpu).all()
    except OSError as error:
        return refuse("check", error, WRONG)
    finally:
        watcher.close()
    if not results.plan:
        return _nothing(results)
    if args.json:
        console.emit(json.dumps(as_dict(results), indent=1, allow_nan=False))
    else:
        console.emit(report.as_text(results))
        console.emit(f"\nTo attach to an issue: {watcher.path}\nTo paste:\n{line(results)}")
    return FINE if results.is_fine else WRONG if results.is_wrong else USAGE


def _nothing(results: Results) -> int:
    if results.trouble:
        return refuse("check", results.trouble, WRONG)
    if not results.facts:
        return refuse("check", "the time was over before a worker began")
    if not results.facts["kernels"]:
        return refuse("check", f"this build has no kernel for {results.device}")
    return refuse("check", f"nothing of --only can be checked on {results.device}")


def _scope(args: argparse.Namespace) -> tuple[run.Scope, str]:
    """What is asked for, and why no GPU is checked."""
    if op.binding() == "torch":
        raise BadOption(f"the native library is not used: {op.binding_reason()}")
    if not args.seconds > 0:
        raise BadOption(f"--seconds must be above 0, got {args.seconds:g}")
    no_gpu = _why_no_gpu()
    device = bench_options.named_device("cpu" if no_gpu and not args.device else args.device)
    if device.type == "cuda" and no_gpu:
        raise BadOption(f"--device must be cpu here, got {args.device!r}: {no_gpu}")
    if device.type == "cpu" and not no_gpu:
        no_gpu = "--device cpu was given"
    _check_names("--only", args.only, list(STEPS))
    rows = [row.name for row in op.kernels() if row.device == device.type]
    _check_names("--rows", args.rows, rows)
    only, names = (",".join(bench_options.words([text])) for text in (args.only, args.rows))
    return run.Scope(device, args.seconds, only, names), no_gpu if device.type == "cpu" else ""


def _why_no_gpu() -> str:
    """Why there is no GPU that our kernels are made for; "": there is one."""
    if torch.version.hip is not None:
        return "this torch is made for AMD GPUs, and our CUDA kernels are not"
    return "" if torch.cuda.is_available() else cuda_devices()[1]


def _check_names(option: str, text: str, known: list[str]) -> None:
    for word in bench_options.words([text]):
        if word not in known:
            raise BadOption(f"{option} must name some of {', '.join(known)}; got {word!r}")


def _check_out(path: Path | None) -> None:
    folder = Path() if path is None else path.parent
    if (path is not None and path.is_dir()) or not os.access(folder, os.W_OK):
        where = "the current folder, without --out" if path is None else f"{str(path)!r}"
        raise BadOption(f"--out must be a file that can be written, got {where}")


class _Watcher:
    """Shows how far it is, and writes the report after every item."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.bar: progress.Progress | None = None
        self.said: set[int] = set()

    def __call__(self, results: Results, begins: dict[str, Any] | None) -> None:
        if not results.plan:
            return
        if self.bar is None:
            self.bar = progress.make(len(results.plan))
        if begins is not None:
            self.bar.step(report.title_of(begins))
            return
        for number, end in results.ended.items():
            if end["problem"] and number not in self.said:
                self.said.add(number)
                self.bar.say(f"WRONG: {report.title_of(results.plan[number])}: {end['problem']}")
        self.path = self.path or report.default_path(results)
        report.save(self.path, results)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
