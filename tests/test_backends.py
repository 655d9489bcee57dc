# SPDX-License-Identifier: Apache-2.0
"""test_backends.py - every backend keeps one contract: the same calls, the same oracle."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import standins
from calls import BF16, F16, F32, LAYOUTS, operands, poisoned
from tolerances import assert_close_to_oracle
from wan_attn.backends import (
    _common,
    _errors,
    _flash_attention,
    _ring,
    chunked,
    fa2,
    fa3,
    native,
    torch_sdpa,
)
from wan_attn.request import Call

Run = Callable[..., tuple[Tensor, Tensor | None]]


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    standins.reset()
    yield
    standins.reset()


def by(backend: Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor | None]]) -> Run:
    return lambda query, key, value, **call: backend(query, key, value, Call(**call))


def by_wrapper(method: str) -> Run:
    """The wrapper with blocks of a few rows and keys, so that small calls have many."""

    def run(*operands_: Tensor, **call: Any) -> tuple[Tensor, Tensor | None]:
        batch, _, heads, _ = operands_[0].shape
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunked, "FUSED_ROWS", 5)
            result = chunked.windows_flash_attention_wrapper(
                *operands_, method=method, max_elements=max(1, batch * heads) * 9 * 9, **call
            )
        return result if isinstance(result, tuple) else (result, None)

    return run


BACKENDS: dict[str, tuple[Run, Any]] = {
    "sdpa": (by(native.run), None),
    "torch": (by(torch_sdpa.run), None),
    "torch-unread": (by(torch_sdpa.run_unread), None),
    "wrapper": (by(chunked.run), None),
    "rows": (by_wrapper("rows"), None),
    "chunked": (by_wrapper("chunked"), None),
    "ring": (by_wrapper("ring"), None),
    "fa2": (by(fa2.run), ("flash_attn", standins.make_fa2)),
    "fa2-padded-lse": (
        by(fa2.run),
        ("flash_attn", functools.partial(standins.make_fa2, padded_lse=True)),
    ),
    "fa3": (by(fa3.run), ("flash_attn_interface", standins.make_fa3)),
    "fa3-package": (by(fa3.run), ("flash_attn_3.flash_attn_interface", standins.make_fa3)),
    "fa3-old": (by(fa3.run), ("flash_attn_interface", standins.make_old_fa3)),
}


def every_backend(*but: str) -> pytest.MarkDecorator:
    """Parametrises `backend` by all of BACKENDS that do not begin with one of these."""
    names = [name for name in BACKENDS if not name.startswith(but)] if but else list(BACKENDS)
    return pytest.mark.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    _, module = BACKENDS[request.param]
    if module is not None:
        if "_3." in module[0]:
            standins.install(monkeypatch, None, "flash_attn_interface")
        standins.install(monkeypatch, module[1](), module[0])
    return str(request.param)


# name: (shape, call). Lengths are ints per sample; what lies beyond them is NaN.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "one by one": ({"seqlen_q": 1, "seqlen_k": 1}, {}),
    "one key": ({"seqlen_k": 1}, {}),
    "one query, causal": ({"seqlen_q": 1}, {"is_causal": True}),
    "batch": ({"batch": 3}, {}),
    "grouped heads": ({"batch": 2, "heads_q": 4, "heads_k": 2}, {"k_lens": [33, 20]}),
    "head_dim of CLIP": ({"head_dim": 80}, {}),
    "scale": ({}, {"scale": 0.3}),
    "negative scale": ({}, {"scale": -0.2, "is_causal": True}),
    "scale of zero": ({}, {"scale": 0.0, "k_lens": [30]}),
    "all lengths full": ({"batch": 2}, {"q_lens": [17, 17], "k_lens": [33, 33]}),
    "one sample, shorter": ({}, {"q_lens": [11], "k_lens": [20]}),
    "all equally shorter": ({"batch": 2}, {"q_lens": [11, 11], "k_lens": [20, 20]}),
    "slightly ragged": ({"batch": 3}, {"q_lens": [17, 16, 17], "k_lens": [33, 30, 31]}),
    "very ragged": ({"batch": 3}, {"q_lens": [17, 2, 5], "k_lens": [1, 33, 4]}),
    "ragged keys": ({"batch": 3}, {"k_lens": [1, 33, 4]}),
    "ragged queries": ({"batch": 3}, {"q_lens": [1, 17, 4]}),
    "a sample without queries": ({"batch": 2}, {"q_lens": [0, 17]}),
    "a sample without keys": ({"batch": 2}, {"k_lens": [0, 33]}),
    "no keys at all": ({"batch": 2}, {"k_lens": [0, 0]}),
    "no queries at all": ({"batch": 2}, {"q_lens": [0, 0]}),
    "causal, square": ({"seqlen_q": 33}, {"is_causal": True}),
    "causal, more keys": ({}, {"is_causal": True}),
    "causal, more queries": ({"seqlen_q": 40, "seqlen_k": 13}, {"is_causal": True}),
    "causal, ragged": (
        {"batch": 3, "seqlen_q": 33},
        {"is_causal": True, "q_lens": [33, 5, 20], "k_lens": [33, 20, 5]},
    ),
    "window": ({"seqlen_q": 33}, {"window": (4, 3)}),
    "window to the left": ({"seqlen_q": 33}, {"window": (4, -1)}),
    "window to the right": ({"seqlen_q": 40, "seqlen_k": 13}, {"window": (-1, 2)}),
    "only the diagonal": ({"seqlen_q": 33}, {"window": (0, 0)}),
    "window and causal": ({}, {"window": (5, 7), "is_causal": True}),
    "window, ragged": (
        {"batch": 3, "seqlen_q": 33},
        {"window": (3, 2), "q_lens": [33, 9, 30], "k_lens": [30, 33, 3]},
    ),
    "a window that just cuts": ({"seqlen_q": 33}, {"window": (31, 31)}),
    "a window that cuts nothing": ({}, {"window": (1000, 1000)}),
}


def has_window(call: dict[str, Any]) -> bool:
    return bool(call.get("window", (-1, -1)) != (-1, -1))


def make(
    shape: dict[str, Any], call: dict[str, Any], dtype: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    q, k, v = operands(**shape, dtype=dtype)
    call = dict(call)
    if "q_lens" in call:
        q, call["q_lens"] = poisoned(q, call["q_lens"]), torch.tensor(call["q_lens"])
    if "k_lens" in call:
        k, v = poisoned(k, call["k_lens"]), poisoned(v, call["k_lens"])
        call["k_lens"] = torch.tensor(call["k_lens"], dtype=torch.int32)
    return [q, k, v], call


def pairs(names: list[str], *but: str) -> pytest.MarkDecorator:
    """Parametrises backend and call; the FlashAttention 3 of 2024 refuses windows."""
    taken = [
        (backend, name)
        for backend in BACKENDS
        for name in names
        if not (backend == "fa3-old" and has_window(CALLS[name][1])) and backend not in but
    ]
    return pytest.mark.parametrize(("backend", "name"), taken, indirect=["backend"])


@pairs(list(CALLS))
def test_contract(backend: str, name: str) -> None:
    run, _ = BACKENDS[backend]
    shape, call = CALLS[name]
    dtypes = (BF16, F16) if backend.startswith("fa") else (BF16, F32)
    for dtype in dtypes:
        tensors, arguments = make(shape, call, dtype)
        out, lse = run(*tensors, **arguments, return_lse=True)
        assert lse is not None
        assert_close_to_oracle(out, *tensors, lse=lse, **arguments)
        alone, none = run(*tensors, **arguments)
        assert none is None
        assert_close_to_oracle(alone, *tensors, **arguments)
        again, _ = run(*tensors, **arguments)
        assert torch.equal(alone, again)


@every_backend()
@pytest.mark.parametrize("dtypes", [(F32, F32, BF16), (F32, F32, F16), (BF16, F32, BF16)])
def test_float32_beside_half(backend: str, dtypes: Any) -> None:
    run, _ = BACKENDS[backend]
    tensors, arguments = make({"batch": 2}, {"k_lens": [33, 21]}, dtypes)
    out, _ = run(*tensors, **arguments)
    assert_close_to_oracle(out, *tensors, **arguments)


@every_backend()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    run, _ = BACKENDS[backend]
    tensors, arguments = make({"batch": 2}, {"k_lens": [33, 21]}, BF16)
    out, _ = run(*[layout(x) for x in tensors], **arguments)
    assert_close_to_oracle(out, *tensors, **arguments)


@every_backend()
@pytest.mark.parametrize("shape", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}])
def test_nothing_to_do(backend: str, shape: dict[str, int]) -> None:
    run, _ = BACKENDS[backend]
    q, k, v = operands(**shape, dtype=BF16)
    out, lse = run(q, k, v, return_lse=True)
    assert out.shape == q.shape and lse is not None and torch.count_nonzero(out) == 0
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and (lse == -math.inf).all()


@every_backend("fa")  # whose stand-ins take NaN for padding
def test_nan_in_a_real_key_stays_visible(backend: str) -> None:
    run, _ = BACKENDS[backend]
    q, k, v = operands(batch=2, dtype=F32)
    v[1, 3, 0, 0] = math.nan
    out, _ = run(q, k, v)
    assert out[1, :, 0, 0].isnan().all() and out[0].isfinite().all()


class NoSync(TorchDispatchMode):
    """Fails where the host would wait for the device to know a value."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN:
            raise AssertionError(f"{name} reads a value on the host")
        return func(*args, **(kwargs or {}))


