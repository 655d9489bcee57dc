# SPDX-License-Identifier: Apache-2.0
"""test_cuda_launch_rope.py - whole calls of rms_norm_rope on a CUDA device: C ABI, choice of a row,
launch, on the mock driver and the emulated GPU. The kernels have tests of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rope_oracle
from cuda_mock.gpu import CARDS, Card
from cuda_mock.rope import RopeGpu
from emu import cases_rope
from emu.build import compiler
from emu.cases_rope import FLOATS, Case
from wan_attn.native import library, rope

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)"),
    pytest.mark.skipif(library.load() is None, reason="no native library"),
]

VECTORS = "rms_norm_rope_bf16_sm75"
ANY = "rms_norm_rope_any_sm75"


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[RopeGpu]:
    machine = RopeGpu(tmp_path, CARDS[80])
    yield machine
    assert machine.driver.mock_depth() == 0, "a context was left on the stack"


def runner(gpu: RopeGpu, **more: Any) -> Callable[..., Tensor]:
    """As cases_rope.check calls a kernel."""

    def run(
        x: Tensor,
        weight: Tensor | None,
        table: Tensor | None,
        grid_sizes: Tensor | None,
        *,
        in_place: bool,
        out: Tensor | None,
        **options: Any,
    ) -> Tensor:
        if in_place:
            x = out = x.clone()
        return gpu.rope(x, weight, table, grid_sizes, out=out, **options, **more)

    return run


def launched(gpu: RopeGpu, case: Case, **more: Any) -> tuple[str, int, int]:
    cases_rope.check(case, runner(gpu, **more))
    (one,) = gpu.launches
    return one


TURN = Case(grids=((2, 2, 1),), table="grid", heads=24, head_dim=128, seqlen=3)


@pytest.mark.parametrize("arch", CARDS)
def test_each_card_runs_both_rows(arch: int, tmp_path: Path) -> None:
    gpu = RopeGpu(tmp_path, CARDS[arch])
    assert launched(gpu, TURN) == (VECTORS, 3, 96)
    small = Case(head_dim=36, seqlen=2, dtype=torch.float16)
    assert launched(gpu, small) == (ANY, 2, 128)
    assert {arch for _, arch in gpu.asked} == {arch}


def test_blocks_have_the_threads_that_a_token_needs(gpu: RopeGpu) -> None:
    for heads, head_dim, threads in (
        (40, 128, 160), (12, 128, 64), (1, 8, 32), (5, 256, 64), (16, 72, 64)
    ):  # fmt: skip
        case = Case(heads=heads, head_dim=head_dim, seqlen=1)
        assert launched(gpu, case) == (VECTORS, 1, threads)
    assert launched(gpu, Case(heads=64, head_dim=256, seqlen=1)) == (VECTORS, 1, 512)
    assert launched(gpu, Case(heads=65, head_dim=256, seqlen=1)) == (ANY, 1, 128)


def test_what_vectors_do_not_take(gpu: RopeGpu) -> None:
    for case in (
        Case(layout="odd"),
        Case(out_layout="odd"),
        Case(table="head"),
        Case(head_dim=24, per_head=True),
        Case(head_dim=63),
    ):
        assert launched(gpu, case)[0] == ANY, case
    for case in (Case(layout="fused"), Case(layout="heads first"), Case(table="token", batch=2)):
        assert launched(gpu, case)[0] == VECTORS, case
    weight = torch.rand(3 * 64 + 1)[1:]
    x = torch.randn(1, 2, 3, 64)
    gpu.rope(x, weight, eps=1e-6)
    assert gpu.launches[0][0] == ANY


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_and_in_place(gpu: RopeGpu, dtype: torch.dtype) -> None:
    name = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    for out_dtype in FLOATS:
        case = Case(dtype=dtype, out_dtype=out_dtype, weight=dtype, table="token")
        assert launched(gpu, case)[0] == f"rms_norm_rope_{name}_sm75"
    place = Case(dtype=dtype, out_dtype=dtype, out_layout="in place")
    assert launched(gpu, place)[0] == f"rms_norm_rope_{name}_sm75"
    assert launched(gpu, Case(dtype=dtype, out_dtype=dtype, out_layout="in place", head_dim=20))


def test_cases_by_hand_and_by_chance(gpu: RopeGpu) -> None:
    for case in [*cases_rope.by_hand()][::6] + [*cases_rope.by_chance(20, 99, False)]:
        if case.seqlen_offset < 1 << 30:
            launched(gpu, case)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("on_device", (False, True), ids=("host", "device"))
def test_more_grids_than_one_launch_carries(
    gpu: RopeGpu, on_device: bool, dtype: torch.dtype
) -> None:
    x, table = torch.randn(130, 3, 1, 16), rope_oracle.table(4, 16)
    grids = torch.tensor([[1, b % 3, 1 + b % 2] for b in range(130)], dtype=dtype)
    out = gpu.rope(x, None, table, grids, grid_on_device=on_device)
    blocks = [390] if on_device else [192, 192, 6]
    assert [one[1] for one in gpu.launches] == blocks
    exact = rope_oracle.exact(x, grids=grids.tolist())
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_right_device_context_and_stream(tmp_path: Path) -> None:
    gpu = RopeGpu(tmp_path, CARDS[80], CARDS[120])
    x = torch.randn(1, 2, 2, 64)
    gpu.rope(x, eps=1e-6, device=1)
    assert {arch for _, arch in gpu.asked} == {120}
    with gpu.green(0):
        gpu.rope(x, eps=1e-6)
    assert gpu.driver.mock_depth() == 0


def test_a_card_that_is_too_old(tmp_path: Path) -> None:
    gpu = RopeGpu(tmp_path, Card(7, 0, "Tesla V100"))
    said = "needs compute capability 7.5 or newer, cuda:0 has 7.0"
    with pytest.raises(RuntimeError, match=said):
        gpu.rope(torch.randn(1, 2, 2, 64), eps=1e-6)


def test_every_row_says_why_not(gpu: RopeGpu) -> None:
    x, table = torch.randn(1, 2, 2, 64), rope_oracle.table(4, 64)
    far = partial(gpu.rope, x, None, table, torch.tensor([[1, 1, 2]]), seqlen_offset=1 << 31)
    with pytest.raises(RuntimeError, match=r"2: no kernel takes this call: .*seqlen.* below 2\^31"):
        far()
    rows = rope.kernels()
    with pytest.raises(RuntimeError, match="2: rms_norm_rope_sm75: takes a head_dim that is a mul"):
        gpu.rope(x[..., :20], eps=1.0, kernel=rows.index("rms_norm_rope_sm75"))
    with pytest.raises(
        RuntimeError, match="2: rms_norm_rope_ref: runs on cpu, the call is on cuda"
    ):
        gpu.rope(x, eps=1.0, kernel=rows.index("rms_norm_rope_ref"))
    with pytest.raises(RuntimeError, match="1: kernel must be -1"):
        gpu.rope(x, eps=1.0, kernel=99)


def test_a_grid_that_the_table_lacks_is_refused(gpu: RopeGpu) -> None:
    x, table = torch.randn(1, 2, 2, 64), rope_oracle.table(4, 64)
    with pytest.raises(RuntimeError, match="grid_sizes must be between 0 and the table's 4"):
        gpu.rope(x, None, table, torch.tensor([[1, 1, 5]]))


@pytest.mark.parametrize("error,status", ((1, 2), (2, 3), (700, 3), (209, 2)))
def test_a_launch_that_fails(gpu: RopeGpu, error: int, status: int) -> None:
    x = torch.randn(1, 2, 2, 64)
    gpu.fail("cuLaunchKernel", error)
    with pytest.raises(RuntimeError, match=f"^{status}: .*when launching"):
        gpu.rope(x, eps=1e-6)
    assert gpu.driver.mock_depth() == 0
    gpu.fail("cuLibraryLoadData", error)
    with pytest.raises(RuntimeError, match=f"^{status}: "):
        gpu.rope(x.half(), eps=1e-6)
    gpu.rope(x, eps=1e-6)


def test_nothing_in_nothing_out(gpu: RopeGpu) -> None:
    for shape in ((0, 3, 2, 8), (2, 0, 2, 8)):
        assert gpu.rope(torch.zeros(shape), eps=0.1).shape == shape
        assert not gpu.launches
