# SPDX-License-Identifier: Apache-2.0
"""cases_sm90.py - the calls of cases.py as far as Hopper kernels take them, and a few more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from emu import cases
from emu.cases import Case
from emu.rows import CSRC
from emu.rows_sm90 import TileSm90
from emu.run import Schedule
from emu.run_sm90 import run_sm90


def _taken(case: Case) -> Case:
    """Without what these rows refuse: f32 queries, parts, strides of 0."""
    layout = "contiguous" if case.layout == "one sample" else case.layout
    return replace(case, q_is_f32=False, split_tiles=0, layout=layout)


def by_hand(tile: TileSm90) -> Iterator[Case]:
    """Also: rings that go round, an odd number of blocks in clusters, blocks without rows beside
    one with rows."""
    m, n = tile.block_m, tile.block_n
    seen = set()
    for case in map(_taken, cases.by_hand(tile)):  # type: ignore[arg-type]
        if repr(case) not in seen:
            seen.add(repr(case))
            yield case
    for tiles in range(1, 2 * tile.stages + 2):
        yield Case(m // 2 + 5, tiles * n - 3)
    yield Case(2 * m + 1, 2 * n + 1, 1, 2, 1, is_causal=True)
    yield Case(3 * m, n, is_causal=True)
    yield Case(m + 1, 3 * n, 2, q_lens=(m, 1), k_lens=(2 * n + 1, 3 * n))
    yield Case(2 * m, 4 * n, window=(0, 0))
    yield Case(2 * m, 4 * n, 2, q_lens=(m + 3, m - 9), k_lens=(4 * n - 1, n), window=(9, 30))
    yield Case(m + 8, 5 * n, 1, 2, 2, is_causal=True, layout="fused")


def by_chance(tile: TileSm90, count: int, seed: int = 0) -> Iterator[Case]:
    return map(_taken, cases.by_chance(tile, count, seed))  # type: ignore[arg-type]


def check(case: Case, tile: TileSm90, schedule: Schedule | None = None, csrc: Path = CSRC) -> None:
    case = replace(case, schedule=schedule or case.schedule)
    cases.check(case, tile, runner=run_sm90, csrc=csrc)  # type: ignore[arg-type]
