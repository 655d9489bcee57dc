# SPDX-License-Identifier: Apache-2.0
"""test_ptx_knobs.py - what liberties of the hardware may cost: lse, which the matrix does not judge
where they are taken.
"""

from __future__ import annotations

import math

import pytest
import torch

import oracle
from emu import cases
from emu.cases import Case
from emu.rows import Job
from ptx import collect, machine, matrix
from ptx.calls import Runner, with_knobs

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]

ROWS = [job for job in matrix.attention_jobs() if "128" in job.name or "256" in job.name]


@pytest.mark.parametrize("job", ROWS, ids=lambda job: f"{job.name}-{job.target}")
def test_lse_of_sums_that_are_cut_off(job: Job) -> None:
    """A step of B products loses at most B + 1 cuts at 2^-bits of its largest term, and its sum one
    at 2^-23: together, over head_dim / B steps, a bound of each score and so of lse."""
    block, bits = 8, 24
    runner = with_knobs(Runner(job, collect.nvrtcs()[0]), sum_block=block, sum_bits=bits)
    tile = runner.tile
    query, key, value = cases.operands(Case(17, tile.block_n + 9), tile)
    got = runner(tile, query, key, value)
    want = oracle.attention(query, key, value)
    most = (query.double().abs().amax(1) * key.double().abs().amax(1)).sum(-1).max().item()
    scale = tile.head_dim**-0.5
    steps = tile.head_dim / block
    bound = steps * ((block + 1) * 2.0**-bits + 2.0**-23) * most * scale + 1e-5
    assert (
        got.lse is not None and (got.lse.double() - torch.from_numpy(want[1])).abs().max() <= bound
    )
    assert math.isfinite(bound) and bound < 1e-2


@pytest.mark.parametrize("job", ROWS[::3], ids=lambda job: f"{job.name}-{job.target}")
def test_lse_where_ex2_errs(job: Job) -> None:
    """By 2 units in the last place, 2^-22 at most: so far may each weight be off, and the factor of
    each tile where the maximum grew. Their sum and its logarithm then are off by as much."""
    found = []
    for error in (0, 2):
        runner = with_knobs(Runner(job, collect.nvrtcs()[0]), ex2_error=error)
        operands = cases.operands(Case(17, 2 * runner.tile.block_n + 9), runner.tile)
        found.append(runner(runner.tile, *operands).lse)
    right, off = found
    assert right is not None and off is not None
    tiles, rounding = 3, 2.0**-22  # of lse, which is below 8
    assert (right - off).abs().max() <= (1 + tiles) * 2.0**-22 + rounding
