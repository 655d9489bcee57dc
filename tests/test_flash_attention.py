# SPDX-License-Identifier: Apache-2.0
"""test_flash_attention.py - FlashAttention 2 and 3: what is refused, and broken installations.

What they compute is tested with every other backend in test_backends.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import standins
from calls import BF16, F32, operands
from wan_attn.backends import _flash_attention, fa2, fa3
from wan_attn.request import PLAIN, Call, Request


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    standins.reset()
    yield
    standins.reset()


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
            module.run(*operands(dtype=BF16), PLAIN)


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
        fa2.run(q, k, v, Call(q_lens=lens, k_lens=lens, return_lse=True))


def test_flash_attention_is_not_imported_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> Any:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(importlib, "import_module", never)
    assert fa2.why_not(but(device=torch.device("cpu"))) is not None
    assert fa3.why_not(but(device=torch.device("cpu"))) is not None


def test_fa3_that_returns_no_lse_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    module = standins.make_fa3()

    def out_alone(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: Any = False) -> Any:
        return torch.zeros_like(q)

    vars(module).update(flash_attn_func=out_alone)
    standins.install(monkeypatch, module, "flash_attn_interface")
    with pytest.raises(RuntimeError, match="log-sum-exp"):
        fa3.run(*operands(dtype=BF16), Call(return_lse=True))
