# SPDX-License-Identifier: Apache-2.0
"""test_ptx_traps.py - small programs, each with one fault that the machine has to name."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch

from ptx import machine, pin
from ptx.parse import Refused

pytestmark = pytest.mark.skipif(
    machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"
)

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry k(.param .align 8 .b8 k_param_0[16])
.maxntid 64, 1, 1
{
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %l<9>;
ld.param.u64 %l0, [k_param_0]; ld.param.u64 %l1, [k_param_0+8];
mov.u32 %r0, %tid.x; mov.u32 %r1, smem;
shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2; cvt.u64.u32 %l2, %r2;
add.s64 %l3, %l0, %l2; add.s64 %l4, %l1, %l2; mov.u32 %r9, 7;
"""
STORE = "st.shared.v4.b32 [%r3], {%r9, %r9, %r9, %r9};"
WHO = """setp.lt.s32 %p0, %r0, 32; xor.b32 %r5, %r2, 512; add.s32 %r6, %r1, %r5;
"""  # %p0: the first warp; %r6: the other warp's 16 bytes
COPY = "cp.async.cg.shared.global [%r3], [%l3], 16;"


class Params(ctypes.Structure):
    _fields_ = [("source", ctypes.c_void_p), ("to", ctypes.c_void_p)]


IN_ORDER = machine.Knobs(landing=1, order=0)


@dataclass
class Ran:
    out: torch.Tensor


def run(body: str, knobs: machine.Knobs = IN_ORDER) -> Ran:
    """64 threads; %l3 and %l4: this thread's 16 bytes of the input and of the output; %r3: its 16
    bytes of shared memory."""
    source, out = torch.arange(256, dtype=torch.int32), torch.full((256,), -1, dtype=torch.int32)
    tensors = [
        machine.Tensor_(name, x.data_ptr(), 1024, output)
        for name, x, output in ((b"source", source, 0), (b"out", out, 1))
    ]
    params = Params(source.data_ptr(), out.data_ptr())
    kernel = machine.program(HEAD + body + "\nret;\n}\n")
    machine.launch(kernel, params, 1, tensors, shared_bytes=1024, threads=64, knobs=knobs)
    return Ran(out)


FAULTS = {
    "misaligned global": "ld.global.nc.b32 %r5, [%l3+2];",
    "misaligned shared": "ld.shared.b32 %r5, [%r3+2];",
    "out of every tensor": "ld.global.nc.b32 %r5, [%l3+1024];",
    "outside of the block's memory": "add.s32 %r5, %r3, 1024; ld.shared.b32 %r6, [%r5];",
    "global read of the output": "ld.global.nc.b32 %r5, [%l4];",
    "global write to the input": "st.global.b32 [%l3], %r9;",
    "written twice": "st.global.b32 [%l4], %r9; st.global.b32 [%l4], %r9;",
    "a store: uninitialised register": "st.global.b32 [%l4], %r50;",
    "an address: uninitialised register": "ld.shared.b32 %r5, [%r50];",
    "a guard: uninitialised register": "@%p5 mov.u32 %r5, %r9;",
    "uninitialised memory is read": "ld.shared.b32 %r5, [%r3];",
    "redux.sync: diverged warp": (
        "and.b32 %r5, %r0, 1; setp.eq.s32 %p0, %r5, 0; @%p0 bra skip;"
        " redux.sync.or.b32 %r6, %r0, 0xffffffff; skip:"
    ),
    "ldmatrix: diverged warp": (
        f"{STORE} setp.lt.s32 %p0, %r0, 8; @%p0 bra skip;"
        " ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r3]; skip:"
    ),
    "bra.uni": "setp.lt.s32 %p0, %r0, 8; @%p0 bra.uni skip; mov.u32 %r5, 1; skip:",
    "read while a copy into it is in flight": (
        f"{COPY} cp.async.commit_group; ld.shared.b32 %r5, [%r3];"
    ),
    "written while a copy into it is in flight": f"{COPY} {STORE}",
    "with a cp.async in flight": COPY,
    "no barrier orders it after its write by warp": (
        f"{WHO} @%p0 st.shared.b32 [%r3], %r9; @!%p0 ld.shared.b32 %r7, [%r6];"
    ),
    "no barrier orders it after the read by warp": (
        f"{STORE} barrier.sync.aligned 1, 64; {WHO} @!%p0 ld.shared.b32 %r7, [%r6]; @%p0 {STORE}"
    ),
    "deadlock": "setp.lt.s32 %p0, %r0, 32; @%p0 bra skip; barrier.sync.aligned 0; skip:",
    "but others came for": (
        f"{WHO} @%p0 barrier.arrive.aligned 3, 64; @!%p0 barrier.sync.aligned 3, 32;"
    ),
    "no mbarrier was initialised": "mbarrier.arrive.shared::cta.b64 _, [%r1];",
    "a count of 0": "mbarrier.init.shared::cta.b64 [%r3], 0;",
    "goes on for ever": "again: bra.uni again;",
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_fault_is_named(words: str) -> None:
    with pytest.raises(machine.PtxError, match=words):
        run(FAULTS[words])


@pytest.mark.parametrize(
    "body",
    (
        "add.rz.f32 %r5, %r9, %r9;",
        "mov.u32 %r5, %tid.y;",
        "cp.async.ca.shared.global [%r3], [%l3], 16;",
        "ld.volatile.global.b32 %r5, [%l3];",
        "add.s32 %l3, %l3, 1;",
        ".local .b8 x[4];",
    ),
)
def test_what_is_not_known_is_refused(body: str) -> None:
    with pytest.raises(Refused):
        run(body)


@pytest.mark.parametrize("landing", range(3))
def test_right_programs_run(landing: int) -> None:
    """A copy, waited for and read by the other warp; lanes that part and meet again."""
    body = f"""{COPY} cp.async.commit_group; cp.async.wait_group 0; barrier.sync.aligned 0;
    xor.b32 %r5, %r2, 512; add.s32 %r6, %r1, %r5;
    ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r6];
    mov.u32 %r20, 0; and.b32 %r21, %r0, 7;
    loop: setp.ge.s32 %p0, %r20, %r21; @%p0 bra done; add.s32 %r20, %r20, 1; bra loop;
    done: shfl.sync.bfly.b32 %r22, %r20, 1, 0x1f, 0xffffffff;
    st.global.v2.b32 [%l4], {{%r10, %r13}}; st.global.v2.b32 [%l4+8], {{%r20, %r22}};"""
    out = run(body, machine.Knobs(landing=landing, order=landing)).out.view(64, 4)
    thread = torch.arange(64)
    other = thread ^ 32
    assert torch.equal(out[:, 0], (4 * other).int()) and torch.equal(
        out[:, 1], (4 * other + 3).int()
    )
    assert torch.equal(out[:, 2], (thread % 8).int())
    assert torch.equal(out[:, 3], ((thread ^ 1) % 8).int())


def test_a_part_may_be_dropped() -> None:
    """As NVRTC 13 writes it."""
    body = """mov.b64 %l5, {%r0, %r9}; mov.b64 {_, %r10}, %l5; mov.b64 {%r11, _}, %l5;
    st.global.v2.b32 [%l4], {%r10, %r11}; st.global.v2.b32 [%l4+8], {%r9, %r9};"""
    out = run(body).out.view(64, 4)
    assert (out[:, 0] == 7).all() and torch.equal(out[:, 1], torch.arange(64).int())


def test_the_store_that_no_kernel_makes() -> None:
    """computed() of csrc/cuda/ptx/wgmma.cuh: with a negative sum it does store."""
    assert pin.check()["st.shared.f32"] == 1
