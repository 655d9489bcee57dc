# SPDX-License-Identifier: Apache-2.0
"""test_ptx_rope.py - the kernels of rms_norm_rope, run from what compilers make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from emu import cases_rope
from emu.cases_rope import FLOATS, Case
from emu.rows import rope_kernels
from nightly import every
from ptx import collect, machine
from ptx.rope import ARCHS, SETTINGS, Rope, size_of

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]

COMPILERS = collect.all_compilers()
each_arch = pytest.mark.parametrize("arch", ARCHS)
each_compiler = pytest.mark.parametrize("compiler", every(9, COMPILERS), ids=lambda c: c.name)


@each_compiler
@each_arch
def test_calls_by_hand(compiler: collect.Compiler, arch: int) -> None:
    for number, case in enumerate(cases_rope.by_hand()):
        on = Rope(compiler, arch, knobs=SETTINGS[number % len(SETTINGS)])
        on.check(case, True)
        if number % 4 == arch % 4:
            on.check(case, False)


@each_compiler
@each_arch
def test_calls_that_vectors_do_not_take(compiler: collect.Compiler, arch: int) -> None:
    for number, case in enumerate(cases_rope.for_any_alone()):
        Rope(compiler, arch, knobs=SETTINGS[number % len(SETTINGS)]).check(case)


@each_compiler
@each_arch
def test_calls_by_chance(compiler: collect.Compiler, arch: int) -> None:
    for vectors in (True, False):
        for number, case in enumerate(cases_rope.by_chance(40, 7 + arch, vectors)):
            Rope(compiler, arch, knobs=SETTINGS[number % len(SETTINGS)]).check(case, vectors)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_x_is_read_once_and_out_written_once(dtype: torch.dtype) -> None:
    """In pieces of 16 bytes, counted in what is executed: what the op needs, and nothing more."""
    for out_dtype in FLOATS:
        case = Case(grids=((2, 2, 1),), table="grid", heads=24, head_dim=128, seqlen=4)
        case = replace(case, dtype=dtype, out_dtype=out_dtype, weight=dtype)
        name = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
        one = rope_kernels()[f"rms_norm_rope_{name}_sm75"]
        ran = Rope(collect.nvrtcs()[0], 80).executed(one, case)
        assert set(op for op, n in ran.items() if n and op.startswith("st.global")) == {
            "st.global.v4.b32"
        }
        assert set(op for op, n in ran.items() if n and op.startswith("ld.global.b")) == set()
        elements = case.seqlen * case.heads * case.head_dim
        assert 512 * ran["ld.global.v4.b32"] == elements * size_of(dtype)
        assert 512 * ran["st.global.v4.b32"] == elements * size_of(out_dtype)
        # Angles: cos and sin of each pair, once for all heads.
        assert 32 * ran["ld.global.nc.f64"] == case.seqlen * case.head_dim
