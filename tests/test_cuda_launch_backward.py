# SPDX-License-Identifier: Apache-2.0
"""test_cuda_launch_backward.py - whole gradients on a CUDA device: C ABI, choice of a row, plan,
every pass, on the mock driver and the emulated GPU, against the oracle. The kernels have tests of
their own."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import backward_oracle
import oracle
from cuda_mock.backward import BackwardGpu
from cuda_mock.gpu import CARDS, STREAM, Card
from emu.build import compiler
from emu.rows import tiles_backward_for
from wan_attn.backends._errors import is_device_error
from wan_attn.native import kernels, library

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)"),
    pytest.mark.skipif(library.load() is None, reason="no native library"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROWS, SCALE, MEASURE = "wan_attn_backward_rows", "wan_attn_backward_scale", "wan_attn_measure"
CONVERT, PUT = "wan_attn_convert", "wan_attn_put_lengths"


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[BackwardGpu]:
    machine = BackwardGpu(tmp_path, CARDS[80])
    yield machine
    assert machine.driver.mock_depth() == 0, "a context was left on the stack"


def normal(
    seqlen_q: int = 40,
    seqlen_k: int = 70,
    heads_q: int = 2,
    heads_k: int = 1,
    head_dim: int = 64,
    batch: int = 1,
    dtype: torch.dtype = BF16,
    qk_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(batch, seqlen_q, heads_q, head_dim).to(qk_dtype or dtype)
    key, value = torch.randn(2, batch, seqlen_k, heads_k, head_dim)
    return query, key.to(qk_dtype or dtype), value.to(dtype)


def inputs(
    query: Tensor, key: Tensor, value: Tensor, grad_lse: bool = False, **call: Any
) -> tuple[Any, ...]:
    """grad_out, grad_lse, the operands, and what an exact forward leaves."""
    in_16_bits = (x.to(value.dtype) for x in (query, key, value))
    out, lse = oracle.attention(*in_16_bits, **call)
    left = torch.empty_like(query), torch.empty(query.shape[0], query.shape[2], query.shape[1])
    for x, numbers in zip(left, (out, lse), strict=True):
        x.copy_(torch.from_numpy(numbers))
    batch, seqlen_q, heads, _ = query.shape
    dlse = torch.randn(batch, seqlen_q, heads).transpose(1, 2) if grad_lse else None
    return torch.randn(query.shape).to(query.dtype), dlse, query, key, value, *left


def check(gpu: BackwardGpu, given: tuple[Any, ...], **call: Any) -> list[str]:
    """Runs the call, holds it against the oracle, returns the kernels that were launched."""
    found = gpu.backward(*given, **call)
    ran = [name for name, _ in gpu.passes]
    for name in ("lens_on_device", "kernel", "device", "grads", "spare_workspace"):
        call.pop(name, None)
    backward_oracle.assert_close(found, *given[:5], **call)
    return ran


def pair(dtype: str = "bf16", head_dim: int = 64, isa: str = "sm80") -> list[str]:
    return [f"sdpa_backward_{isa}_{one}_{dtype}_d{head_dim}" for one in ("dkdv", "dq")]


@pytest.mark.parametrize("head_dim", (64, 80, 128))
@pytest.mark.parametrize("arch", (75, 80, 89, 90))
def test_each_card_runs_its_row(arch: int, head_dim: int, tmp_path: Path) -> None:
    gpu = BackwardGpu(tmp_path, CARDS[arch])
    isa = "sm75" if arch == 75 else "sm80"
    given = inputs(*normal(head_dim=head_dim, dtype=F16), is_causal=True)
    launched = check(gpu, given, is_causal=True)
    assert launched == [ROWS, MEASURE, SCALE, *pair("f16", head_dim, isa)]
    if arch > 75:
        launched = check(gpu, inputs(*normal(head_dim=head_dim)))
        assert launched == [ROWS, *pair("bf16", head_dim)]
    assert {arch for _, arch in gpu.asked} == {arch}


def test_what_is_no_operand_yet_is_converted(gpu: BackwardGpu) -> None:
    given = inputs(*normal(qk_dtype=F32))
    assert check(gpu, given) == [ROWS, *[CONVERT] * 3, *pair()]  # query, key, grad_out
    given = inputs(*normal(dtype=F16, qk_dtype=F32), grad_lse=True)
    assert check(gpu, given) == [ROWS, MEASURE, SCALE, *[CONVERT] * 3, *pair("f16")]
    odd = [torch.randn(1, 40, 2, 69).to(BF16)[..., begin : begin + 64] for begin in (1, 2, 4)]
    given = inputs(odd[0], odd[1], odd[2])
    assert check(gpu, given) == [ROWS, *[CONVERT] * 3, *pair()]
    grad_out = torch.randn(1, 40, 2, 65)[..., 1:].to(F16)
    given = inputs(*normal(dtype=F16))
    assert check(gpu, (grad_out, *given[1:])) == [ROWS, MEASURE, SCALE, *pair("f16")]
    moved = torch.empty(40 * 2 * 64 + 1).to(F16)[1:].view(1, 40, 2, 64).copy_(grad_out)
    assert check(gpu, (moved, *given[1:])) == [ROWS, MEASURE, SCALE, CONVERT, *pair("f16")]


def test_a_gradient_of_another_dtype_is_brought_into_range(gpu: BackwardGpu) -> None:
    """float32 beyond float16's range, and far below it: no bit of what float32 holds changes."""
    given = inputs(*normal(dtype=F16, qk_dtype=F32))
    plain = gpu.backward(*given)
    for power in (20, -30):
        moved = gpu.backward(given[0] * 2.0**power, *given[1:])
        for a, b in zip(moved[:2], plain[:2], strict=True):  # of query and key
            assert torch.equal(a * 2.0**-power, b)


