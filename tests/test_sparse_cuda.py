# SPDX-License-Identifier: Apache-2.0
"""test_sparse_cuda.py - calls under wan_attn.sparse on a CUDA device, which is not there: tensors
without numbers say that nothing waits for it, and a call that no row takes is dense and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cuda_mock.gpu import CARDS, Gpu
from emu.build import compiler
from sparse_calls import TOKENS, inside, one, sdpa, use
from wan_attn import config
from wan_attn.backends import native
from wan_attn.doctor import sparse as doctor_sparse
from wan_attn.native import cuda_driver, library
from wan_attn.observe import later, sampling
from wan_attn.request import PLAIN, Request
from wan_attn.sparse import kernel, order, steer, watch
from wan_attn.sparse.routing import Routing
from wan_attn.sparse.watch import Watch
from wan_attn.sparse.wishes import Wishes
from wan_attn.tuning import clocks
from wan_attn.workloads import WORKLOADS

pytestmark = pytest.mark.usefixtures("native", "as_in_a_new_process")

CUDA = torch.device("cuda", 0)


# --- nothing waits -------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Collects what would wait for a device: numbers that are read, and copies from memory that is
    not pinned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if is_copy and not options.get("non_blocking", False):
            devices = [x.device for x in args if isinstance(x, Tensor)]
            devices.append(options.get("device") or devices[0])
            if len({torch.device(device).type for device in devices}) > 1:
                self.found.append(str(func))
        return func(*args, **options)


@pytest.fixture(name="waits")
def waits_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Fake tensors on a device; what depends on their numbers raises."""

    def pinned(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(len(list(numbers)), dtype=dtype, device=device)

    monkeypatch.setattr(later, "to_device", pinned)  # there is no driver to pin memory
    with FakeTensorMode(), Waits() as waits:
        yield waits


def test_the_modes_of_this_test_find_what_waits(waits: Waits) -> None:
    x = torch.empty(4, device=CUDA)
    assert waits.found == []
    torch.empty(4).to(CUDA)
    assert len(waits.found) == 1
    torch.empty(4).to(CUDA, non_blocking=True)
    assert len(waits.found) == 1
    for read in (x.tolist, lambda: x[x > 0], lambda: int(x.max())):
        with pytest.raises(Exception, match=r"aten|DataDependent|DynamicOutput"):
            read()


def test_order_routing_and_lists_wait_for_nothing(waits: Waits) -> None:
    """From the operands to what the kernel is given, and what the report learns."""
    x = [torch.empty(2, 1000, 4, 64, device=CUDA, dtype=torch.bfloat16) for _ in range(3)]
    there = torch.empty(1000, dtype=torch.int64, device=CUDA)
    ordered = order.Order(there, there, 5)
    query, key, _ = order.apply(x, ordered)
    routing = Routing(query, key, [900, 800], ordered.always, is_negative=True)
    for rows in (None, [3, 5]):
        lists = routing.lists([0.5, 1.0, float("-inf"), 0.0], rows)
        count = 16 if rows is None else 2
        assert lists.counts.shape == (2, 4, count) and lists.counts.device == CUDA
        assert lists.indices.shape == (2, 4, count, 16) and lists.indices.dtype == torch.int32
        assert steer.shares_of(lists, [900, 800]).shape == (4,)
    out, lse = order.undo(query, torch.empty(2, 4, 1000, device=CUDA), ordered)
    assert out.shape == query.shape and lse is not None and lse.shape == (2, 4, 1000)
    assert kernel.make_guard(CUDA).device == CUDA

    def exact(q: Tensor, k: Tensor, v: Tensor, call: Any) -> tuple[Tensor, None]:
        return torch.empty_like(q), None

    operands = (query, key, key)
    found = sampling.errors(exact, [0, 5], ((0, 2), (2, 4)), operands, out, PLAIN)
    assert found.shape == (2,) and waits.found == []


class Untold(later.Later):
    """What a GPU has still to tell."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def is_there(self) -> bool:
        return False


def test_near_exact_waits_for_nothing(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three calls: what was lost, and the error of those that are measured, is read later."""
    ran: list[dict[str, Any]] = []

    def run(query: Tensor, key: Tensor, value: Tensor, call: Any, **how: Any) -> Any:
        ran.append(how)
        return torch.empty_like(query), None

    def dense(*_: Any) -> Any:
        raise AssertionError("it is dense")

    monkeypatch.setattr(native, "run", run)
    monkeypatch.setattr(native, "why_not", lambda *_: None)
    monkeypatch.setattr(native, "kernel_name", lambda *_: "sdpa_sm80_listed_d128")
    monkeypatch.setattr(watch, "Later", Untold)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(clocks, "mark", lambda device: None)
    watching = Watch(Wishes("near_exact", min_tokens=256))
    x = [torch.empty(1, 1000, 4, 128, device=CUDA, dtype=torch.bfloat16) for _ in range(3)]
    request = Request.from_tensors(x[0], x[1], x[2], PLAIN)
    with inside(grid=None):
        for _ in range(3):
            out, _, title = watching.run(dense, dense, request, x[0], x[1], x[2], PLAIN)
            assert out.device == CUDA and "sdpa_sm80_listed_d128, blocks left out" in title
    assert waits.found == []
    (layer,) = watching.layers.values()
    assert (layer.lossy_calls, layer.exact_calls, layer.lost_mass) == (3, 0, None)
    assert [note.counts for note in layer.pending] == [None] * 3
    assert layer.pending[0].errors is not None
    guards = [how["guard"] for how in ran if how]
    assert len(guards) == 3 and all(how.keys() == {"skip_threshold", "guard"} for how in ran if how)
    assert all(guard.shape == (5,) and guard.device == CUDA for guard in guards)
    for note, guard in zip(layer.pending, guards, strict=True):
        assert isinstance(note.guard, Untold) and note.guard.tensor is guard
        assert note.threshold == 0.05


# --- which calls are dense -----------------------------------------------------------------------


@pytest.fixture(name="card")
def card_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The kernel table is asked about a card, on which every row counts as proven."""
    if compiler() is None:
        pytest.skip("no C++ compiler (clang++ or g++)")
    gpu = Gpu(tmp_path, CARDS[89])

    def of_the_card(real: Callable[..., str | None]) -> Callable[..., str | None]:
        def asked(request: Request, *precision: int) -> str | None:
            with monkeypatch.context() as patch:
                patch.setattr(library, "load", lambda: gpu.lib)
                patch.setattr(library, "lib", lambda: gpu.lib)
                patch.setattr(cuda_driver, "_path", None)
                return real(replace(request, device=CUDA), *precision)

        return asked

    for name in ("why_not", "kernel_name"):
        monkeypatch.setattr(native, name, of_the_card(getattr(native, name)))
    return gpu


@pytest.mark.parametrize("mode", ("sparse", "near_exact"))
@pytest.mark.parametrize(
    "head_dim, dtype, why",
    (
        (64, torch.bfloat16, None),
        (64, torch.float16, None),
        (48, torch.bfloat16, "those for cuda with {} take head_dim 128, 64, got 48"),
        (64, torch.float32, "none for cuda with {} takes float32"),
    ),
)
def test_a_call_that_no_row_takes_is_dense_and_says_why_once(
    mode: str,
    head_dim: int,
    dtype: torch.dtype,
    why: str | None,
    card: Gpu,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = torch.Generator().manual_seed(0)
    x = [torch.randn(1, TOKENS, 2, head_dim, generator=made).to(dtype) for _ in range(3)]
    with caplog.at_level(logging.WARNING, logger="wan_attn"), use(mode) as used, inside():
        for _ in range(3):
            sdpa(*x)
    layer = one(used, layer=3)
    lines = [r.getMessage() for r in caplog.records if "nothing is left out" in r.getMessage()]
    if why is None:
        assert lines == []
        return
    assert layer["lossy_calls"] == 0 and layer["exact_calls"] == 3
    (line,) = lines
    what = "block lists" if mode == "sparse" else "a skip_threshold"
    assert why.format(what) in line and line.endswith("; it is dense")


@pytest.mark.parametrize("mode", ("off", "sparse", "near_exact"))
def test_doctor_and_why_name_the_kernel(mode: str, card: Gpu) -> None:
    settings = replace(config.current(), sparse=mode)
    found = doctor_sparse.facts("cuda:0", settings)
    assert found["kernel"] == "sdpa_sm80_listed_pv16_d128" and found["reason"] is None
    assert "sdpa_sm80_listed_pv16_d128" in doctor_sparse.told(found)
    call = replace(WORKLOADS["ti2v-5b-720p"], head_dim=80)
    found = doctor_sparse.facts("cuda:0", settings, Request.of(call, torch.bfloat16, CUDA))
    what = "a skip_threshold" if mode == "near_exact" else "block lists"
    those = f"those for cuda with {what} take head_dim 128, 64, got 80"
    reason = f"no kernel takes this call: {those}"
    assert found["kernel"] is None and found["reason"] == reason
    assert f"dense: {reason}" in doctor_sparse.told(found)
