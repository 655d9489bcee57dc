# SPDX-License-Identifier: Apache-2.0
"""test_rope_on_cuda.py - what torch.ops.wan_attn.rms_norm_rope does with CUDA tensors: our kernel,
or torch's operators and a reason; and the calls that say whether a kernel is right on a card."""

from __future__ import annotations

import ctypes
import logging
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rope_oracle
from cuda_mock import prove
from cuda_mock.backward import BackwardGpu
from cuda_mock.gpu import CARDS
from emu.build import compiler
from wan_attn import config, log
from wan_attn.backends import native as backend
from wan_attn.backends._errors import is_device_error
from wan_attn.integrations import _rope
from wan_attn.native import cuda_driver, library, rope, rope_on_cuda
from wan_attn.selfcheck import rope_calls

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _as_new(default_settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    rope_calls.forget()
    log.forget()
    yield
    rope_calls.forget()
    rope_on_cuda.guard_with(rope_calls.verdict, is_device_error)


def right(given: Mapping[str, Any]) -> Tensor:
    out: Tensor = torch.ops.wan_attn.rms_norm_rope(**given)
    return out


def implementation(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As it is registered for CUDA tensors; these lie on the CPU."""
    return rope_on_cuda.implementation(kernel, rope._by_torch)


def arguments(**changed: Any) -> dict[str, Any]:
    return {"x": torch.randn(1, 8, 2, 16), "eps": 1e-6} | changed


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_right_passes(dtype: torch.dtype) -> None:
    for call in rope_calls.CALLS:
        out = right(rope_calls.arguments(call, dtype, CPU))
        assert rope_calls.difference(call, dtype, out) is None
    assert rope_calls.first_wrong(right, CPU, dtype) is None


def test_the_results_to_compare_with_are_the_oracles() -> None:
    for call in rope_calls.CALLS:
        made = rope_calls.known(replace(call, table=""))
        eps = rope_calls.EPS if call.has_norm else None
        exact = rope_oracle.exact(made.x, made.weight, eps=eps, per_head=call.per_head)
        torch.testing.assert_close(made.truth, exact, rtol=1e-12, atol=1e-12)
    call = rope_calls.CALLS[1]
    table = rope_oracle.table(rope_calls.POSITIONS, call.head_dim)
    own = rope_calls._of_tokens(call, table)
    x = rope_calls.known(call).x.double()
    exact = rope_oracle.exact(x, grids=rope_calls.GRIDS, seqlen_offset=call.offset)
    torch.testing.assert_close(rope_calls._turned(x, own)[0], exact, rtol=1e-12, atol=1e-12)


def spoiled(change: Callable[[Tensor, Mapping[str, Any]], Tensor]) -> Callable[..., Tensor]:
    def run(given: Mapping[str, Any]) -> Tensor:
        return change(right(given), given)

    return run


def one_element(out: Tensor, given: Mapping[str, Any]) -> Tensor:
    out[1, 7, 1, 5] *= 1.25
    return out


# What is changed in the call, or in its result.
WRONG: dict[str, Callable[[Tensor, Mapping[str, Any]], Tensor] | dict[str, Any]] = {
    "nothing written": lambda out, given: torch.full_like(out, float("nan")),
    "one element": one_element,
    "sine with the other sign": lambda out, given: right(
        {**given, "table": given["table"] * torch.tensor([1.0, -1.0]).repeat(64).double()}
    ),
    "the tail is turned": lambda out, given: right({**given, "grid_sizes": torch.full((2, 3), 3)}),
    "no rotation": {"table": None, "grid_sizes": None, "seqlen_offset": 0},
    "no weight": {"weight": None},
    "another offset": {"seqlen_offset": 1},
    "another eps": {"eps": 0.5},
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_wrong_is_found(name: str, dtype: torch.dtype) -> None:
    change = WRONG[name]
    run = spoiled(change) if callable(change) else lambda given: right({**given, **change})
    found = rope_calls.first_wrong(run, CPU, dtype)
    assert found is not None and "instead of" in found


def test_our_kernel_runs_where_it_is_right() -> None:
    calls: list[dict[str, Any]] = []

    def kernel(**given: Any) -> Tensor:
        calls.append(given)
        return right(given)

    run = implementation(kernel)
    given = arguments()
    assert torch.equal(run(**given), right(given)) and len(calls) == 3, "two known calls and ours"
    x = given.pop("x")
    assert torch.equal(run(x, **given), right({"x": x, **given})) and len(calls) == 4
    run(x.half(), **given)
    assert len(calls) == 7, "another dtype is looked at, too"


def test_torch_computes_and_one_line_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def kernel(**given: Any) -> Tensor:
        raise RuntimeError("wan_attn: no kernel takes this call: it is too odd")

    given = arguments()
    with caplog.at_level(logging.INFO, logger="wan_attn"):
        for _ in range(3):
            out = implementation(kernel)(**given)
    torch.testing.assert_close(out, right(given))
    said = [r.getMessage() for r in caplog.records if "RMS norm" in r.getMessage()]
    assert said == [
        "[Attention] RMS norm and RoPE: torch's operators, not our kernel: no kernel takes this"
        " call: it is too odd"
    ]


def test_a_kernel_that_is_wrong_here_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def kernel(**given: Any) -> Tensor:
        return right(given) * 1.5

    given = arguments()
    with caplog.at_level(logging.INFO, logger="wan_attn"):
        out = implementation(kernel)(**given)
    torch.testing.assert_close(out, right(given))
    assert "it is wrong on this card: norm and rotation: out[0, 0, 0, 0] is" in caplog.text


def test_without_the_self_check_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_ATTN_SELF_CHECK", "0")
    config.forget()
    calls: list[int] = []

    def kernel(**given: Any) -> Tensor:
        calls.append(1)
        return right(given)

    implementation(kernel)(**arguments())
    assert calls == [1]
    monkeypatch.undo()
    config.forget()


@pytest.mark.parametrize(
    "text", ("CUDA driver error CUDA_ERROR_ILLEGAL_ADDRESS (x) when launching y", "CUDA error: z")
)
def test_a_device_in_trouble_is_raised(text: str) -> None:
    def kernel(**given: Any) -> Tensor:
        raise RuntimeError(f"wan_attn: {text}")

    with pytest.raises(RuntimeError, match=text.split("(")[0]):
        implementation(kernel)(**arguments())


def test_a_broken_call_is_refused_and_a_forced_row_never_replaced() -> None:
    def kernel(**given: Any) -> Tensor:
        raise RuntimeError("wan_attn: the kernel's own words")

    with pytest.raises(RuntimeError, match=r"wan_attn: weight must be \[heads \* head_dim\]"):
        implementation(kernel)(**arguments(weight=torch.ones(3)))
    with pytest.raises(RuntimeError, match="the kernel's own words"):
        implementation(kernel)(**arguments(kernel=0))


def test_the_op_has_it_for_cuda(native: str) -> None:
    keys = torch._C._dispatch_dump("wan_attn::rms_norm_rope")
    assert "CUDA: registered at" in keys
    if native == "shim":
        assert "CUDA: registered at" in torch._C._dispatch_dump("wan_attn::rms_norm_rope_kernel")


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")
@pytest.mark.parametrize("arch", (75, 80))
def test_the_rows_pass_their_proof_on_the_emulated_gpu(
    arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: str
) -> None:
    gpu = BackwardGpu(tmp_path, CARDS[arch])
    monkeypatch.setattr(library, "load", lambda: gpu.lib)
    monkeypatch.setattr(library, "lib", lambda: gpu.lib)
    card = prove.MockCard(0, gpu)
    rows = card.rope_rows()
    assert [row.name for row in rows] == ["rms_norm_rope_sm75", "rms_norm_rope_any_sm75"]
    for row in rows:
        for dtype in row.dtypes:
            assert rope_calls.wrong(card, row, dtype) is None
    taken = {name for name, _ in gpu.asked}
    assert taken == {f"rms_norm_rope_{x}_sm75" for x in ("f32", "f16", "bf16", "any")}


def test_integrations_ask_before_they_leave_the_models_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native: str
) -> None:
    gpu = BackwardGpu(tmp_path, CARDS[80])
    monkeypatch.setattr(library, "lib", lambda: gpu.lib)
    device = torch.device("cuda", 0)
    assert rope.why_not(device, dtype=torch.bfloat16) is None
    answers = library.ProofFn(lambda *_: library.PROOF_FAILED)
    settings = library.CudaConfig(
        ctypes.sizeof(library.CudaConfig), gpu.driver._name.encode(), gpu._keep[1], answers
    )
    assert gpu.lib.wan_attn_cuda_configure(settings, library.Error()) == library.OK
    why = rope.why_not(device, dtype=torch.bfloat16)
    assert why is not None and "rms_norm_rope_sm75: has not passed its proof on this card" in why


def test_a_card_is_asked_until_it_says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question costs more than the call, so a yes is kept; a no may end with the proof."""
    answers: list[str | None] = ["not proven", "not proven", None]
    asked = []

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        asked.append((device.type, dtype))
        return answers.pop(0)

    monkeypatch.setattr(rope, "why_not", why_not)
    monkeypatch.setattr(_rope, "_taken", set())
    x: Any = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    found = [_rope._why_not_on_card(x) for _ in range(5)]
    assert found == ["not proven", "not proven", None, None, None]
    assert asked == [("cuda", torch.bfloat16)] * 3


def test_the_backend_guards_the_op() -> None:
    assert backend and cuda_driver
    assert rope_on_cuda._first_wrong is rope_calls.verdict
    assert rope_on_cuda._is_device_error is is_device_error