def test_views_are_read_and_written_where_they_are(gpu: BackwardGpu) -> None:
    fused = torch.randn(2, 40, 3 * 2, 64).to(BF16)
    given = inputs(*fused.split(2, dim=2))
    one = torch.full_like(fused, math.nan)
    launched = check(gpu, given, grads=tuple(one.split(2, dim=2)))
    assert launched == [ROWS, *pair()] and not one.isnan().any()
    same_for_all = torch.randn(2, 1, 1, 64).to(BF16).expand(2, 40, 2, 64)
    assert check(gpu, (same_for_all, *given[1:])) == [ROWS, *pair()]


def test_results_that_no_kernel_can_write_are_refused(gpu: BackwardGpu) -> None:
    given = inputs(*normal())
    for n in range(3):
        grads = [torch.empty_like(x) for x in given[2:5]]
        grads[n] = torch.empty(given[2 + n].numel() + 1).to(BF16)[1:].view(given[2 + n].shape)
        with pytest.raises(RuntimeError, match="2: .*sdpa_backward_sm80_d64: needs grad_query, gr"):
            gpu.backward(*given, grads=tuple(grads))
    assert not gpu.passes


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("on_device", (False, True), ids=("host", "device"))
def test_lengths_reach_the_kernels_from_either_device(
    gpu: BackwardGpu, on_device: bool, dtype: torch.dtype
) -> None:
    query, key, value = normal(batch=3)
    lens = {"q_lens": torch.tensor([40, 11, 0]), "k_lens": torch.tensor([9, 70, 64])}
    given = inputs(query, key, value, grad_lse=True, **lens, is_causal=True)
    for x in (*given[0:1], *given[2:6]):
        used = lens["q_lens" if x.shape[1] == 40 else "k_lens"]
        for b, n in enumerate(used.tolist()):
            x[b, n:] = math.nan
    for x in (given[1], given[6]):
        for b, n in enumerate(lens["q_lens"].tolist()):
            x[b, :, n:] = math.nan
    call = {name: x.to(dtype) for name, x in lens.items()}
    launched = check(gpu, given, **call, lens_on_device=on_device, is_causal=True)
    assert launched == [PUT] * (0 if on_device else 2) + [ROWS, *pair()]


def test_lengths_that_say_nothing_cost_nothing(gpu: BackwardGpu) -> None:
    given = inputs(*normal(batch=2))
    assert check(gpu, given, k_lens=torch.tensor([70, 70])) == [ROWS, *pair()]


def test_more_lengths_than_one_launch_carries(gpu: BackwardGpu) -> None:
    lens = torch.arange(300) % 4
    given = inputs(*normal(2, 3, 1, 1, batch=300), k_lens=lens)
    assert check(gpu, given, k_lens=lens) == [PUT, PUT, ROWS, *pair()]


@pytest.mark.parametrize("call", ({"window": (9, 3)}, {"scale": -0.3}, {"scale": 0.0}), ids=str)
def test_masks_and_scales(gpu: BackwardGpu, call: dict[str, Any]) -> None:
    check(gpu, inputs(*normal(heads_q=6, heads_k=2), grad_lse=True, **call), **call)


def test_nothing_to_do(gpu: BackwardGpu) -> None:
    given = inputs(*normal(batch=0))
    check(gpu, given)
    assert not gpu.passes
    for sizes, expected in (((0, 5), pair()[:1]), ((5, 0), [ROWS, *pair()[1:]])):
        given = inputs(*normal(*sizes))
        assert check(gpu, given) == expected
        assert not any(grad.any() for grad in gpu.backward(*given))
    given = inputs(*normal(0, 5, dtype=F16))
    assert check(gpu, given) == [MEASURE, SCALE, *pair("f16")[:1]]


