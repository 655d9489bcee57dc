# SPDX-License-Identifier: Apache-2.0
"""pin.py - computed() of csrc/cuda/ptx/wgmma.cuh on the machine, with sums that no kernel can have.

Kernels never make its store, because sums of weights are not negative. Here some are.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from emu.rows import CSRC
from ptx import machine

_PROGRAM = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry k(.param .align 8 .b8 k_param_0[24])
.maxntid 32, 1, 1
{
.reg .b32 %r<9>; .reg .b64 %l<9>; .reg .f32 %f<9>;
ld.param.u64 %l0, [k_param_0]; ld.param.u64 %l1, [k_param_0+8]; ld.param.u64 %l2, [k_param_0+16];
mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2;
shl.b32 %r6, %r0, 4; mov.u32 %r2, smem; add.s32 %r3, %r2, %r6;
cvt.u64.u32 %l3, %r1; add.s64 %l0, %l0, %l3; add.s64 %l1, %l1, %l3; add.s64 %l2, %l2, %l3;
ld.global.nc.f32 %f0, [%l0]; ld.global.nc.f32 %f1, [%l1];
mov.u32 %r4, 0; st.shared.b32 [%r3], %r4;
ASM
ld.shared.b32 %r5, [%r3]; st.global.b32 [%l2], %r5;
ret;
}
"""


class _Params(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("out", ctypes.c_void_p)]


def program(csrc: Path = CSRC) -> machine.Program:
    """A warp that calls computed(x, y, at) for 32 pairs and reads what lies at `at`."""
    source = (csrc / "cuda/ptx/wgmma.cuh").read_text(encoding="utf-8")
    found = re.search(r'void computed\([^{]*{\s*asm volatile\((.*?)::"f"', source, re.DOTALL)
    assert found, "computed() is not there, or not an asm of two floats and an address"
    text = "".join(re.findall(r'"([^"]*)"', found[1]))
    for number, register in enumerate(("%f0", "%f1", "%r3")):
        text = text.replace(f"%{number}", register)
    return machine.program(_PROGRAM.replace("ASM", text))


def run(x: Tensor, y: Tensor) -> tuple[Tensor, Counter[str]]:
    """What each of 32 threads finds at its place, 0 before; and how often each opcode has run."""
    out, kernel = torch.full((32,), -1.0), program()
    known = [
        machine.Tensor_(name, t.data_ptr(), 128, is_output)
        for name, t, is_output in ((b"x", x, 0), (b"y", y, 0), (b"out", out, 1))
    ]
    params = _Params(x.data_ptr(), y.data_ptr(), out.data_ptr())
    machine.launch(kernel, params, 1, known, shared_bytes=512, threads=32)
    return out, kernel.counts()


def check() -> Counter[str]:
    """x is stored where one of the two is negative, and nothing elsewhere. Returns the counts."""
    x = torch.linspace(-2.0, 1.1, 32)
    y = torch.where(torch.arange(32) % 5 == 0, -1.0, 0.5)
    out, counts = run(x, y)
    expected = torch.where((x < 0) | (y < 0), x, 0.0)
    assert torch.equal(out, expected), f"{out} instead of {expected}"
    return counts
