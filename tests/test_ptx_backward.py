# SPDX-License-Identifier: Apache-2.0
"""test_ptx_backward.py - every kernel of gradients, run from the PTX that NVRTC makes of it, with
the passes before it: as test_ptx_rows.py does it with forward's.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import Structure
from dataclasses import replace
from typing import Any

import pytest
import torch

from emu import cases_backward
from emu.cases import Case
from emu.run import Schedule
from emu.run_backward import Launcher, Pair, pairs, run
from nightly import unless
from ptx import collect, machine, matrix
from ptx.calls import kernel
from ptx.machine import Knobs

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]

ARCH = {"TURING": 75, "WIDE": 80, "SLIM": 86}  # the first of each class


def programs(pair: Pair) -> dict[Any, machine.Program]:
    """Of each kernel."""
    arch = ARCH[pair.of_keys.gpu_class]
    names = ["wan_attn_backward_rows"]
    if pair.dtype == "F16":
        names.append("wan_attn_backward_scale")
    found: dict[Any, machine.Program] = {}
    for job in collect.shipped():
        mine = job.kernel in (pair.of_keys, pair.of_rows) or job.name in names
        if mine and job.arch == arch:
            found[job.kernel] = kernel(job, collect.nvrtcs()[0])
    assert len(found) == 2 + len(names)
    return found


def on_the_machine(made: dict[Any, machine.Program], knobs: Knobs) -> Launcher:
    def launch(of: Any, args: Structure, grid: int, tensors: list[Any]) -> int:
        shared = getattr(of, "smem_bytes", 0)
        threads = getattr(of, "num_threads", 128)
        how: dict[str, Any] = {"shared_bytes": shared, "threads": threads, "knobs": knobs}
        machine.launch(made[of], args, grid, tensors, **how)
        return 0

    return launch


def short(pair: Pair) -> Iterator[Case]:
    """Ragged, causal, window, grouped heads, lengths, f32, a negative scale, several blocks."""
    m, n = pair.of_keys.block_m, pair.block_n
    yield Case(n + 5, m + 3)
    yield Case(2 * n + 1, m - 5, 1, 2, 1, is_causal=True, q_is_f32=True)
    yield Case(m + 3, 2 * n + 5, window=(n, 3), scale=-0.2)
    yield Case(20, n + 4, 2, 4, 2, layout="surrounded", q_lens=(20, 7), k_lens=(n + 1, 3))
    yield Case(n, 2 * n + 5, 3, q_lens=(0, 9, n), k_lens=(5, 0, n + 2), lens_dtype="int32")


def is_short(pair: Pair) -> bool:
    return pair.head_dim == 128 and pair.of_keys.gpu_class != "WIDE"


@pytest.mark.parametrize("pair", unless(is_short, pairs()), ids=lambda pair: pair.name)
def test_calls_and_that_they_run_every_opcode(pair: Pair) -> None:
    made = programs(pair)
    for number, case in enumerate(short(pair)):
        knobs = replace(matrix.SETTINGS[number], seed=number, sum_block=0, ex2_error=0)
        case = replace(case, schedule=Schedule(knobs.landing, number))
        cases_backward.check(case, pair, launcher=on_the_machine(made, knobs))
    call = cases_backward.call_of(Case(9, pair.block_n + 7, is_causal=True, q_is_f32=True), pair)
    first = run(pair, call, launcher=on_the_machine(made, Knobs()))
    wide = replace(call, key=call.key.float())  # whose gradient is in float32
    again = run(pair, wide, launcher=on_the_machine(made, Knobs()))
    assert torch.equal(again.grads[1].to(call.key.dtype), first.grads[1])
    cases_backward.check_zeros(pair, launcher=on_the_machine(made, Knobs()))
    for tile in (pair.of_keys, pair.of_rows):  # the passes before have more dtypes than a pair
        assert not [op for op, times in made[tile].counts().items() if not times], tile.name
