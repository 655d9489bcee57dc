# SPDX-License-Identifier: Apache-2.0
"""cases_listed_qk8.py - the calls of cases_listed.py for kernels with 8-bit scores, judged as in
cases_qk8.py: by the definition's integers over the listed keys.

Values of blocks that no list names are NaN; half of the time so are their keys, which then count as
zeros in K's mean. Else they are in that mean as numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from emu import cases, cases_listed
from emu.cases import Case
from emu.cases_listed import as_tensors, hide_others, lists_of
from emu.cases_qk8 import check_result
from emu.rows import TileListedQk8
from emu.run import Result
from emu.run_qk8 import run

Listed = tuple[Case, float, str]


def check(
    case: Case,
    tile: TileListedQk8,
    density: float,
    form: str = "plain",
    runner: Callable[..., Result] = run,
    **how: Any,
) -> None:
    """Runs the case and holds it against the definition; an exception names it."""
    query, key, value = cases.operands(case, tile)
    lists = lists_of(case, density)
    if case.layout != "one sample":
        hide_others(lists, key if case.seqlen_k % 2 else key.clone(), value)
    counts, indices = as_tensors(lists, form)
    options = {**case.call(), "schedule": case.schedule, "return_lse": case.return_lse, **how}
    try:
        result = runner(tile, query, key, value, counts=counts, indices=indices, **options)
        check_result(tile, result, query, key, value, lists, **case.call())
        assert result.bank_conflicts == 0, f"{result.bank_conflicts} bank conflicts"
    except AssertionError as error:
        raise AssertionError(f"{tile.name} {case} {density} {form}: {error}") from error


def by_hand(tile: TileListedQk8) -> Iterator[Listed]:
    return ((case, *lists[:2]) for case, *lists in cases_listed.by_hand(tile))


def by_chance(tile: TileListedQk8, count: int, seed: int = 0) -> Iterator[Listed]:
    return ((case, *lists[:2]) for case, *lists in cases_listed.by_chance(tile, count, seed))
