# SPDX-License-Identifier: Apache-2.0
"""test_any_device.py - where torch has no memory-bounded attention, ours by torch's operators runs:
Apple's GPUs, AMD's before RDNA 3. Stand-ins tell of such devices; calls of theirs run on the CPU.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import standins
import wan_attn
from calls import BF16, F16, F32, operands
from tolerances import assert_close_to_oracle
from wan_attn.backends import REGISTRY, _common, chunked, native, torch_sdpa
from wan_attn.config import Settings
from wan_attn.doctor import selftest_paths
from wan_attn.request import Call, Request
from wan_attn.selection import choose
from wan_attn.selection.choose import select
from wan_attn.workloads import WORKLOADS, parse_shape


@pytest.fixture(autouse=True)
def _reset() -> Any:
    standins.reset()
    yield
    standins.reset()


def pretend_amd(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A torch for AMD, and a card of this architecture, which calls itself 10.3."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    about = {"name": "AMD Radeon", "major": 10, "minor": 3, "multi_processor_count": 40}
    found = types.SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-", **about)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    standins.pretend_card(monkeypatch, (10, 3))
    _common.amd_architecture.cache_clear()


def request_on(device: str, name: str = "ti2v-5b-720p", dtype: torch.dtype = F16) -> Request:
    return Request.of(WORKLOADS[name], dtype, device)


@pytest.mark.parametrize("dtype", (F16, BF16, F32))
@pytest.mark.parametrize("name", ("ti2v-5b-720p", "a14b-720p-cross", "h3-104k"))
def test_long_calls_on_apples_gpu_are_bounded(name: str, dtype: torch.dtype) -> None:
    choice = select(request_on("mps", name, dtype), Settings())
    assert choice.backend == "chunked"
    assert "no fused kernel on Apple's GPUs" in choice.reasons()
    assert "no kernel for mps in this build" in choice.reasons()
    assert choice.kernel_name is None


def test_short_calls_stay_with_torch() -> None:
    short = Request.of(parse_shape("1x257x16x80"), F16, "mps")
    assert select(short, Settings()).backend == "torch"


@pytest.mark.parametrize(
    ("name", "backend"), [("gfx1030", "chunked"), ("gfx1035", "chunked"), ("gfx1100", "torch")]
)
def test_amd(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_amd(monkeypatch, name)
    for module in ("flash_attn", "flash_attn_interface", "flash_attn_3", "xformers"):
        standins.install(monkeypatch, None, module)
    pretend_amd(monkeypatch, name)
    choice = select(request_on("cuda:0"), Settings())
    assert choice.backend == backend
    assert (name in choice.reasons()) == (backend == "chunked")


def test_amds_numbers_are_not_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    """gfx1030 calls itself 10.3, which is a B300's number."""
    pretend_amd(monkeypatch, "gfx1030")
    order = choose.order(request_on("cuda:0"), Settings())
    assert order.index("sdpa") < order.index("torch")


def test_intels_gpu_stays_with_torch() -> None:
    """Which has a fused kernel there."""
    assert select(request_on("xpu"), Settings()).backend == "torch"


def test_a_bounded_call_never_holds_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call as on such a device, computed here; no tensor is as large as its scores."""
    monkeypatch.setattr(torch_sdpa, "needs_square_memory", lambda request: "none here")
    monkeypatch.setattr(native, "why_not", lambda request: "no kernel")
    monkeypatch.setattr(chunked, "MAX_ELEMENTS", 1 << 18)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    q, k, v = operands(1, 1500, 1500, heads_q=2, heads_k=2, head_dim=64, dtype=F32)
    with Sizes():  # type: ignore[no-untyped-call]
        out = wan_attn.sdpa(q, k, v)
    assert select(Request.from_tensors(q, k, v, Call()), Settings()).backend == "chunked"
    assert largest < 2 * 1500 * 1500 / 4, "a fraction of the scores"
    assert isinstance(out, torch.Tensor)
    assert_close_to_oracle(out[:, :9], q[:, :9], k, v)


def test_doctor_and_available_name_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest_paths.devices()[0] == "cpu" and "mps" not in selftest_paths.devices()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert selftest_paths.devices() == ["cpu", "mps"]
    found = wan_attn.available()
    assert list(found) == list(REGISTRY)
    assert found["chunked"] is None and found["sdpa"] == "no kernel for mps in this build"
