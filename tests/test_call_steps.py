# SPDX-License-Identifier: Apache-2.0
"""test_call_steps.py - wan_attn_prepare and wan_attn_run: one check, choice and plan for each call,
the row that ran is the one that was told, and a call that was not prepared never runs.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calls import BF16, F32, operands
from cuda_mock.gpu import CARDS, Gpu
from emu.build import compiler, made
from source_tree import ROOT
from tolerances import assert_close_to_oracle
from wan_attn.cuda.rows import table_rows
from wan_attn.native import library, op
from wan_attn.native.bindings import describe

pytestmark = pytest.mark.usefixtures("native")

STEPS = ("checks", "lengths", "choices", "cpu_plans", "cuda_plans")
WRAPPED = ("check", "check_lengths", "choose", "blocked_plan", "cuda_make_plan")


class CpuCall:
    """The parameters of a call, and the tensors they point to."""

    def __init__(self, lib: ctypes.CDLL, dtype: torch.dtype = F32, kernel: int = -1) -> None:
        self.lib = lib
        self.tensors = operands(batch=2, dtype=dtype)
        self.k_lens = torch.tensor([7, self.tensors[1].shape[1]])
        self.out = torch.full_like(self.tensors[0], math.nan)
        q, k, v = map(describe, self.tensors)
        self.params = library.Params(
            struct_size=ctypes.sizeof(library.Params),
            kernel=kernel,
            q=q,
            k=k,
            v=v,
            out=describe(self.out),
            seqused_k=describe(self.k_lens),
            window_size_left=-1,
            window_size_right=-1,
        )
        self.call = library.Call(struct_size=ctypes.sizeof(library.Call))
        self.error = library.Error()

    def prepare(self) -> int:
        status: int = self.lib.wan_attn_prepare(self.params, self.call, self.error)
        self._give_workspace(self.call.workspace_size)
        return status

    def run(self) -> int:
        status: int = self.lib.wan_attn_run(self.params, self.call, self.error)
        return status

    def forward(self) -> int:
        size = ctypes.c_size_t()
        self.lib.wan_attn_workspace_size(self.params, size, self.error)
        self._give_workspace(size.value)
        status: int = self.lib.wan_attn_forward(self.params, self.error)
        return status

    def _give_workspace(self, size: int) -> None:
        self.workspace = torch.empty(size + 64, dtype=torch.uint8)
        self.params.workspace = -(-self.workspace.data_ptr() // 64) * 64
        self.params.workspace_size = size


ROWS = [row for row in op.kernels() if row.device == "cpu"]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@each_row
def test_two_steps_give_the_bits_of_one(row: op.KernelInfo) -> None:
    call = CpuCall(library.lib(), row.dtypes[-1], row.index)
    if call.prepare() == library.UNSUPPORTED:
        pytest.skip(call.error.text())
    assert call.call.kernel == row.index, "the row that was forced"
    assert call.run() == library.OK, call.error.text()
    if not row.is_lossy:
        assert_close_to_oracle(call.out, *call.tensors, k_lens=call.k_lens)
    two_steps = call.out.clone()
    call.out.fill_(math.nan)
    assert call.run() == library.OK, "a prepared call may be run again"
    assert torch.equal(call.out, two_steps)
    call.out.fill_(math.nan)
    assert call.forward() == library.OK
    assert torch.equal(call.out, two_steps)


def test_the_row_is_the_one_that_select_tells() -> None:
    for dtype in (F32, BF16):
        call, row = CpuCall(library.lib(), dtype), ctypes.c_int32()
        assert call.prepare() == library.OK
        assert call.lib.wan_attn_select(call.params, row, None) == library.OK
        assert call.call.kernel == row.value


def test_outputs_and_workspace_may_come_after_prepare() -> None:
    call = CpuCall(library.lib())
    call.params.out = library.Tensor()
    assert call.prepare() == library.OK, call.error.text()
    assert call.run() == library.INVALID_ARGUMENT
    assert call.error.text() == "out must point to memory, got NULL"
    call.params.out = describe(call.out)
    lse = torch.full((2, call.out.shape[2], call.out.shape[1]), math.nan)
    call.params.lse = describe(lse)
    assert call.run() == library.OK, call.error.text()
    assert_close_to_oracle(call.out, *call.tensors, k_lens=call.k_lens, lse=lse)


def other_memory(call: CpuCall) -> None:
    call.params.q.data += 4


CHANGES: dict[str, Callable[[CpuCall], object]] = {
    "another query": other_memory,
    "another length": lambda c: setattr(c.params.k, "shape", (2, 8, 2, 64)),
    "a mask": lambda c: setattr(c.params, "is_causal", 1),
    "a scale": lambda c: setattr(c.params, "softmax_scale", 2.0),
    "another row": lambda c: setattr(c.params, "kernel", len(op.kernels()) - 1),
    "other lengths": lambda c: setattr(c.params, "seqused_k", library.Tensor()),
    "more threads": lambda c: setattr(c.params, "num_threads", 64),
    "another loop": lambda c: setattr(c.params, "parallel", 1),
    "other features": lambda c: setattr(c.params, "cpu_features", library.CPU_KNOWN),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_call_is_not_run(name: str) -> None:
    call = CpuCall(library.lib())
    assert call.prepare() == library.OK
    CHANGES[name](call)
    assert call.run() == library.INVALID_ARGUMENT
    assert "params must be as wan_attn_prepare saw them" in call.error.text()
    assert call.out.isnan().all(), "out was touched"


@pytest.mark.parametrize("kind", ("never prepared", "failed", "of another size", "NULL"))
def test_an_unprepared_call_is_not_run(kind: str) -> None:
    call = CpuCall(library.lib())
    assert call.prepare() == library.OK
    if kind == "never prepared":
        call.call = library.Call(struct_size=ctypes.sizeof(library.Call))
    elif kind == "failed":  # what stood in it was good for another call
        call.params.window_size_left = -2
        assert call.prepare() == library.INVALID_ARGUMENT
        call.params.window_size_left = -1
    elif kind == "of another size":
        call.call.struct_size -= 8
        assert call.prepare() == library.INVALID_ARGUMENT
        assert "call.struct_size must be" in call.error.text()
    status = call.lib.wan_attn_run(call.params, None if kind == "NULL" else call.call, call.error)
    assert status == library.INVALID_ARGUMENT
    assert call.error.text() == "call must come from wan_attn_prepare, got one that does not"
    assert call.out.isnan().all(), "out was touched"
    assert call.lib.wan_attn_run(None, call.call, None) == library.INVALID_ARGUMENT
    assert call.lib.wan_attn_prepare(call.params, None, None) == library.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def counting_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libwan_attn, compiled anew with the functions of WRAPPED behind counters."""
    cc = next((c for c in ("gcc", "clang") if shutil.which(c)), None)
    if cc is None or sys.platform != "linux":
        pytest.skip("needs gcc or clang, and a linker with --wrap")
    sources = [*sorted((ROOT / "csrc").glob("c*/**/*.c")), ROOT / "tests/c/count_steps.c"]
    headers = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".h", ".def", ".inc")]
    wraps = [f"-Wl,--wrap=wan_attn_{name}" for name in WRAPPED]
    flags = ["-std=c11", "-O1", "-fPIC", "-shared", "-DWAN_ATTN_BUILD=1", "-fvisibility=hidden"]
    command = [cc, *flags, f"-I{ROOT / 'csrc'}", *wraps, *map(str, sources)]
    return made("counting", ".so", [*sources, *headers], [*command, "-lm", "-lpthread", "-ldl"])


