# SPDX-License-Identifier: Apache-2.0
"""test_log.py - the three lines that users grep for: their text, and that each comes once."""

from __future__ import annotations

import dataclasses
import io
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import standins
from calls import BF16, F16, F32, operands
from wan_attn import config, log
from wan_attn.attention import flash_attention, sdpa
from wan_attn.backends import native
from wan_attn.config import Settings
from wan_attn.request import Call, Request
from wan_attn.selection.choose import select


@pytest.fixture(autouse=True)
def _reset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in config.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    standins.reset()
    yield
    standins.reset()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG, logger="wan_attn")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "wan_attn"]


SEED = Request(
    batch=1, seqlen_q=12096, seqlen_k=12096, num_heads_q=24, num_heads_k=24, head_dim=128,
    dtype=F16, query_dtype=F16, key_dtype=F16, device=torch.device("cuda", 0),
)  # fmt: skip


def test_the_lines_of_the_contract() -> None:
    reason = "Flash Attention not available"
    got = log.describe("PyTorch SDPA", "sdpa", reason, SEED, 12096 * 12096)
    assert got == (
        "Using PyTorch SDPA (Flash Attention not available), dropout=disabled (inference)",
        "Config: backend=sdpa, dtype=fp16, mode=inference, shape=[B=1, Lq=12096, Lk=12096],"
        " dropout=0",
        "Computation: actual=146313216, batch=146313216, ratio=1.00",
    )


def test_training_padding_and_device_lengths() -> None:
    request = dataclasses.replace(SEED, batch=2, dtype=BF16, needs_grad=True, dropout_p=0.1)
    using, config_line, computation = log.describe("X", "torch", "", request, 12096 * 6048)
    assert using == "Using X, dropout=0.1 (training)"
    assert "dtype=bf16, mode=training" in config_line and config_line.endswith("dropout=0.1")
    assert computation == "Computation: actual=73156608, batch=292626432, ratio=0.25"
    computation = log.describe("X", "torch", "", request, None)[2]
    assert computation == (
        "Computation: actual=? (lengths are on the device), batch=292626432, ratio=?"
    )
    empty = dataclasses.replace(SEED, seqlen_q=0)
    assert log.describe("X", "torch", "", empty, 0)[2].endswith("actual=0, batch=0, ratio=1.00")


def test_a_call_says_what_ran_and_says_it_once(lines: Any) -> None:
    q, k, v = operands(batch=2, seqlen_q=10, seqlen_k=20, dtype=BF16)
    for _ in range(3):
        flash_attention(q, k, v, k_lens=torch.tensor([20, 5]))
    using, *rest = lines()
    request = Request.from_tensors(q, k, v, Call(k_lens=torch.tensor([20, 5])))
    refusal = native.why_not(request)  # there is a native library, or WAN_ATTN_BINDING=torch
    who = (
        f"wan_attn SDPA ({native.kernel_name(request)})"
        if refusal is None
        else f"PyTorch SDPA (wan_attn SDPA: {refusal})"
    )
    assert using == f"[Attention] Using {who}, dropout=disabled (inference)"
    assert rest == [
        f"[Attention] Config: backend={'torch' if refusal else 'sdpa'}, dtype=bf16, mode=inference,"
        " shape=[B=2, Lq=10, Lk=20], dropout=0",
        "[Attention] Computation: actual=250, batch=400, ratio=0.62",
    ]
    sdpa(q, k, v)  # without lengths: another configuration
    assert len(lines()) == 6


def test_dropout_without_grad_is_said_to_be_disabled(lines: Any) -> None:
    q, k, v = operands(dtype=BF16)
    with torch.no_grad():
        flash_attention(q, k, v, dropout_p=0.5)
    assert lines()[0].endswith("dropout=disabled (inference)")


def test_training_is_said(lines: Any) -> None:
    q, k, v = operands(dtype=F32)
    for _ in range(2):
        sdpa(q.requires_grad_(), k, v)
    assert len(lines()) == 3
    row = native.kernel_name(Request.from_tensors(q, k, v))
    told = f"{row}; gradients: {native.gradient_name(Request.from_tensors(q, k, v))}"
    assert lines()[0].startswith(f"[Attention] Using wan_attn SDPA ({told})")
    assert lines()[0].endswith("dropout=0 (training)")


def test_training_with_dropout_names_the_reason(lines: Any) -> None:
    q, k, v = operands(dtype=BF16)
    flash_attention(q.requires_grad_(), k, v, dropout_p=0.5)
    assert lines()[0] == (
        "[Attention] Using PyTorch SDPA (wan_attn SDPA: has no dropout), dropout=0.5 (training)"
    )


