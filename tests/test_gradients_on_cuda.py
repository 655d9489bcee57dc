# SPDX-License-Identifier: Apache-2.0
"""test_gradients_on_cuda.py - who computes gradients on a CUDA card, as Python sees it: the choice,
the proof and the check before the first call, the op, measurements. On a mock card; tensors lie in
ordinary memory. The library's own passes: test_cuda_launch_backward.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calls import BF16, F16, F32
from cuda_mock.gpu import LAUNCH
from cuda_mock.user import (  # noqa: F401 - some are fixtures
    BACKWARD_ROWS,
    CUDA,
    Machine,
    machine_fixture,
)
from emu.build import compiler
from wan_attn import config
from wan_attn.backends import _torch_kernels, native
from wan_attn.bench import backward as bench
from wan_attn.bench import facts
from wan_attn.config import Settings
from wan_attn.native import autograd, backward, bindings, cuda_driver, library
from wan_attn.request import Request
from wan_attn.selection import choose
from wan_attn.selfcheck import backward_calls, first_call, proof, verdicts
from wan_attn.selfcheck.verdicts import FAILED, PASSED
from wan_attn.tuning.clocks import WallClock
from wan_attn.workloads import parse_shape

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)"),
    pytest.mark.skipif(library.load() is None, reason="no native library"),
]

TRAINS = Request(1, 70, 70, 2, 2, 64, BF16, BF16, BF16, CUDA, needs_grad=True)
ROW = "sdpa_backward_sm80_d64"


@pytest.fixture
def proven(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A user's process in which every row has passed, but for gradients of float16 at 64."""
    monkeypatch.setattr(cuda_driver, "_find_proof", proof.find_proof)
    verdict = machine.keep()
    verdict.put(BACKWARD_ROWS, PASSED)
    verdict.put([f"{ROW}/fp16"], FAILED, "wrong")
    verdicts.write(verdict)
    cuda_driver.ask_again()
    yield machine


def test_a_proven_row_keeps_calls_that_want_a_gradient(proven: Machine) -> None:
    assert native.why_not(TRAINS) is None
    assert native.gradient_name(TRAINS) == ROW
    few = replace(TRAINS, seqlen_q=1, seqlen_k=5000)
    assert native.why_not(few) is None, "the CPU's exception for few rows is none here"
    reason = native.why_not(replace(TRAINS, dtype=F16, query_dtype=F16, key_dtype=F16))
    assert reason is not None and f"{ROW}: has not passed its proof on this card" in reason
    wide = replace(TRAINS, head_dim=256)
    reason = native.why_not(wide)
    assert reason is not None and "those for cuda take head_dim 64, 80, 128, got 256" in reason
    assert native.why_not(replace(wide, needs_grad=False)) is None
    assert native.gradient_name(wide) == "torch"


def test_without_a_proof_there_is_none_and_a_question_makes_none(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_driver, "_find_proof", proof.find_proof)
    cuda_driver.ask_again()
    reason = backward.why_not(TRAINS)
    assert reason is not None and "has no proof on this card yet" in reason
    assert machine.children == []


def test_a_device_in_trouble_is_no_reason_for_another_backend(machine: Machine) -> None:
    machine.gpu.fail("cuDeviceGetCount", 700)
    with pytest.raises(RuntimeError, match="CUDA driver error"):
        backward.select(TRAINS)
    assert "CUDA driver error" in (backward.why_not(TRAINS) or "")


def test_pytorchs_flash_kernels_go_first_until_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_first(request: Request) -> bool:
        names = choose.order(request, Settings())
        return names.index("torch") < names.index("sdpa")

    monkeypatch.setattr(choose, "capability", lambda device: (8, 0))
    monkeypatch.setattr(_torch_kernels, "has_flash", lambda: True)
    assert is_first(TRAINS) and not is_first(replace(TRAINS, needs_grad=False))
    assert is_first(replace(TRAINS, is_causal=True))
    for masked in (
        {"has_k_lens": True},
        {"has_q_lens": True},
        {"window": (5, 5)},
        {"is_causal": True, "seqlen_k": 80},
        {"dtype": F32},
    ):
        assert not is_first(replace(TRAINS, **masked)), masked
    monkeypatch.setattr(choose, "capability", lambda device: (7, 5))
    assert not is_first(TRAINS), "Turing"
    monkeypatch.setattr(choose, "capability", lambda device: (8, 0))
    monkeypatch.setattr(_torch_kernels, "has_flash", lambda: False)
    assert not is_first(TRAINS), "Windows"


