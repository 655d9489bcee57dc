# SPDX-License-Identifier: Apache-2.0
"""bench_sparse.py - the options of `wan-attn bench sparse`: parses and checks;
wan_attn/bench/sparse.py measures."""

from __future__ import annotations

import argparse
import re

from wan_attn.bench import sparse, sparse_heads
from wan_attn.cli import bench_options
from wan_attn.cli.bench_options import BadOption

GRID = "8x32x32"


def add(parser: argparse.ArgumentParser) -> None:
    """Options of the action beside the common ones."""
    kinds = ",".join(kind.name for kind in sparse_heads.KINDS)
    parser.add_argument(
        "--grid",
        metavar="FxHxW",
        default=GRID,
        help=f"frames, rows and columns of tokens; default: {GRID}",
    )
    parser.add_argument("--heads", metavar="N", default="1", help="of each kind; default: 1")
    parser.add_argument("--kinds", metavar="NAMES", default=kinds, help=f"some of {kinds}")
    parser.add_argument("--taus", metavar="NUMBERS", help="with commas; default: 0,0.5,1,1.5,2")
    parser.add_argument("--budgets", metavar="SHARES", help="with commas; default: 0.02,0.05")


def options(args: argparse.Namespace) -> sparse.Options:
    """Checked.

    Raises:
        BadOption: names the option, the rule and what was given.
    """
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})x(\d{1,4})", args.grid)
    if match is None or "0" in match.groups():
        raise BadOption(f"--grid must be FRAMESxROWSxCOLUMNS, got {args.grid!r}")
    frames, rows, columns = (int(size) for size in match.groups())
    known = [kind.name for kind in sparse_heads.KINDS]
    kinds = bench_options.words([args.kinds])
    for word in kinds or [""]:
        if word not in known:
            raise BadOption(f"--kinds must name some of {', '.join(known)}; got {word!r}")
    return sparse.Options(
        device=bench_options.device(args),
        grid=(frames, rows, columns),
        dtypes=bench_options.dtypes(args, "bf16"),
        heads=bench_options.integer("--heads", args.heads, 1, 64),
        kinds=tuple(kinds),
        taus=_numbers("--taus", args.taus, sparse.TAUS, -10.0, 10.0),
        budgets=_numbers("--budgets", args.budgets, sparse.BUDGETS, 1e-6, 1.0),
        seconds=args.seconds,
        rounds=args.rounds,
        cpu_time=args.cpu_time,
    )


def _numbers(
    option: str, text: str | None, default: tuple[float, ...], least: float, most: float
) -> tuple[float, ...]:
    if text is None:
        return default
    found = []
    for word in bench_options.words([text]) or [""]:
        try:
            number = float(word)
        except ValueError:
            number = float("nan")
        if not least <= number <= most:
            raise BadOption(f"{option} must be numbers from {least:g} to {most:g}, got {word!r}")
        found.append(number)
    return tuple(found)
