# SPDX-License-Identifier: Apache-2.0
"""test_ptx_rows.py - every attention kernel, run from the PTX that NVRTC makes of it.

Here what is compiled is executed, instruction by instruction, wrappers included; the semantics are
those of the PTX manual (tests/ptx/README.md). Each tile once, with the compiler that ships and with
few calls; `make ptx-matrix` runs all compilers, architectures and calls.
"""

from __future__ import annotations

import pytest

from emu.rows import Job, TileSm90
from ptx import collect, machine, matrix
from ptx.calls import Runner

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]


@pytest.mark.parametrize("job", matrix.attention_jobs(), ids=lambda job: f"{job.name}-{job.target}")
def test_calls_and_that_they_run_every_opcode(job: Job) -> None:
    runner = Runner(job, collect.nvrtcs()[0])
    for number, case in enumerate(matrix.short(runner.tile)):
        matrix.check(runner, case, number)
    if isinstance(runner.tile, TileSm90):
        matrix.check_outputs(runner)
    # On Hopper one store pins the order of the machine code and never happens (ptx/wgmma.cuh).
    pin = ["st.shared.f32"] if isinstance(runner.tile, TileSm90) else []
    assert matrix.never_run(runner) == pin
