# SPDX-License-Identifier: Apache-2.0
"""test_backends.py - every backend keeps one contract: the same calls, the same oracle."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import standins
from calls import BF16, F16, F32, LAYOUTS, operands, poisoned
from tolerances import assert_close_to_oracle
from wan_attn.backends import (
    _common,
    _errors,
    _flash_attention,
    _ring,
    _torch_kernels,
    chunked,
    fa2,
    fa3,
    native,
    torch_sdpa,
)
from wan_attn.request import Request

Run = Callable[..., tuple[Tensor, Tensor | None]]


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    standins.reset()
    yield
    standins.reset()


def by_wrapper(method: str) -> Run:
    """The wrapper with blocks of a few rows and keys, so that small calls have many."""

    def run(*operands_: Tensor, **call: Any) -> tuple[Tensor, Tensor | None]:
        batch, seqlen_q, heads, _ = operands_[0].shape
        result = chunked.windows_flash_attention_wrapper(
            *operands_, method=method, max_elements=max(1, batch * heads) * 9 * 9, **call
        )
        return result if isinstance(result, tuple) else (result, None)

    return run


BACKENDS: dict[str, tuple[Run, Any]] = {
    "sdpa": (native.run, None),
    "torch": (torch_sdpa.run, None),
    "torch-unread": (torch_sdpa.run_unread, None),
    "wrapper": (chunked.run, None),
    "xformers": (by_wrapper("xformers"), None),
    "chunked": (by_wrapper("chunked"), None),
    "ring": (by_wrapper("ring"), None),
    "fa2": (fa2.run, ("flash_attn", standins.make_fa2)),
    "fa2-padded-lse": (
        fa2.run,
        ("flash_attn", functools.partial(standins.make_fa2, padded_lse=True)),
    ),
    "fa3": (fa3.run, ("flash_attn_interface", standins.make_fa3)),
    "fa3-package": (fa3.run, ("flash_attn_3.flash_attn_interface", standins.make_fa3)),
    "fa3-old": (fa3.run, ("flash_attn_interface", standins.make_old_fa3)),
}


def every_backend(*but: str) -> Any:
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
    "a window that cuts nothing": ({}, {"window": (1000, 1000)}),
}


def has_window(call: dict[str, Any]) -> bool:
    return call.get("window", (-1, -1)) != (-1, -1)


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


def pairs(names: list[str], *but: str) -> Any:
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
    with NoSync():
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
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def naive(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    weights = torch.softmax(scores.masked_fill(~keep, -math.inf), -1).nan_to_num(0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("which", ["torch", "torch-unread", "xformers", "chunked", "ring"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients(which: str, is_causal: bool) -> None:
    run, _ = BACKENDS[which]
    q_lens, k_lens = [9, 4], [12, 2]
    shape = {"batch": 2, "seqlen_q": 9, "seqlen_k": 12, "head_dim": 8}
    (q, k, v), lens = make(shape, {"q_lens": q_lens, "k_lens": k_lens}, F32)
    real = [x.nan_to_num(0.0).double().requires_grad_() for x in (q, k, v)]
    i, j = torch.arange(9).view(1, 1, 9, 1), torch.arange(12).view(1, 1, 1, 12)
    n_q, n_k = torch.tensor(q_lens).view(2, 1, 1, 1), torch.tensor(k_lens).view(2, 1, 1, 1)
    keep = (i < n_q) & (j < n_k)
    if is_causal:
        keep &= j <= i + n_k - n_q
    weight = torch.randn(q.shape)
    (naive(*real, keep, 8**-0.5) * weight).sum().backward()
    ours = [x.requires_grad_() for x in (q, k, v)]
    out, _ = run(*ours, is_causal=is_causal, **lens)
    (out * weight).sum().backward()
    for mine, theirs in zip(ours, real, strict=True):
        assert mine.grad is not None and mine.grad.isfinite().all()
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


# PyTorch's SDPA: which calls it gets, and which of its kernels


class Calls:
    """Records what F.scaled_dot_product_attention is called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[tuple[int, ...], bool, bool]] = []
        self.is_on = True
        real = torch.nn.functional.scaled_dot_product_attention

        def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            if self.is_on:
                shape = (query.shape[0], query.shape[2], key.shape[2])
                self.seen.append((shape, options["attn_mask"] is not None, options["is_causal"]))
            return real(query, key, value, **options)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)

    def stop(self) -> None:
        """What comes now is the judge's."""
        self.is_on = False


