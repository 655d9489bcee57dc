# SPDX-License-Identifier: Apache-2.0
"""precision.py - `wan-attn precision`: shows a precision report, as a table and as a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from wan_attn import console
from wan_attn.bench import precision as picture
from wan_attn.bench.plots import NoPicture
from wan_attn.cli import FINE, WRONG, refuse
from wan_attn.precision import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `precision`."""
    parser.add_argument(
        "file", metavar="FILE", help="what WAN_ATTN_PRECISION_REPORT=FILE has written"
    )
    parser.add_argument(
        "--picture", metavar="PATH", help="draw it, too: an .svg or .png file (needs matplotlib)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit code 1 if an error was above the budget or a guard was hit",
    )
    parser.set_defaults(refuse=parser.error)
    parser.epilog = "Exit code: 0 shown; 1 no picture, or what --check asks for; 2 bad arguments."


def main(args: argparse.Namespace) -> int:
    """Show it; 0, 1 or 2."""
    path = None if args.picture is None else Path(args.picture)
    if path is not None and path.suffix not in (".svg", ".png"):
        args.refuse(f"argument --picture: must end in .svg or .png, got {args.picture!r}")
    try:
        found = _read(Path(args.file))
    except ValueError as error:
        return refuse("precision", error)
    console.emit(report.text(found))
    code = WRONG if args.check and _is_bad(found) else FINE
    if path is not None:
        try:
            console.emit(f"written: {picture.draw(found, path)}")
        except (NoPicture, OSError) as error:
            return refuse("precision", error, WRONG)
    return code


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("kind") != "precision":
        raise ValueError(f"{path} is no precision report")
    if found.get("format") != report.FORMAT:
        raise ValueError(f"{path} is of another version of wan_attn ({found.get('wan_attn')})")
    return found


def _is_bad(found: dict[str, Any]) -> bool:
    budget = found["budget"]
    # Not "above": NaN is none of both, and bad.
    return any(x["events"] or not (x["largest_error"] or 0.0) <= budget for x in found["layers"])
