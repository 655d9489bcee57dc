# SPDX-License-Identifier: Apache-2.0
"""doctor.py - `wan-attn doctor`: looks, tries what is usable, says what to do; never dies."""

from __future__ import annotations

import argparse
import json

from wan_attn import console
from wan_attn.doctor import examine, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--no-selftest", action="store_true", help="look, but do not compute anything"
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="run the self-test in this process, for a debugger: a crash then ends the report too",
    )
    parser.epilog = (
        "Exit code: 0 fine; 1 a usable path computed something wrong or failed, a variable holds "
        "something impossible, or nothing is usable. Home directories are shown as ~, so that the "
        "report can be posted."
    )


def main(args: argparse.Namespace) -> int:
    """Print the report; 0 or 1."""
    found = console.redact(
        examine.examine(selftest=not args.no_selftest, isolated=not args.in_process)
    )
    console.emit(json.dumps(found, indent=2) if args.json else report.render(found))
    exit_code: int = found["exit_code"]
    return exit_code