def counts(lib: ctypes.CDLL) -> dict[str, int]:
    found = {name: lib.steps_counted(n) for n, name in enumerate(STEPS)}
    return {name: n for name, n in found.items() if n}


@pytest.fixture
def counted(counting_library: Path) -> Iterator[ctypes.CDLL]:
    lib = library.opened(counting_library)
    counts(lib)
    yield lib


def test_a_cpu_call_takes_each_step_once(counted: ctypes.CDLL) -> None:
    call = CpuCall(counted)
    call.prepare()
    once = {"checks": 1, "lengths": 1, "choices": 1, "cpu_plans": 1}
    if op.kernels()[call.call.kernel].name == "sdpa_ref":
        del once["cpu_plans"]
    assert counts(counted) == once
    assert call.run() == library.OK
    assert counts(counted) == {}
    call.lib.wan_attn_forward(call.params, None)
    assert counts(counted) == once


LENGTHS = (None, torch.tensor([60, 133]))


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")
@pytest.mark.parametrize("k_lens", LENGTHS, ids=("padded", "lengths"))
@pytest.mark.parametrize("arch", CARDS)
def test_a_cuda_call_takes_each_step_once(
    arch: int, k_lens: Tensor | None, counting_library: Path, tmp_path: Path
) -> None:
    gpu = Gpu(tmp_path, CARDS[arch], library=counting_library)
    gpu.driver.mock_on_launch(type(gpu._keep[0])(0))  # nothing has to be computed
    query = torch.randn(2, 70, 2, 128, dtype=BF16)
    key, value = torch.randn(2, 2, 133, 2, 128, dtype=BF16)
    gpu.sdpa(query, key, value, k_lens=k_lens)
    assert counts(gpu.lib) == {"checks": 1, "lengths": 1, "choices": 1, "cuda_plans": 1}
    launched = [line.split()[1] for line in gpu.log() if line.startswith("launch")]
    assert gpu.prepared is not None
    told = table_rows()[op.kernels()[gpu.prepared.kernel].name]
    assert launched[-1] == told.symbol("BF16"), "told one row, ran another"
