# SPDX-License-Identifier: Apache-2.0
"""test_ptx_listed_qk8.py - the kernels of 8-bit scores that take lists of blocks, run from the PTX
that NVRTC makes of them: the calls of test_ptx_listed.py, without means.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from emu import cases_listed_qk8, run_qk8
from emu.rows import TileListedQk8, tiles_listed_qk8
from emu.run import Schedule
from nightly import unless
from ptx import collect, machine, matrix
from test_emu_listed_qk8 import is_short
from test_ptx_listed import program_of, short

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]


@pytest.mark.parametrize(
    "tile", unless(is_short, tiles_listed_qk8()), ids=lambda tile: tile.name.removeprefix("sdpa_")
)
def test_calls_and_that_they_run_every_opcode(tile: TileListedQk8) -> None:
    for number, (case, density, form, _) in enumerate(short(tile)):
        knobs = replace(matrix.SETTINGS[number % len(matrix.SETTINGS)], seed=number)
        judged = case.return_lse and not knobs.sum_block and not knobs.ex2_error
        case = replace(case, schedule=Schedule(knobs.landing, number), return_lse=judged)

        def launcher(args: Any, grid: int, tensors: list[Any], knobs: Any = knobs) -> int:
            how = {"shared_bytes": tile.smem_bytes, "threads": tile.num_threads, "knobs": knobs}
            machine.launch(program_of(tile), args, grid, tensors, **how)
            return 0

        runner = partial(run_qk8.run, launcher=launcher)
        cases_listed_qk8.check(case, tile, density, form, runner=runner)
    idle = [name for name, times in program_of(tile).counts().items() if not times]
    assert not idle
