# SPDX-License-Identifier: Apache-2.0
"""test_ptx_first_call.py - the check before a kernel's first call (wan_attn/selfcheck), with
the kernel run from its PTX: right ones pass, and faults that results alone have to show do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emu.rows import CSRC, Job
from ptx import collect, machine
from ptx.bug_list import Bug
from ptx.calls import Runner
from wan_attn.cuda.rows import Tile, TileSm90
from wan_attn.selfcheck import first_call

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]

CPU = torch.device("cpu")
# Of sums that are cut off as an Ampere card does it; those of a Hopper one lose less.
CUT_OFF = machine.Knobs(sum_block=8, sum_bits=24)
ROUNDED = machine.Knobs()
HOPPER = "sdpa_sm90_bf16_d128_n176_w2_s2_c2"
# The rows whose roundings differ most from those the bound is made of, and Wan's on Hopper.
ROWS = {
    "sdpa_sm75_bf16_d128": CUT_OFF,
    "sdpa_sm80_pv16_bf16_d128": CUT_OFF,
    HOPPER: ROUNDED,
}


def job_of(name: str) -> Job:
    return next(job for job in collect.shipped() if job.name == name)


def found(job: Job, knobs: machine.Knobs, csrc: Path = CSRC) -> str | None:
    runner = Runner(job, collect.nvrtcs()[0], csrc, knobs)

    def run(query: Tensor, key: Tensor, value: Tensor, *lens: Any) -> tuple[Tensor, Tensor]:
        q_lens, k_lens, is_causal = lens
        call = {"q_lens": q_lens, "k_lens": k_lens, "is_causal": is_causal}
        result = runner(job.kernel, query, key, value, **call)
        assert result.lse is not None
        return result.out, result.lse

    assert isinstance(job.kernel, Tile | TileSm90)
    dtype = torch.bfloat16 if "bf16" in job.name else torch.float16
    return first_call.wrong(run, CPU, dtype, job.kernel.head_dim)


@pytest.mark.parametrize("name", ROWS)
def test_right_kernels_pass(name: str) -> None:
    assert found(job_of(name), ROWS[name]) is None


UNTIL_FREE = "no place of the ring of K is waited for"
FAULTS = {
    "a descriptor without mask": ("tile/ring.cuh", "(x & 0x3ffff) >> 4", "x >> 4"),
    UNTIL_FREE: (
        "tile/producer.cuh",
        "    mbarrier_wait(barrier_at(EMPTY_K, r.stage), r.parity ^ 1);\n",
        "",
    ),
    "O is never rescaled": ("sdpa_sm90.cuh", "    if (has_grown)", "    if (false)"),
}


def shown(name: str, folder: Path) -> str | None:
    """What the check finds; or what the machine does, where it is told to let order be."""
    csrc = Bug(name, *FAULTS[name]).plant(folder)
    try:
        return found(job_of(HOPPER), machine.Knobs(check_order=0, landing=0), csrc)
    except machine.PtxError as error:
        return str(error)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_hopper_show(name: str, tmp_path: Path) -> None:
    assert shown(name, tmp_path)


def test_two_tiles_of_keys_would_not_show_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No place of a ring is filled twice."""
    monkeypatch.setattr(first_call, "SEQLEN_Q", 149)
    monkeypatch.setattr(first_call, "SEQLEN_K", 331)
    assert shown(UNTIL_FREE, tmp_path) is None
