# SPDX-License-Identifier: Apache-2.0
"""test_cuda_static_rope.py - the machine code of rms_norm_rope, and what it says of its speed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rope_model
from emu import compile as compilers
from emu import sass
from emu.rows import RopeKernel, rope_kernels
from nightly import every, unless
from test_cuda_static import ARCHS, COMPILERS, compile_with

pytestmark = pytest.mark.skipif(sass.nvdisasm() is None, reason="no nvdisasm")

# A thread's. 96: seven blocks of 96 threads an SM (24 heads), 43 KiB of bfloat16 under way at once.
REGISTERS = {"rope": 96, "rope_any": 64}
KERNELS = list(rope_kernels().values())


def is_short(compiler: str, arch: int, one: RopeKernel) -> bool:
    """NVRTC 12 makes the wheel's cubins; each kernel is seen on one architecture at least."""
    return compiler.startswith("nvrtc12") and arch == ARCHS[KERNELS.index(one) % len(ARCHS)]


@pytest.mark.parametrize(
    ("compiler", "arch", "one"),
    unless(is_short, ((c, arch, one) for arch in ARCHS for one in KERNELS for c in COMPILERS)),
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_the_machine_code_is_as_designed(
    compiler: str, arch: int, one: RopeKernel, tmp_path: Path
) -> None:
    cubin = tmp_path / "kernel.cubin"
    compile_with(compiler, one, arch, cubin)
    code = sass.read(cubin).instructions
    assert not sass.count(code, "LDL", "STL"), "registers were spilled, or an array is in memory"
    assert sass.registers(cubin) <= REGISTERS[one.body]
    # The difference of an angle and its float, for cos and sin: no other float64, none an element.
    places = 1 if one.body == "rope" else 2  # staged, and for tables of heads
    assert sass.count(code, "DADD") <= 2 * places
    assert not sass.count(code, "DMUL", "DFMA", "DSETP")
    assert sass.count(code, "BAR") == 1
    if one.body != "rope":
        return
    vectors = 2 if one.dtype == "F32" else 1
    constant = sass.count(code, "LDG.E.128.CONSTANT")
    assert sass.count(code, "LDG.E.128") - constant == 4 * vectors
    assert sass.count(code, "STG") == sass.count(code, "STG.E.128")
    # Every vector of x is on its way before the first is used.
    assert sass.loads_under_way(code, "LDG.E.128") >= 4


@pytest.mark.parametrize("call", every(len(rope_model.CALLS), rope_model.CALLS[::-1]))
def test_memory_is_the_limit_on_every_card(call: rope_model.Call, tmp_path: Path) -> None:
    if not compilers.nvrtcs():
        pytest.skip("no NVRTC among Python's packages")
    for gpu in rope_model.GPUS:
        kernel = rope_model.specialised(call, gpu.card.arch, tmp_path / "kernel.cubin")
        found = rope_model.estimate(gpu, call, kernel)
        assert found.limit == "memory", found
        most = 0.9 if gpu.card.name == "H200" else 0.75
        assert all(
            n <= most * found.clocks["memory"] for u, n in found.clocks.items() if u != "memory"
        )
