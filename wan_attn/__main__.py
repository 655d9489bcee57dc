# SPDX-License-Identifier: Apache-2.0
"""__main__.py - the command line: `python -m wan_attn COMMAND` and the console script `wan-attn`.

A command is a module with add_arguments(parser) and main(args) -> exit code, imported only when it
is asked for: `run` must not wait for `demo`'s imports, and `doctor` must work where those fail.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import wan_attn
from wan_attn.cli import EXIT_CODES, USAGE
from wan_attn.config import VARIABLES
from wan_attn.version import __version__

# command -> (module, one line for --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": (
        "wan_attn.cli.run",
        "run an unchanged Wan2.2 generate.py (or any script) through wan_attn",
    ),
    "doctor": (
        "wan_attn.cli.doctor",
        "what works on this machine, a self-test, and what to do next",
    ),
    "verify": (
        "wan_attn.cli.verify",
        "whether the installed files are those that were built, and from which commit",
    ),
    "why": ("wan_attn.cli.why", "what would compute one attention call, and why not the others"),
    "tune": ("wan_attn.cli.tune", "measure which attention is the fastest here, ahead of time"),
    "compile": ("wan_attn.cli.compile", "compile the CUDA kernels of a GPU before it needs them"),
    "prove": (
        "wan_attn.cli.prove",
        "try the CUDA kernels on this machine's cards, so that what is right there is used",
    ),
    "check": (
        "wan_attn.cli.check",
        "is every kernel right on this machine, and how fast; a report for an issue",
    ),
    "comfyui": ("wan_attn.cli.comfyui", "put the node into a ComfyUI, or take it out again"),
    "precision": (
        "wan_attn.cli.precision",
        "error and time of each layer of a run in 8 bits, or with blocks left out: table, picture",
    ),
    "demo": ("wan_attn.cli.demo", "denoise a short video with and without wan_attn and compare"),
    "bench": (
        "wan_attn.cli.bench",
        "measure kernels and denoising steps; tables and pictures to share",
    ),
}


def _parser(chosen: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    """The whole parser, and the chosen command's own; only the chosen command is imported."""
    parser = argparse.ArgumentParser(
        prog="wan-attn",
        description="Attention for the Wan2.2 video models.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"wan_attn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen_parser = None
    for name, (module, summary) in COMMANDS.items():
        # No abbreviations: with `run`, an abbreviated option could as well be the script's.
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            allow_abbrev=False,
        )
        if name == chosen:
            importlib.import_module(module).add_arguments(sub)
            chosen_parser = sub
            for action in sub._actions:  # "..." after SCRIPT may be nothing: not to be asked for
                action.required = action.required and action.nargs != argparse.REMAINDER
    return parser, chosen_parser


def _epilog() -> str:
    codes = "\n".join(f"  {code}  {meaning}" for code, meaning in EXIT_CODES.items())
    return (
        "`wan-attn COMMAND --help` tells more about a command.\n"
        f"exit codes (that of `run` is the script's):\n{codes}\n\n"
        "environment variables (README.md in the repository explains them):\n"
        f"{_variables(False)}\n\n"
        f"for tests and development (CONTRIBUTING.md says what they do):\n{_variables(True)}"
    )


def _variables(for_development: bool) -> str:
    """Names and values; the two pages that explain them are made from the same list."""
    width = max(len(variable.name) for variable in VARIABLES)
    return "\n".join(
        f"  {v.name:<{width}}  {' '.join(v.values)}"
        for v in VARIABLES
        if v.is_for_development == for_development
    )


def split_script(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[list[str], list[str]]:
    """(our arguments with SCRIPT as the last, everything after SCRIPT).

    argparse.REMAINDER would do this without its exceptions ("--", options that look like ours).
    Here the first word that is neither an option of `parser` nor an option's value is SCRIPT, and
    nothing behind it is looked at.
    """
    takes_value = {
        option: action.nargs is None
        for action in parser._actions
        for option in action.option_strings
    }
    i = 0
    while i < len(argv) and argv[i].startswith("-") and argv[i] != "-":
        if argv[i] == "--":
            return list(argv[: i + 2]), list(argv[i + 2 :])
        i += 2 if takes_value.get(argv[i], False) else 1
    return list(argv[: i + 1]), list(argv[i + 1 :])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code. Bad arguments end in SystemExit(2), as in argparse."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = words[0] if words and words[0] in COMMANDS else None
    if wan_attn._import_error is not None and chosen not in (None, "doctor", "verify"):
        reason = f"{wan_attn._import_error}; `wan-attn doctor` says more"
        _parser(None)[0].error(f"wan_attn cannot be used here: {reason}")
    parser, command = _parser(chosen)
    rest: list[str] | None = None
    if chosen == "run" and command is not None:
        ours, rest = split_script(command, words[1:])
        words = ["run", *ours]
    args, unknown = parser.parse_known_args(words)
    if unknown:  # argparse itself would show the usage of all commands
        (command or parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command is None:
        parser.print_help()
        return USAGE
    if rest is not None:
        args.script_args = rest
    exit_code: int = importlib.import_module(COMMANDS[args.command][0]).main(args)
    return exit_code


if __name__ == "__main__":
    raise SystemExit(main())
