# SPDX-License-Identifier: Apache-2.0
"""console.py - plain text that lines up: headings, lists, tables; and hiding of home paths."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WIDTH = 100
INDENT = "  "

# Where operating systems keep people's names in paths. The separator after the name stays.
_USER_PATHS = re.compile(
    r"(?:[A-Za-z]:)?[\\/]+(?:home|Users|Documents and Settings)[\\/]+"
    r"[^\\/\s'\":;,]+(?=$|[\\/\s'\":;,])"
)


def heading(title: str, note: str = "") -> str:
    """One section's first line, with a blank line before it."""
    return "\n" + (f"{title}  ({note})" if note else title)


def wrap(text: str, first: str = INDENT, rest: str | None = None) -> str:
    """Text within WIDTH columns; long words (paths, commands) are never cut."""
    lines: list[str] = []
    for part in text.splitlines() or [""]:
        lines += textwrap.wrap(
            part,
            WIDTH,
            initial_indent=first if not lines else (rest if rest is not None else first),
            subsequent_indent=rest if rest is not None else first,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """`name  value` lines, values aligned and wrapped."""
    rows = list(items)
    width = max((len(name) for name, _ in rows), default=0)
    hang = INDENT + " " * (width + 2)
    return "\n".join(wrap(value, f"{INDENT}{name:<{width}}  ", hang) for name, value in rows)


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Aligned columns; the last one is wrapped under itself."""
    body = [tuple(row) for row in rows]
    every = [tuple(head), *body] if head else body
    if not every:
        return ""
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]) - 1)]
    lines = []
    for row in every:
        start = INDENT + "".join(f"{cell:<{w}}  " for cell, w in zip(row, widths, strict=False))
        lines.append(wrap(row[-1], start, " " * len(start)).rstrip() or start.rstrip())
    return "\n".join(lines)


def without_name(reason: str | None, name: str) -> str | None:
    """A kernel row's refusal without the row's name, where a column has it already."""
    return None if reason is None else reason.removeprefix(f"{name}: ")


def redact(value: Any, home: str | None = None) -> Any:
    """The same value with every home directory written as ~, in all strings inside; keys too."""
    if isinstance(value, str):
        own = str(Path.home()) if home is None else home
        if len(own) > 1:  # a home of "/" (containers without a user) holds no name
            value = re.sub(re.escape(own) + r"(?![\w.-])", "~", value)
        return _USER_PATHS.sub("~", value)
    if isinstance(value, dict):
        return {redact(k, home): redact(v, home) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(v, home) for v in value]
    return value


def emit(text: str) -> None:
    """Print, also where the terminal lacks a character, and in front of a reader such as `head`."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        print(text.encode("ascii", "backslashreplace").decode("ascii"), flush=True)
    except BrokenPipeError:  # the reader has seen enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
