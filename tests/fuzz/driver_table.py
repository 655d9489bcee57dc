# SPDX-License-Identifier: Apache-2.0
"""driver_table.py - the campaign of driver_faults.py as the table of docs/driver-faults.md: a line
for the driver's calls that behave alike, a column for each kind of error."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from readme_tables import COLUMNS, up_to_date

PAGE = Path(__file__).resolve().parents[2] / "docs/driver-faults.md"
STALE = "docs/driver-faults.md is not current; run: make fuzz ARGS='--only driver --write'"


class Fault(Protocol):
    """As much of driver_faults.Row as the table needs."""

    function: str
    code: int
    said: str
    is_fallback: bool


# title -> codes: every error that is tried is in one of them.
KINDS: dict[str, tuple[int, ...]] = {
    "out of memory": (2,),
    "the device is lost": (700, 702, 709, 719),
    "not for this device or driver": (1, 200, 209, 218, 222, 500, 701, 800, 801),
    "the driver itself": (3, 4, 100, 101, 201, 304, 400, 802, 803, 900, 999),
}


def _cell(rows: Sequence[Fault]) -> str:
    """What came of these faults, all of one call of the driver and one kind."""
    said = sorted({"falls back" if row.is_fallback else "raises" for row in rows if row.said})
    if not said:
        return "goes on"
    words = " or ".join(said)
    if len(said) == 1:
        return words
    few = min(said, key=lambda w: sum((w == "falls back") == row.is_fallback for row in rows))
    codes = sorted({row.code for row in rows if row.is_fallback == (few == "falls back")})
    other = next(w for w in said if w != few)
    return f"{other}; {few} for {', '.join(map(str, codes))}"


def _lines(rows: Sequence[Fault]) -> list[str]:
    found: dict[tuple[str, ...], list[str]] = {}
    for function in dict.fromkeys(row.function for row in rows):
        cells = tuple(
            _cell([row for row in rows if row.function == function and row.code in codes])
            for codes in KINDS.values()
        )
        found.setdefault(cells, []).append(f"`{function}`")
    return [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in found.items()]


def pages(rows: Sequence[Fault], codes: Mapping[int, str], final: Sequence[int]) -> tuple[str, str]:
    """The page as it is, and with the table of these rows. The short campaign has every line of it.

    codes: the names of the errors; final: those after which no start is tried.
    """
    assert {code for kind in KINDS.values() for code in kind} == set(codes)
    names = (f"{code} {name}{' (final)' * (code in final)}" for code, name in codes.items())
    kinds = (f"{title} ({', '.join(map(str, kind))})" for title, kind in KINDS.items())
    table = [
        f"| what fails | {' | '.join(kinds)} |",
        "|---|" + "---|" * len(KINDS),
        *_lines(rows),
        "",
        *textwrap.wrap(f"The errors, by cuda.h: {', '.join(names)}.", COLUMNS),
    ]
    old = PAGE.read_text(encoding="utf-8")
    return old, up_to_date(old, "driver faults", "\n".join(table))
