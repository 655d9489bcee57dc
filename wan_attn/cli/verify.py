# SPDX-License-Identifier: Apache-2.0
"""verify.py - `wan-attn verify`: whether the installed files are those that were built, and what
they were built from."""

from __future__ import annotations

import argparse

from wan_attn import console
from wan_attn.cli import FINE, USAGE, WRONG
from wan_attn.doctor import installed
from wan_attn.native import library
from wan_attn.version import REINSTALL, __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`verify` has no options of its own."""
    parser.epilog = (
        "Compares every file with RECORD, the list that pip has kept, and compiled files with the"
        " record of their build. Needs no torch. Exit code: 0 all are the same; 1 one is not, or"
        " our library does not load; 2 there is nothing to compare with."
    )


def main(args: argparse.Namespace) -> int:
    """Print what is installed and what is wrong with it; 0, 1 or 2."""
    found = installed.examine()
    problems = found.problems
    error = library.load_error()
    if error is not None and library.lib_path().exists():
        problems.append(error)
    console.emit(render(found, error))
    if problems:
        return WRONG
    return FINE if found.in_record or found.compiled else USAGE


def render(found: installed.Installed, load_error: str | None) -> str:
    """The report as text."""
    record = found.record
    installer = f"installed by {found.installer}" if found.installer else "no RECORD beside it"
    facts = [("package", f"{found.package} ({installer})")]
    facts.append(("platform", str(record.get("platform") or "unknown")))
    facts.append(("commit", str(record.get("commit") or "unknown")))
    built = "" if load_error else library.lib().wan_attn_build_info().decode()
    facts.append(("library", f"{library.lib_path().name}, {built}" if built else str(load_error)))
    facts.append(("CUDA kernels", f"{record.get('cubins', 0)} ready ones"))
    facts += [("left out", f"by the build: {text}") for text in record.get("left_out", ())]
    lines = [f"wan_attn {__version__}", console.pairs(facts), ""]
    if found.problems:
        lines += [console.wrap(problem, "  ! ", "    ") for problem in found.problems]
        lines += ["", console.wrap(REINSTALL)]
    elif found.in_record:
        lines.append(
            f"  All {found.in_record} files are those that were installed, and the"
            f" {found.compiled} compiled ones are those that the build has made."
        )
    elif found.compiled:
        lines.append(
            f"  The {found.compiled} compiled files are those that the build has made. An"
            " editable installation has no list of the others."
        )
    else:
        lines.append("  There is nothing to compare with: no RECORD and no record of a build.")
    return str(console.redact("\n".join(lines)))