class OnCuda(Tensor):
    """Says that it is on a card."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


def on_cuda(*shape: int, dtype: torch.dtype = BF16) -> Any:
    return torch.randn(shape).to(dtype).as_subclass(OnCuda)


def test_autograd_asks_once_for_each_kind(proven: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []
    real = backward.select

    def select(request: Request) -> Any:
        asked.append(request)
        return real(request)

    monkeypatch.setattr(backward, "select", select)
    monkeypatch.setattr(autograd, "has_kernels", True)
    query, key = on_cuda(1, 7, 2, 64), on_cuda(1, 70, 2, 64)
    for _ in range(3):
        assert autograd.is_for_kernels(query, key, key)
    assert len(asked) == 1
    key = key.half()
    for _ in range(2):  # no is asked again: a proof may come
        assert not autograd.is_for_kernels(query.half(), key, key)
    assert len(asked) == 3
    floats = on_cuda(1, 7, 2, 64, dtype=F32)
    assert autograd.is_for_kernels(floats, floats, floats, BF16)
    assert (asked[-1].dtype, asked[-1].query_dtype) == (BF16, F32)
    assert not autograd.is_for_kernels(floats, floats, floats)
    assert not autograd.is_for_kernels(query[0], query[0], query[0])
    config.forget()
    assert autograd.is_for_kernels(query, query, query) and len(asked) == 6


def test_the_op_hands_over_what_lies_on_the_card(
    proven: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through ctypes: the row, its workspace, and results in memory of torch's."""
    ran: list[str] = []

    def launched(image: bytes, args: int, numbers: object, stream: int | None) -> int:
        ran.append(image.decode())
        return 0

    callback = LAUNCH(launched)
    proven.gpu.driver.mock_on_launch(callback)
    monkeypatch.setattr(bindings, "DEVICES", {"cpu": library.CUDA})
    query, grad = torch.randn(2, 1, 40, 2, 64).to(BF16)
    key, value = torch.randn(2, 1, 70, 1, 64).to(BF16)
    lse = torch.zeros(1, 2, 40)
    found = backward.by_ctypes(grad, None, query, key, value, query, lse)
    assert [x.shape for x in found] == [x.shape for x in (query, key, value)]
    assert ran[0] == "wan_attn_backward_rows" and len(ran) == 3
    assert backward.last_kernel() == ROW
    with pytest.raises(RuntimeError, match="wan_attn: .*has not passed its proof"):
        half = [x.half() for x in (query, key, value)]
        backward.by_ctypes(grad, None, half[0], half[1], half[2], half[0], lse)
    proven.gpu.fail("cuLaunchKernel", 700)
    with pytest.raises(RuntimeError, match="wan_attn: CUDA driver error CUDA_ERROR_ILLEGAL_ADDR"):
        backward.by_ctypes(grad, None, query, key, value, query, lse)


@pytest.mark.parametrize("dtype", (BF16, F16, F32), ids=str)
def test_the_first_call_is_checked(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's rows, which are right, and with one number wrong."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first_call.forget()
    asked = []
    real = native._gradients

    def counted(*call: Any) -> Any:
        asked.append(1)
        return real(*call)

    monkeypatch.setattr(native, "_gradients", counted)
    for _ in range(2):
        native._require_gradient_check(cpu, dtype, 64)
    assert len(asked) == 2, "two masks, once"

    def wrong(*call: Any) -> Any:
        query, key, value = real(*call)
        value[1, 3, 0, 7] += value.abs().max() / 4
        return query, key, value

    first_call.forget()
    monkeypatch.setattr(native, "_gradients", wrong)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"kernel of gradients is wrong on cpu: .*sdpa_back"
                           r".*grad_value\[1, 3, 0, 7\] is .* 1 of \d+ elements"):  # fmt: skip
            native._require_gradient_check(cpu, dtype, 64)
    first_call.forget()


def test_what_is_off_by_twice_its_bound_is_wrong() -> None:
    case = backward_calls.CALLS[1].case(64)
    made = backward_calls.known(case)
    for n, name in enumerate(backward_calls.NAMES):
        grads = [x.clone() for x in made.truth]
        assert backward_calls.difference(case, BF16, (grads[0], grads[1], grads[2])) is None
        bound = 2 * 2.0**-9 * (made.sizes[n] + made.truth[n].abs())
        grads[n] += 1.01 * bound
        words = backward_calls.difference(case, BF16, (grads[0], grads[1], grads[2]))
        assert words is not None and words.startswith(f"{name}[")
        grads[n] = torch.full_like(grads[n], torch.nan)
        assert backward_calls.difference(case, BF16, (grads[0], grads[1], grads[2])) is not None


def test_bench_measures_on_a_card(proven: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of `bench backward` there, but for torch's tensors and clock."""
    callback = LAUNCH(lambda *_: 0)
    proven.gpu.driver.mock_on_launch(callback)
    real: Any = vars(bench)["operands"]
    monkeypatch.setattr(bench, "operands", lambda *a: real(*a[:3], torch.device("cpu")))
    monkeypatch.setattr(bench, "clock_for", lambda *_, **__: WallClock())
    monkeypatch.setattr(bindings, "DEVICES", {"cpu": library.CUDA})
    monkeypatch.setattr(native, "prove", lambda device: None)
    monkeypatch.setattr(facts, "device_name", lambda device: "a mock card")
    monkeypatch.setattr(facts, "environment", lambda device: {})
    monkeypatch.setattr(facts, "state", lambda device: facts.State({}))

    class Ops:
        sdpa_backward = staticmethod(backward.by_ctypes)

        @staticmethod
        def sdpa(query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return torch.zeros_like(query), torch.zeros(1, query.shape[2], query.shape[1])

    monkeypatch.setattr(torch.ops, "wan_attn", Ops)
    shapes = (parse_shape("1x64x2x64"), parse_shape("1x64x2x32"))
    report = bench.run(bench.Options(shapes, (BF16,), 5.0, 2, device=CUDA))
    found = {(row["shape"], row["kernel"]): row for row in report.rows}
    assert found["1x64x2x64", ROW]["workspace_mib"] == 2 * 64 * 16 / 2**20
    assert {name for _, name in found} == {bench.TORCH, ROW}
    (skipped,) = report.skipped
    assert skipped[0] == "1x64x2x32 bf16" and "take head_dim 64, 128, 256, 80, got 32" in skipped[2]