LENGTHS = [name for name, (_, call) in CALLS.items() if {"q_lens", "k_lens"} & set(call)]


# Ours reads them in C, on the device; the padded lse of old FlashAttention cannot be put back.
@pairs(LENGTHS, "sdpa", "fa2-padded-lse")
def test_lengths_on_a_device(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for CUDA lengths, which may not be read: here every length is declared unreadable."""
    run, _ = BACKENDS[backend]
    shape, call = CALLS[name]
    tensors, arguments = make(shape, call, BF16)

    def unreadable(name: str, lengths: Tensor | None, batch: int, seqlen: int) -> Any:
        return None if lengths is not None else [seqlen] * batch

    for module in (torch_sdpa, _ring, _flash_attention):
        monkeypatch.setattr(module, "host_lengths", unreadable)
    with NoSync():  # type: ignore[no-untyped-call] # torch's
        if backend.startswith("fa"):
            monkeypatch.setattr(standins, "packed", outside_modes(standins.packed))
            monkeypatch.setattr(standins, "dense", outside_modes(standins.dense))
        out, lse = run(*tensors, **arguments, return_lse=True)
    assert_close_to_oracle(out, *tensors, lse=lse, **arguments)


def outside_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The stand-in itself may read what it likes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return function(*args, **kwargs)

    return call


@every_backend()
def test_a_length_out_of_range_is_refused(backend: str) -> None:
    run, _ = BACKENDS[backend]
    q, k, v = operands(batch=2, dtype=BF16)
    if backend == "torch-unread":
        out, _ = run(q, k, v, k_lens=torch.tensor([33, 99]))
        assert_close_to_oracle(out, q, k, v)
        return
    for lens in ([33, 34], [-1, 33]):
        with pytest.raises(
            RuntimeError, match=r"k_lens must be between 0 and the padded length 33"
        ):
            run(q, k, v, k_lens=torch.tensor(lens))


@every_backend("fa")  # which computes in half precision anyway
def test_outside_the_callers_autocast(backend: str) -> None:
    run, _ = BACKENDS[backend]
    q, k, v = operands(batch=2, dtype=F32)
    want = run(q, k, v, k_lens=torch.tensor([33, 30]), return_lse=True)
    with torch.autocast("cpu", dtype=BF16):
        got = run(q, k, v, k_lens=torch.tensor([33, 30]), return_lse=True)
    for a, b in zip(got, want, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def naive(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    weights = torch.softmax(scores.masked_fill(~keep, -math.inf), -1).nan_to_num(0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("which", ["torch", "torch-unread", "rows", "chunked", "ring"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients(which: str, is_causal: bool) -> None:
    run, _ = BACKENDS[which]
    q_lens, k_lens = [9, 4], [12, 2]
    shape = {"batch": 2, "seqlen_q": 9, "seqlen_k": 12, "head_dim": 8}
    (q, k, v), lens = make(shape, {"q_lens": q_lens, "k_lens": k_lens}, F32)
    a, b, c = (x.nan_to_num(0.0).double().requires_grad_() for x in (q, k, v))
    i, j = torch.arange(9).view(1, 1, 9, 1), torch.arange(12).view(1, 1, 1, 12)
    n_q, n_k = torch.tensor(q_lens).view(2, 1, 1, 1), torch.tensor(k_lens).view(2, 1, 1, 1)
    keep = (i < n_q) & (j < n_k)
    if is_causal:
        keep &= j <= i + n_k - n_q
    weight = torch.randn(q.shape)
    (naive(a, b, c, keep, 8**-0.5) * weight).sum().backward()
    ours = [x.requires_grad_() for x in (q, k, v)]
    out, _ = run(*ours, is_causal=is_causal, **lens)
    (out * weight).sum().backward()
    for mine, theirs in zip(ours, (a, b, c), strict=True):
        assert mine.grad is not None and mine.grad.isfinite().all()
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@every_backend("sdpa")
@pytest.mark.parametrize("lens", [{"k_lens": [0, 0]}, {"q_lens": [0, 0]}])
def test_a_call_that_sees_nothing_has_a_gradient_of_zero(backend: str, lens: Any) -> None:
    run, _ = BACKENDS[backend]
    tensors, arguments = make({"batch": 2}, lens, BF16)
    tensors = [x.requires_grad_() for x in tensors]
    out, _ = run(*tensors, **arguments)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.eq(0).all() for x in tensors)


@pytest.mark.parametrize(
    ("error", "is_device"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("HIP error: invalid device function"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: no kernel image is available for execution"), False),
        (RuntimeError("there is no usable NVIDIA driver: CUDA_ERROR (out of memory)"), False),
        (RuntimeError("No available kernel. Aborting execution."), False),
        (TypeError("unexpected keyword argument 'window_size'"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_device_errors(error: Exception, is_device: bool) -> None:
    assert _errors.is_device_error(error) is is_device


def test_accelerator_error_is_a_device_error() -> None:
    kind = getattr(torch, "AcceleratorError", None)
    if kind is None:
        pytest.skip("this torch has none")
    assert _errors.is_device_error(kind.__new__(kind))


def test_capability_without_a_card() -> None:
    assert _common.capability(torch.device("cpu")) is None
