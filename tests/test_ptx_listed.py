# SPDX-License-Identifier: Apache-2.0
"""test_ptx_listed.py - every kernel that takes lists of blocks, and the pass that makes means, run
from the PTX that NVRTC makes of them: as test_ptx_rows.py does it with those without lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from emu import cases_listed, run_listed
from emu.cases import Case
from emu.rows import CSRC, TileListed, tiles_listed
from emu.run import Schedule
from nightly import unless
from ptx import collect, machine, matrix
from ptx.calls import kernel
from ptx.machine import Knobs
from test_emu_listed import is_short

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]

ARCH = {"TURING": 75, "WIDE": 80, "SLIM": 86}  # the first of each class
Listed = tuple[Case, float, str, bool]


def program_of(tile: TileListed, csrc: Path = CSRC) -> machine.Program:
    arch = ARCH[tile.gpu_class]
    job = next(job for job in collect.shipped() if job.kernel == tile and job.arch == arch)
    return kernel(job, collect.nvrtcs()[0], csrc)


def runner_of(tile: TileListed, knobs: Knobs, csrc: Path = CSRC) -> Any:
    """As run_listed.run, on the machine."""

    def launcher(args: Any, grid: int, tensors: list[Any]) -> int:
        how = {"shared_bytes": tile.smem_bytes, "threads": tile.num_threads, "knobs": knobs}
        machine.launch(program_of(tile, csrc), args, grid, tensors, **how)
        return 0

    return partial(run_listed.run, launcher=launcher)


def short(tile: TileListed) -> Iterator[Listed]:
    """Ragged, causal, windows, grouped heads, lengths, f32 queries; lists that name nothing, all
    or some, in each form, the broken ones too; with means and without."""
    m = tile.block_m
    yield Case(m + 1, 197), 0.5, "plain", False
    yield Case(m + 5, 261, is_causal=True), 0.4, "garbage", True
    yield Case(m + 3, 256, 1, 2, 1, window=(100, 70)), 0.6, "shuffled", True
    yield (
        Case(20, 68, 2, 4, 2, layout="surrounded", q_lens=(20, 7), k_lens=(65, 3)),
        0.9,
        "counts",
        False,
    )
    lens: dict[str, Any] = {"q_lens": (0, 9, m), "k_lens": (5, 0, 130), "lens_dtype": "int32"}
    yield Case(m, 139, 3, **lens, is_causal=True), 0.5, "roomy", True
    yield Case(17, 129, scale=-0.3, layout="fused"), 1.1, "strided", False
    yield Case(m, 64, values="one hot", return_lse=False), 0.0, "plain", False
    yield Case(18, 135, heads_q=2, heads_k=2, q_is_f32=True), 0.0, "plain", True
    yield Case(9, 2200), 0.8, "plain", False
    yield Case(m, 190, values="rising", k_lens=(0,)), 0.5, "counts", True


def check(tile: TileListed, number: int, listed: Listed, csrc: Path = CSRC) -> None:
    """As matrix.check, which says why lse is not judged in some settings."""
    case, density, form, pools = listed
    knobs = replace(matrix.SETTINGS[number % len(matrix.SETTINGS)], seed=number)
    judged = case.return_lse and not knobs.sum_block and not knobs.ex2_error
    case = replace(case, schedule=Schedule(knobs.landing, number), return_lse=judged)
    runner = runner_of(tile, knobs, csrc)
    cases_listed.check(case, tile, density, form, pools, runner=runner)


def check_all(tile: TileListed, csrc: Path = CSRC) -> None:
    for number, listed in enumerate(short(tile)):
        check(tile, number, listed, csrc)


@pytest.mark.parametrize(
    "tile", unless(is_short, tiles_listed()), ids=lambda tile: tile.name.removeprefix("sdpa_")
)
def test_calls_and_that_they_run_every_opcode(tile: TileListed) -> None:
    check_all(tile)
    idle = [name for name, times in program_of(tile).counts().items() if not times]
    assert not idle