@pytest.mark.parametrize(
    ("env", "reasons"),
    [
        ({}, "Flash Attention not available; wan_attn SDPA: no cuda row"),
        (
            {"DISABLE_FLASH_ATTN": "1"},
            "Flash Attention disabled by DISABLE_FLASH_ATTN=1; wan_attn SDPA: no cuda row",
        ),
        ({"USE_ATTENTION_BACKEND": "torch"}, "USE_ATTENTION_BACKEND=torch"),
        ({"USE_SDPA": "1"}, "wan_attn SDPA: no cuda row"),
        (
            {"USE_ATTENTION_BACKEND": "fa2"},
            "Flash Attention 2: not installed; wan_attn SDPA: no cuda row",
        ),
    ],
)
def test_reasons(env: dict[str, str], reasons: str, monkeypatch: pytest.MonkeyPatch) -> None:
    standins.pretend_card(monkeypatch, (9, 0))
    monkeypatch.setattr("wan_attn.selection.choose.CARDS", {})  # ours are asked first
    for name in ("flash_attn", "flash_attn_interface", "flash_attn_3"):
        standins.install(monkeypatch, None, name)
    monkeypatch.setattr(native, "why_not", lambda request: "no\n  cuda   row")
    choice = select(SEED, Settings.from_env(env))
    assert (choice.backend, choice.reasons()) == ("torch", reasons)


def test_one_reason_for_each_flash_attention_where_they_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standins.install(monkeypatch, None, "flash_attn_interface")
    standins.install(monkeypatch, None, "flash_attn_3")
    standins.install(monkeypatch, standins.make_fa2(version="2.0"), "flash_attn")
    standins.pretend_card(monkeypatch, (9, 0))
    monkeypatch.setattr("wan_attn.selection.choose.CARDS", {})  # ours are asked first
    monkeypatch.setattr(native, "why_not", lambda request: None)
    monkeypatch.setattr(native, "kernel_name", lambda request: "sdpa_sm90_f16_d128")
    choice = select(SEED, Settings())
    assert choice.title == "wan_attn SDPA (sdpa_sm90_f16_d128)"
    assert choice.reasons() == (
        "Flash Attention 3: not installed; Flash Attention 2: flash_attn 2.0 is older than 2.3"
    )


def test_a_fallback_from_a_named_backend_is_a_warning(
    lines: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "fa2")
    flash_attention(*operands(dtype=BF16))
    assert "Flash Attention 2: needs a CUDA device" in lines()[0]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_enable_shows_the_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # pytest's own count as the program's
    try:
        q, k, v = operands(dtype=BF16)
        flash_attention(q, k, v)
        assert capsys.readouterr().err == ""
        log.enable()
        log.enable()
        flash_attention(q, k, v, k_lens=torch.tensor([9]))
        shown = capsys.readouterr().err.splitlines()
        assert len(shown) == 3 and all(line.startswith("[Attention] ") for line in shown)
        assert re.match(r"\[Attention\] Using ", shown[0])
        log.enable("warning")
        flash_attention(q, k, v, k_lens=torch.tensor([9]), causal=True)
        log.disable()
        flash_attention(q, k, v, k_lens=torch.tensor([9]), window_size=(3, 3))
        assert capsys.readouterr().err == ""
        assert log.LOGGER.level == logging.NOTSET and log._handler not in log.LOGGER.handlers
    finally:
        root.handlers = handlers


def test_a_program_that_logs_does_not_see_the_lines_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """generate.py calls logging.basicConfig after patch()."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, root.handlers = root.handlers, []
    try:
        log.enable()
        root.addHandler(logging.StreamHandler(stream))
        flash_attention(*operands(dtype=BF16))
        assert capsys.readouterr().err == ""
        assert len(stream.getvalue().splitlines()) == 3
    finally:
        root.handlers = handlers


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "off"])
def test_every_level_of_the_variable(level: str) -> None:
    log.enable(level)
    assert log.LOGGER.isEnabledFor(logging.INFO) == (level in ("debug", "info"))
    assert log.LOGGER.isEnabledFor(logging.CRITICAL) == (level != "off")


def test_shapes_that_never_repeat_stop_being_described(
    lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_SAID_MAX", 2)
    for length in range(2, 8):
        log.configuration("X", "x", "", dataclasses.replace(SEED, seqlen_q=length), None)
    using = [line for line in lines() if "Using" in line]
    assert using[:2] == ["[Attention] Using X, dropout=disabled (inference)"] * 2
    assert using[2:] == [
        f"{using[0]} (too many different calls: no more of them will be described)"
    ]


def test_what_is_no_description_is_never_kept_back(
    lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_SAID_MAX", 3)
    for length in range(2, 8):
        log.configuration("X", "x", "", dataclasses.replace(SEED, seqlen_q=length), None)
    before = len(lines())
    for _ in range(2):
        for number in range(2):
            log.once(number, logging.WARNING, f"backend {number} failed")
        for length in (9, 10):
            other = dataclasses.replace(SEED, seqlen_q=length)
            log.configuration("Y", "y", "no x here", other, None, logging.WARNING)
    assert lines()[before:] == [
        "[Attention] backend 0 failed",
        "[Attention] backend 1 failed",
        "[Attention] Using Y (no x here), dropout=disabled (inference)",
    ]
    for number in range(20):
        log.once(("new", number), logging.WARNING, f"warning {number}")
    assert lines()[-20:] == [f"[Attention] warning {number}" for number in range(20)]
    assert len(log._said) <= 3


def test_torch_compile_line(lines: Any) -> None:
    log.compile_enabled()
    log.compile_enabled()
    assert lines() == ["[Attention] torch.compile enabled for optimization"]