def test_the_grid_and_the_workspace(gpu: BackwardGpu) -> None:
    given = inputs(*normal(130, 260, 4, 2, batch=2))
    check(gpu, given)
    dkdv, dq = (next(t for t in tiles_backward_for(80) if t.symbol == name) for name in pair())
    blocks = -(-260 // dkdv.block_m) * 2 * 2, -(-130 // dq.block_m) * 4 * 2
    assert gpu.passes == [(ROWS, 260), (pair()[0], blocks[0]), (pair()[1], blocks[1])]
    assert gpu.workspace_bytes == 2 * 4 * 130 * 16
    with pytest.raises(RuntimeError, match="1: workspace must be at least 16640 bytes for sdpa_b"):
        gpu.backward(*given, spare_workspace=-1)


def select(gpu: BackwardGpu, forward: library.Params) -> Any:
    """What a question says of the workspace, and the answer's words."""
    params = library.BackwardParams(
        struct_size=ctypes.sizeof(library.BackwardParams),
        kernel=-1,
        forward=ctypes.pointer(forward),
    )
    size, error = ctypes.c_size_t(0), library.Error()
    status = gpu.lib.wan_attn_backward_select(params, None, size, error)
    return size.value, status, error.text()


def described(batch: int, length: int, heads: int) -> library.Tensor:
    """[batch, length, heads, 64] of bfloat16 on the card; there is nothing behind it."""
    x = library.Tensor(None, library.BF16, library.CUDA, 0, 4)
    x.shape[:] = (batch, length, heads, 64)
    x.stride[:] = (length * heads * 64, heads * 64, 64, 1)
    return x


def question(batch: int, seqlen_q: int, seqlen_k: int, heads: int) -> library.Params:
    q, k = described(batch, seqlen_q, heads), described(batch, seqlen_k, heads)
    return library.Params(
        struct_size=ctypes.sizeof(library.Params),
        kernel=-1,
        q=q,
        k=k,
        v=k,
        window_size_left=-1,
        window_size_right=-1,
    )


def test_a_question_reads_nothing_and_touches_no_device(gpu: BackwardGpu) -> None:
    forward = question(1, 100, 100, 1)
    lens = library.Tensor(None, library.I32, library.CPU, 0, 1)
    lens.shape[0], lens.stride[0] = 1, 1
    assert select(gpu, forward) == (1792, library.OK, "")
    forward.seqused_k = lens  # a place for them, though there are none yet
    assert select(gpu, forward) == (1792 + 256, library.OK, "")
    assert set(gpu.log()) == {"cuInit"}


def test_counts_have_31_bits(gpu: BackwardGpu) -> None:
    for sizes, why in (
        ((1, (1 << 29), 8, 1), "takes lengths below 2^29"),
        ((1, 8, 1 << 29, 1), "takes lengths below 2^29"),
        ((8, (1 << 28), 8, 1), "takes batch * num_heads_q * seqlen below 2^31"),
        ((8, 8, 1 << 28, 1), "takes batch * num_heads_q * seqlen below 2^31"),
    ):
        _, status, words = select(gpu, question(*sizes))
        assert status == library.UNSUPPORTED and why in words
    size, status, _ = select(gpu, question(8, (1 << 28) - 1, 8, 1))
    assert status == library.OK and size >= 16 * 8 * ((1 << 28) - 1)


def test_every_row_says_why_not(gpu: BackwardGpu, tmp_path: Path) -> None:
    rows = {row.name: row.index for row in kernels.backward_kernels()}
    says = "2: no kernel computes this call's gradients: "
    for call, words in (
        ({"dtype": F32}, f"{says}none for cuda takes float32"),
        ({"head_dim": 96}, f"{says}those for cuda take head_dim 64, 80, 128, got 96"),
    ):
        with pytest.raises(RuntimeError, match=words):
            gpu.backward(*inputs(*normal(**call)))
    given = inputs(*normal(dtype=F16))
    for row, words in (
        ("sdpa_backward_ref", "sdpa_backward_ref: runs on cpu, the call is on cuda"),
        ("sdpa_backward_sm80_d80", "sdpa_backward_sm80_d80: takes head_dim 80, got 64"),
        ("sdpa_backward_sm75_d64", "needs compute capability 7.5, cuda:0 has 8.0"),
    ):
        with pytest.raises(RuntimeError, match=f"2: .*{words}"):
            gpu.backward(*given, kernel=rows[row])
    with pytest.raises(RuntimeError, match="1: kernel must be -1"):
        gpu.backward(*given, kernel=99)
    turing = BackwardGpu(tmp_path, CARDS[75])
    with pytest.raises(RuntimeError, match="needs compute capability 8.0 or newer, cuda:0 has 7.5"):
        turing.backward(*inputs(*normal()))
    with pytest.raises(RuntimeError, match="newer, cuda:0 has 7.0; .* 7.5, cuda:0 has 7.0"):
        BackwardGpu(tmp_path, Card(7, 0, "Tesla V100")).backward(*given)
    with pytest.raises(RuntimeError, match="the driver has 0 devices, there is no cuda:0"):
        BackwardGpu(tmp_path).backward(*given)


def test_the_right_device_context_and_stream(tmp_path: Path) -> None:
    gpu = BackwardGpu(tmp_path, CARDS[80], CARDS[89])
    given = inputs(*normal(5, 5))
    for device in (1, 0):
        gpu.log()
        check(gpu, given, device=device)
        launches = [line for line in gpu.log() if line.startswith("launch")]
        assert len(launches) == 3
        assert all(f" on {device}, stream {STREAM:#x}" in line for line in launches)
    with gpu.green(0):
        check(gpu, given)
        assert gpu.driver.mock_depth() == 1
    assert gpu.driver.mock_depth() == 0


def test_kernels_are_loaded_once_and_outside_a_capture(gpu: BackwardGpu) -> None:
    given = inputs(*normal(5, 5))
    gpu.backward(*given)
    log = gpu.log()
    assert log.count("load, capture mode 2") == log.count("to device 0, capture mode 2") == 3
    gpu.backward(*given)
    kinds = {line.split()[0] for line in gpu.log()}
    assert kinds == {"launch"}, "nothing but launches: no wait, no allocation, no copy"


FAILURES = [
    ("cuLaunchKernel", 700, 0, "3: CUDA driver error CUDA_ERROR_ILLEGAL_ADDRESS .* wan_attn_back"),
    (
        "cuLaunchKernel",
        2,
        1,
        "3: CUDA driver error CUDA_ERROR_OUT_OF_MEMORY .* sdpa_backward_.*dkd",
    ),
    ("cuLaunchKernel", 701, 2, "2: the machine code of sdpa_backward_sm80_dq_bf16_d64 .* launchin"),
    ("cuLibraryLoadData", 209, 1, "2: the machine code of sdpa_backward_sm80_dkdv_bf16_d64 is not"),
    ("cuLibraryLoadData", 2, 2, "3: CUDA driver error CUDA_ERROR_OUT_OF_MEMORY .* sdpa_backward_"),
    ("cuCtxGetCurrent", 3, 0, "3: CUDA driver error .* when asked for the thread's context"),
    ("cuInit", 100, 0, "2: .*the driver does not start: CUDA_ERROR_NO_DEVICE"),
    ("cuDeviceGetCount", 702, 0, "3: no kernel computes this call's gradients: CUDA driver error"),
]


@pytest.mark.parametrize(("function", "error", "after", "message"), FAILURES)
def test_failures_of_the_driver(
    gpu: BackwardGpu, function: str, error: int, after: int, message: str
) -> None:
    given = inputs(*normal(5, 5))
    gpu.fail(function, error, after)
    with pytest.raises(RuntimeError, match=message) as caught:
        gpu.backward(*given)
    assert is_device_error(caught.value) == message.startswith("3")
    assert gpu.driver.mock_depth() == 0
    gpu.fail("", 0)
    if function != "cuInit":
        check(gpu, given)


def test_rows_without_a_proof_are_refused(gpu: BackwardGpu) -> None:
    asked: list[tuple[int, bytes, int]] = []
    verdicts = {b"sdpa_backward_sm80_d64": library.PROOF_FAILED}

    def find(index: int, row: bytes, dtype: int) -> int:
        asked.append((index, row, dtype))
        return verdicts.get(row, library.PROOF_PASSED)

    callback = library.ProofFn(find)
    config = library.CudaConfig(
        ctypes.sizeof(library.CudaConfig), gpu.driver._name.encode(), gpu._keep[1], callback
    )
    error = library.Error()
    assert gpu.lib.wan_attn_cuda_configure(config, error) == library.OK
    given = inputs(*normal(5, 5))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sdpa_backward_sm80_d64: has not passed its proof"):
            gpu.backward(*given)
    assert asked == [(0, b"sdpa_backward_sm80_d64", library.BF16)], "asked once"
    check(gpu, inputs(*normal(5, 5, head_dim=80)))
    # Row 0 of this table is not row 0 of attention's.
    gpu.sdpa(*normal(5, 5))
    assert asked[-1][1] == b"sdpa_sm80_d64"
