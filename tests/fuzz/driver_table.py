# SPDX-License-Identifier: Apache-2.0
"""driver_table.py - the campaign of driver_faults.py as a page: a line for the driver's calls that
behave alike, a column for each kind of error."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "make fuzz ARGS='--only driver --table docs/driver-faults.md'"


class Fault(Protocol):
    """As much of driver_faults.Row as the page needs."""

    function: str
    after: int
    code: int
    said: str
    is_fallback: bool
    attempts: int
    is_well_again: bool
    problems: list[str]


# title -> codes: every error that is tried is in one of them.
KINDS: dict[str, tuple[int, ...]] = {
    "out of memory": (2,),
    "the device is lost": (700, 702, 709, 719),
    "not for this device or driver": (1, 200, 209, 218, 222, 500, 701, 800, 801),
    "the driver itself": (3, 4, 100, 101, 201, 304, 400, 802, 803, 900, 999),
}

_HEAD = """# When the CUDA driver fails

Every call that we make to the CUDA driver fails here in turn, the first time or later in a call of
ours, with each of {codes} errors, on the mock driver (`tests/cuda_mock`).
{rows} faults at {commit}, {date}: **{wrong} wrong**. The table is made by

    {command}

| what fails | {kinds} |
|---|{rules}|
"""

_FOOT = """
- *Falls back*: the next backend computes, and one line in the log has the driver's words.
- *Raises*: a RuntimeError with the driver's words (torch's OutOfMemoryError for want of memory);
  nothing else computes on a device that is lost, or hides why.
- *Goes on*: the call is computed. What was pushed is popped; a failure there changes nothing.

| in every fault | |
|---|---|
| message | the driver's error, in its words, and what was being done ("when launching ...") |
| result | right or none; right again once the driver is well{except_} |
| leak | none: what was loaded is unloaded, and no context stays on the stack |
| tried again | {retries} |
"""

_RETRIES = (
    "what raises: by every call. What falls back: not for this kind of call, and a kernel that"
    " failed its self-check is not loaded again. Out of memory: once more in the same call, after"
    " torch has released its cache. `cuInit`: ever more rarely; after {final} never"
)


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


def page(rows: Sequence[Fault], codes: Mapping[int, str], final: Sequence[int]) -> str:
    """The page. `codes`: names of the errors; `final`: those after which no start is tried."""
    assert {code for kind in KINDS.values() for code in kind} == set(codes)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    stays_out = {row.function for row in rows if not row.is_well_again}
    head = _HEAD.format(
        codes=len(codes),
        rows=f"{len(rows):,}",
        commit=commit,
        date=datetime.date.today().isoformat(),  # noqa: DTZ011 - a day is all it says
        wrong=sum(len(row.problems) for row in rows),
        command=COMMAND,
        kinds=" | ".join(
            f"{title} ({', '.join(map(str, codes))})" for title, codes in KINDS.items()
        ),
        rules="|".join("---" for _ in KINDS),
    )
    foot = _FOOT.format(
        except_=f" (except for `{'`, `'.join(sorted(stays_out))}`, as said below)"
        if stays_out
        else "",
        retries=_RETRIES.format(final=", ".join(map(str, final))),
    )
    names = ", ".join(f"{code} {name}" for code, name in codes.items())
    return head + "\n".join(_lines(rows)) + "\n" + foot + f"\nThe errors, by cuda.h: {names}.\n"
