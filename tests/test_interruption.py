# SPDX-License-Identifier: Apache-2.0
"""test_interruption.py - what a signal handler raises during a call reaches its owner, and is not
held against a backend."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import wan_attn
from calls import F32, operands
from wan_attn import config
from wan_attn.backends import REGISTRY, _flash_attention, _torch_kernels, native
from wan_attn.native import cuda_driver
from wan_attn.native.interruption import is_interruption
from wan_attn.selection import run
from wan_attn.signatures import _masked

ERRORS = (TimeoutError, OSError, RuntimeError, ValueError, AssertionError, KeyError)
SIGNAL = signal.SIGINT  # every system has it


class Object:
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __call__(self, number: int, frame: Any) -> None:
        raise self.error("time is up")

    def once(self, number: int, frame: Any) -> None:
        """As those that put back what was there before."""
        signal.signal(SIGNAL, signal.SIG_IGN)
        raise self.error("time is up")

    def loose(self, *args: Any) -> None:
        signal.signal(SIGNAL, signal.SIG_IGN)
        raise self.error("time is up")

    def more(self, text: str, number: int, frame: Any) -> None:
        raise self.error(text)


def handlers(error: type[Exception]) -> dict[str, Callable[..., Any]]:
    one = Object(error)
    partial = functools.partial(one.more, "time is up")
    return {"object": one, "once": one.once, "loose": one.loose, "partial": partial}


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    before = signal.getsignal(SIGNAL)
    config.forget()
    yield
    signal.signal(SIGNAL, before)
    config.forget()


@pytest.mark.parametrize("kind", ["object", "once", "loose", "partial"])
@pytest.mark.parametrize("error", ERRORS)
def test_it_arrives_and_the_backend_stays(
    error: type[Exception], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = REGISTRY["sdpa"].run, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            signal.raise_signal(SIGNAL)
        return plain(*args)

    monkeypatch.setattr(native, "why_not", lambda request: None)
    monkeypatch.setattr(REGISTRY["sdpa"], "run", interrupted)
    signal.signal(SIGNAL, handlers(error)[kind])
    q, k, v = operands(dtype=F32)
    with pytest.raises(error, match="time is up"):
        wan_attn.sdpa(q, k, v)
    wan_attn.sdpa(q, k, v)
    assert len(calls) == 2


def test_a_kernel_of_torchs_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> Tensor:
        signal.raise_signal(SIGNAL)
        return torch.zeros(())

    signal.signal(SIGNAL, Object(RuntimeError))
    order = (_torch_kernels.SDPBackend.FLASH_ATTENTION, _torch_kernels.SDPBackend.MATH)
    monkeypatch.setattr(_torch_kernels, "order_for", lambda device: order)
    monkeypatch.setattr(_torch_kernels, "SDPA", interrupted)
    q, k, v = (x.transpose(1, 2) for x in operands(dtype=F32, heads_q=1, heads_k=1))
    with pytest.raises(RuntimeError, match="time is up"):
        _torch_kernels.attend(q, k, v, None, False, 1.0, 0.0)
    assert not _torch_kernels._refused


def test_while_operands_and_masks_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's own RuntimeError is an answer: this tensor has no strides, that mask no fit."""

    class Operand:
        def stride(self, dim: int) -> int:
            signal.raise_signal(SIGNAL)
            return 1

    signal.signal(SIGNAL, Object(RuntimeError))
    with pytest.raises(RuntimeError, match="time is up"):
        run._readable(*[Operand()] * 3)  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "broadcast_shapes", lambda *_: signal.raise_signal(SIGNAL))
    q, k, v = (x.transpose(1, 2) for x in operands(dtype=F32, heads_q=1, heads_k=1))
    with pytest.raises(RuntimeError, match="time is up"):
        _masked.attend(q, k, v, torch.ones(1, dtype=torch.bool), None, "mask")


def test_while_flash_attention_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(SIGNAL, Object(TimeoutError))
    monkeypatch.setattr(
        _flash_attention.importlib, "import_module", lambda name: signal.raise_signal(SIGNAL)
    )
    with pytest.raises(TimeoutError):
        _flash_attention.load("flash_attn")


def test_while_a_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(SIGNAL, Object(TimeoutError))
    monkeypatch.setattr(cuda_driver.images, "image", lambda *_: signal.raise_signal(SIGNAL) or b"")
    text = (cuda_driver.ctypes.c_char * 100)()
    assert cuda_driver._find_image(b"row", 80, None, None, text, 100) == 1
    with pytest.raises(TimeoutError, match="time is up"):
        cuda_driver.raise_interruption()


def test_what_a_backend_raises_is_none() -> None:
    try:
        raise RuntimeError("kernel exploded")
    except RuntimeError as error:
        assert not is_interruption(error)
    assert is_interruption(KeyboardInterrupt())