@pytest.mark.parametrize(
    ("call", "want"),
    [
        ({}, [((3, 20, 20), False, False)]),
        ({"is_causal": True}, [((3, 20, 20), False, True)]),
        ({"window": (50, 50)}, [((3, 20, 20), False, False)]),
        ({"k_lens": [20, 20, 20]}, [((3, 20, 20), False, False)]),
        ({"q_lens": [9, 9, 9], "k_lens": [12] * 3}, [((3, 9, 12), False, False)]),
        # 10 % of the pairs are padding: one masked call is cheaper than three.
        ({"k_lens": [20, 20, 14]}, [((3, 20, 20), True, False)]),
        # At 0.7 exactly still batched, just below it per sample.
        ({"k_lens": [20, 20, 2]}, [((3, 20, 20), True, False)]),
        ({"k_lens": [20, 20, 1]}, [((1, 20, n), False, False) for n in (20, 20, 1)]),
        ({"k_lens": [20, 0, 5]}, [((1, 20, 20), False, False), ((1, 20, 5), False, False)]),
        # Rows that see different keys: no mask for the batch would be small.
        (
            {"is_causal": True, "q_lens": [20, 19, 20], "k_lens": [20, 19, 20]},
            [((1, n, n), False, True) for n in (20, 19, 20)],
        ),
        ({"window": (2, 2)}, [((3, 20, 20), True, False)]),
    ],
)
def test_a_mask_only_where_one_is_needed(
    call: dict[str, Any], want: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, arguments = make({"batch": 3, "seqlen_q": 20, "seqlen_k": 20}, call, F32)
    calls = Calls(monkeypatch)
    torch_sdpa.run(*tensors, **arguments)
    assert calls.seen == want


def test_a_window_computes_only_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands(seqlen_q=600, seqlen_k=600, heads_q=1, head_dim=8)
    calls = Calls(monkeypatch)
    out, _ = torch_sdpa.run(q, k, v, window=(10, 0))
    calls.stop()
    assert [shape for shape, _, _ in calls.seen] == [(1, 256, 256), (1, 256, 266), (1, 88, 98)]
    assert_close_to_oracle(out, q, k, v, window=(10, 0))


F_, C_, E_, M_ = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@pytest.mark.parametrize(
    ("platform", "flash", "arch", "cudnn", "want"),
    [
        ("win32", False, (8, 9), 91900, (E_, M_)),
        ("win32", True, (8, 9), 91900, (F_, C_, E_, M_)),
        ("linux", True, (8, 6), 91900, (F_, C_, E_, M_)),
        ("linux", True, (9, 0), 91900, (C_, F_, E_, M_)),
        ("linux", True, (10, 0), 91900, (C_, F_, E_, M_)),
        ("linux", True, (9, 0), 90100, (F_, C_, E_, M_)),
        ("linux", True, (12, 0), 91900, (F_, C_, E_, M_)),
    ],
)
def test_kernel_order(
    platform: str, flash: bool, arch: tuple[int, int], cudnn: int, want: Any
) -> None:
    assert _torch_kernels.kernel_order(platform, flash, arch, cudnn) == want


def test_a_kernel_that_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch_kernels, "_refused", set())
    monkeypatch.setattr(_torch_kernels, "order_for", lambda device: (C_, M_))  # no cuDNN on a CPU
    q, k, v = operands(dtype=F32)
    calls = Calls(monkeypatch)
    outs = [torch_sdpa.run(q, k, v)[0] for _ in range(3)]
    assert len(calls.seen) == 4  # cuDNN once, math three times
    torch_sdpa.run(*operands(seqlen_q=5, dtype=F32))
    assert len(calls.seen) == 6  # another kind of call: asked again
    calls.stop()
    for out in outs:
        assert_close_to_oracle(out, q, k, v)


def test_a_kernel_that_meets_a_device_error_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(_torch_kernels, "_refused", set())
    monkeypatch.setattr(_torch_kernels, "order_for", lambda device: (F_, M_))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        torch_sdpa.run(*operands(dtype=F32))
    assert not _torch_kernels._refused


def test_kernels_that_the_user_switched_off_stay_off() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert _torch_kernels._enabled((F_, C_, E_, M_)) == [M_]


# FlashAttention: what is refused, and why

CUDA = Request(
    batch=1, seqlen_q=9, seqlen_k=9, num_heads_q=1, num_heads_k=1, head_dim=128, dtype=BF16,
    query_dtype=F32, key_dtype=F32, device=torch.device("cuda", 0),
)  # fmt: skip


def but(**changes: Any) -> Request:
    return dataclasses.replace(CUDA, **changes)


