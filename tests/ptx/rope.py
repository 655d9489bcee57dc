# SPDX-License-Identifier: Apache-2.0
"""rope.py - calls of the kernels of rms_norm_rope on the machine, and what they execute."""

from __future__ import annotations

from collections import Counter
from ctypes import Structure
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu import cases_rope, run_rope
from emu.cases_rope import Case
from emu.rows import CSRC, Job, RopeKernel
from emu.run import Tensor_
from ptx import machine
from ptx.calls import kernel
from ptx.collect import Compiler

ARCHS = (75, 80, 120)  # those between have 80's text, but for its target
# What uninitialised memory holds, who goes first, how far rsqrt is off.
SETTINGS = (
    machine.Knobs(),
    machine.Knobs(order=1, seed=3, ex2_error=2),
    machine.Knobs(order=2, seed=5, ex2_error=2),
)


@dataclass(frozen=True)
class Rope:
    """The kernels as this compiler makes them for this architecture."""

    compiler: Compiler
    arch: int
    csrc: Path = CSRC
    knobs: machine.Knobs = machine.Knobs()

    def program(self, one: RopeKernel) -> machine.Program:
        return kernel(Job(one, self.arch), self.compiler, self.csrc)

    def start(self, one: RopeKernel, args: Structure, grid: int, memory: list[Tensor_]) -> None:
        machine.launch(
            *(self.program(one), args, grid, memory),
            shared_bytes=one.smem_bytes,
            threads=args.num_threads,
            fewer=True,
            knobs=self.knobs,
        )

    def run(self, x: Tensor, *operands: Tensor | None, **options: Any) -> Tensor:
        """As run_rope.run."""
        return run_rope.run(x, *operands, start=self.start, **options)

    def check(self, case: Case, vectors: bool | None = None) -> None:
        cases_rope.check(case, partial(self.run, by_vectors=vectors))

    def executed(self, one: RopeKernel, case: Case) -> Counter[str]:
        """How many warps execute each opcode in this call."""
        program = self.program(one)
        before = program.counts()
        given = cases_rope.operands(case)
        x, *others = given.inputs()
        assert x is not None
        self.run(x, *others, eps=case.eps, round_norm=case.round_norm, dtype=case.out_dtype,
                 by_vectors=one.dtype != "ANY")  # fmt: skip
        after = program.counts()
        return Counter({name: after[name] - before[name] for name in after})


def size_of(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()
