# SPDX-License-Identifier: Apache-2.0
"""test_ptx_knobs.py - settings of the machine that change something, or must break something.

Those that no result may depend on are in the matrix (matrix.py: SETTINGS); tests/emu/README.md
lists them all.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import oracle
from emu import cases
from emu.cases import Case
from emu.rows import Job
from ptx import collect, machine, maps, matrix
from ptx.bugs import job_of
from ptx.calls import Runner, with_knobs

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]

ROWS = [job for job in matrix.attention_jobs() if "128" in job.name or "256" in job.name]


# Scores of integers are sums that nothing cuts off.
FLOAT_SCORES = [job for job in ROWS if "qk8" not in job.name]


@pytest.mark.parametrize("job", FLOAT_SCORES, ids=lambda job: f"{job.name}-{job.target}")
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


@pytest.mark.parametrize(("registers", "is_fine"), [(168, True), (160, False)])
def test_a_kernel_of_fewer_registers_would_hang(registers: int, is_fine: bool) -> None:
    """setmaxnreg hands on what was launched. So test_cuda_static_sm90.py wants exactly what the
    launch bound allows: with fewer, consumers wait for registers that no warp gives back."""
    runner = with_knobs(Runner(job_of("alone"), collect.nvrtcs()[0]), registers=registers)
    operands = cases.operands(Case(17, 9), runner.tile)
    if is_fine:
        runner(runner.tile, *operands)
        return
    with pytest.raises(machine.PtxError, match="deadlock.*registers"):
        runner(runner.tile, *operands)


def test_subnormal_sums_may_be_lost() -> None:
    """The setting does what it says: only such results change, and all of them become zeros."""
    runner = Runner(job_of("slim"), collect.nvrtcs()[0])
    query, key, _ = cases.operands(Case(17, 70), runner.tile)
    value = torch.full_like(key, 1e-39)
    for flush_sums in (0, 1):
        out = with_knobs(runner, flush_sums=flush_sums)(runner.tile, query, key, value).out
        assert bool((out == 0).all()) == bool(flush_sums)


RIGHT = maps.Tiled(2, 0x1000, (128, 900, 3, 2), (768, 256, 691200), (64, 88, 1, 1))
BROKEN: dict[str, dict[str, Any]] = {
    "globalAddress": {"address": 0x1008},
    "globalDim": {"size": (128, 0, 3, 2)},
    "globalStrides multiples": {"strides": (776, 256, 691200)},
    "globalStrides below": {"strides": (0, 256, 691200)},
    "boxDim from": {"box": (64, 264, 1, 1)},
    "elementStrides from": {"element_strides": (1, 9, 1, 1)},
    "boxDim.0. in bytes a multiple": {"box": (60, 88, 1, 1)},
    "boxDim.0. in bytes at most": {"box": (128, 88, 1, 1)},
    "rank 4": {"size": (128, 900, 3)},
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_tensor_map_keeps_every_rule(rule: str) -> None:
    """cuTensorMapEncodeTiled, field by field."""
    assert RIGHT.broken() is None
    found = replace(RIGHT, **BROKEN[rule]).broken()
    assert found is not None and re.match(rule, found), found
