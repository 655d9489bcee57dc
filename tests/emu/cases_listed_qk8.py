# SPDX-License-Identifier: Apache-2.0
"""cases_listed_qk8.py - the calls of cases_listed.py for kernels with 8-bit scores, judged as in
cases_qk8.py: by the definition's integers over the listed keys.

Values of blocks that no list names are NaN; half of the time so are their keys, which then count as
zeros in K's mean. Else they are in that mean as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blocks_oracle import BLOCK, Lists, blocks_of
from emu import cases, cases_listed
from emu.cases import Case
from emu.cases_listed import as_tensors, hide_others, lists_of
from emu.cases_qk8 import check_result
from emu.rows import TileListedQk8
from emu.run import Result
from emu.run_qk8 import packed, run

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
    return ((case, density, form) for case, density, form, _ in cases_listed.by_hand(tile))


def by_chance(tile: TileListedQk8, count: int, seed: int = 0) -> Iterator[Listed]:
    found = cases_listed.by_chance(tile, count, seed)
    return ((case, density, form) for case, density, form, _ in found)


def far_apart(
    tile: TileListedQk8, chosen: tuple[int, ...], seqlen_k: int, **how: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], Result]:
    """A call that lists `chosen` of many blocks, in all others NaN; and a short one's operands, of
    the same keys without what lies between them."""
    last, rows = (seqlen_k - 1) // BLOCK, tile.block_m
    listed = [n for b in chosen for n in range(b * BLOCK, min((b + 1) * BLOCK, seqlen_k))]
    query, key, value = cases.operands(Case(rows, len(listed), values="peaky"), tile)
    values = torch.full((1, seqlen_k, 1, tile.head_dim), math.nan, dtype=value.dtype)
    values[:, listed] = value
    made = packed(query, key)
    keys = torch.full((1, 1, last + 1, made.keys.shape[3]), -1, dtype=torch.int8)
    keys[:, :, list(chosen)] = made.keys
    named = np.zeros((1, 1, blocks_of(rows), last + 1), dtype=bool)
    named[..., list(chosen)] = True
    counts, indices = as_tensors(Lists(named), "plain")
    how |= {"counts": counts, "indices": indices}
    integers = replace(made, keys=keys)
    got = run(tile, query, values, values, integers=lambda *_, **__: integers, **how)
    return (query, key, value), got