@pytest.mark.parametrize(
    ("module", "arch", "request_", "reason"),
    [
        (fa2, (8, 0), CUDA, None),
        (fa2, (12, 0), but(needs_grad=True, dropout_p=0.1), None),
        (fa2, (8, 0), but(head_dim=80, is_causal=True, window=(3, 3)), None),
        (fa2, (7, 5), CUDA, "compute capability 8.0 or newer, this is 7.5"),
        (fa2, None, CUDA, "there is none"),
        (fa2, (8, 0), but(device=torch.device("cpu")), "needs a CUDA device, the call is on cpu"),
        (fa2, (8, 0), but(dtype=F32), "float16 and bfloat16, not float32"),
        (fa2, (8, 0), but(head_dim=264), "head_dim must be at most 256, got 264"),
        (fa2, (8, 0), but(needs_grad=True, return_lse=True), "no gradient"),
        (fa3, (9, 0), CUDA, None),
        (fa3, (9, 0), but(window=(2, 2)), None),
        (fa3, (8, 0), CUDA, r"9.x \(Hopper\), this is 8.0"),
        (fa3, (12, 0), CUDA, r"9.x \(Hopper\), this is 12.0"),
        (fa3, (9, 0), but(dropout_p=0.1), "no dropout"),
    ],
)
def test_why_not(
    module: Any, arch: Any, request_: Request, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    standins.install(monkeypatch, standins.make_fa2(), "flash_attn")
    standins.install(monkeypatch, standins.make_fa3(), "flash_attn_interface")
    standins.pretend_card(monkeypatch, arch)
    said = module.why_not(request_)
    if reason is None:
        assert said is None
    else:
        assert said is not None and re.search(reason, said), said


def test_old_fa3_has_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.install(monkeypatch, standins.make_old_fa3(), "flash_attn_interface")
    standins.pretend_card(monkeypatch, (9, 0))
    assert fa3.why_not(CUDA) is None
    assert fa3.why_not(but(window=(3, 0))) == "this version has no window_size"


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.pretend_card(monkeypatch, (9, 0))
    for name in ("flash_attn", "flash_attn_interface", "flash_attn_3"):
        standins.install(monkeypatch, None, name)
    assert fa2.why_not(CUDA) == fa3.why_not(CUDA) == "not installed"
    for module in (fa2, fa3):
        with pytest.raises(RuntimeError, match="not installed"):
            module.run(*operands(dtype=BF16))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ImportError('DLL load failed while importing flash_attn_2_cuda')", "DLL load"),
        ("raise OSError('undefined symbol: _ZN3c105Error')", "OSError: undefined symbol"),
        ("import flash_attn_2_cuda_that_is_missing", "No module named"),
        ("1 / 0", "ZeroDivisionError"),
        ("flash_attn_func = 1", "has no flash_attn_func"),
    ],
)
@pytest.mark.parametrize("module", [fa2, fa3])
def test_a_broken_installation_is_a_reason(
    module: Any, text: str, reason: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "flash_attn" if module is fa2 else "flash_attn_interface"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    standins.reset()
    standins.pretend_card(monkeypatch, (9, 0))
    said = module.why_not(CUDA)
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert said is not None and reason in said, said


def test_an_old_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.install(monkeypatch, standins.make_fa2(version="2.0.9"), "flash_attn")
    standins.pretend_card(monkeypatch, (8, 0))
    assert fa2.why_not(CUDA) == "flash_attn 2.0.9 is older than 2.3"


def test_padded_lse_and_lengths_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.install(monkeypatch, standins.make_fa2(padded_lse=True), "flash_attn")
    monkeypatch.setattr(_flash_attention, "host_lengths", lambda *_: None)
    q, k, v = operands(batch=2, dtype=BF16)
    lens = torch.tensor([3, 9])
    with pytest.raises(RuntimeError, match="pads its lse"):
        fa2.run(q, k, v, q_lens=lens, k_lens=lens, return_lse=True)


def test_flash_attention_is_not_imported_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> Any:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(_flash_attention.importlib, "import_module", never)
    assert fa2.why_not(but(device=torch.device("cpu"))) is not None
    assert fa3.why_not(but(device=torch.device("cpu"))) is not None


def test_fa3_that_returns_no_lse_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    module = standins.make_fa3()
    module.flash_attn_func = lambda q, k, v, softmax_scale=None, causal=False: torch.zeros_like(q)
    standins.install(monkeypatch, module, "flash_attn_interface")
    with pytest.raises(RuntimeError, match="log-sum-exp"):
        fa3.run(*operands(dtype=BF16), return_lse=True)


# When PyTorch would store every score


@pytest.mark.parametrize(
    ("request_", "arch", "flash", "reason"),
    [
        (CUDA, (8, 0), True, None),
        (CUDA, (7, 5), False, "bfloat16 on compute capability 7.x"),
        (but(dtype=F16), (7, 5), False, None),
        (but(dtype=F16, head_dim=66), (7, 5), False, "head_dim % 4"),
        (but(head_dim=84), (8, 6), False, "head_dim % 8"),
        (but(head_dim=84), (8, 6), True, None),
        (but(dtype=F32, head_dim=66), (8, 6), True, "head_dim % 4"),
        (but(dtype=torch.float64), (8, 0), True, "float64"),
        (CUDA, None, True, None),
        (but(device=torch.device("cpu")), None, False, None),
        (but(device=torch.device("cpu"), dropout_p=0.1), None, False, "dropout"),
        (but(device=torch.device("mps")), None, False, None),
    ],
)
def test_needs_square_memory(
    request_: Request, arch: Any, flash: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    standins.pretend_card(monkeypatch, arch)
    monkeypatch.setattr(_torch_kernels, "has_flash", lambda: flash)
    said = torch_sdpa.needs_square_memory(request_)
    assert said is None if reason is None else said is not None and reason in said, said


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
