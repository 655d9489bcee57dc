# SPDX-License-Identifier: Apache-2.0
"""test_tuning_gradients.py - calls that want a gradient are measured with it, ahead of time alone,
and obey what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calls import F32, operands
from wan_attn import config
from wan_attn.__main__ import main
from wan_attn.backends import native, torch_sdpa
from wan_attn.request import Call, Request
from wan_attn.selection import choose
from wan_attn.tuning import candidates, measure, slices, turn
from wan_attn.tuning.candidates import Candidate
from wan_attn.workloads import parse_shape

SHAPE = "1x288x2x64"
WANTS = Request.of(parse_shape(SHAPE), F32, "cpu", needs_grad=True)


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_settings: None) -> None:
    monkeypatch.setenv("WAN_ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("WAN_ATTN_TUNE", "auto")
    config.forget()


@pytest.mark.usefixtures("native")
def test_tune_measures_forward_and_its_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["--shape", SHAPE, "--dtype", "fp32", "--device", "cpu"]
    assert choose.select(WANTS, config.current()).entry is None
    assert main(["why", *plain, "--grad", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["measured"]
    assert told.startswith("nothing: a call that wants a gradient is measured ahead of time")
    assert main(["tune", "--grad", *plain, "--json"]) == 0
    (call,) = json.loads(capsys.readouterr().out)["calls"]
    assert call["way"] == "plain" and call["chosen"] in call["times_ms"]
    names = {name.partition(":")[0] for name in call["times_ms"]}
    assert names == {"sdpa", "torch"} and not call["left_out"]
    config.forget()
    choice = choose.select(WANTS, config.current())
    assert choice.is_measured and choice.candidate.name == call["chosen"]
    assert main(["why", *plain, "--grad", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["measured"]
    assert told.endswith(f"--shape {SHAPE} --grad")
    without = choose.select(Request.of(parse_shape(SHAPE), F32, "cpu"), config.current())
    assert without.entry is None, "another kind"


def test_no_call_waits_for_a_measurement() -> None:
    """Activation checkpoints run a call twice: another kernel must not be chosen in between."""
    both = (Candidate("sdpa"), Candidate("torch"))
    assert turn.turn_for(WANTS, both, None) is None
    plain = Request.of(parse_shape(SHAPE), F32, "cpu")
    assert turn.turn_for(plain, both, None) is not None


def test_gradients_are_computed_and_left_behind() -> None:
    query, key, value = operands(seqlen_q=70, seqlen_k=90, dtype=F32)
    ran: list[str] = []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ran.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            ran.append("backward")
            return grad

    def run(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Any:
        out, lse = torch_sdpa.run(query, key, value, call)
        return Marked.apply(out), lse

    with torch.no_grad():
        out, lse = candidates._and_gradients(run, query, key, value, Call())
    assert ran == ["forward", "backward"] and lse is None and not out.requires_grad
    assert not any(x.requires_grad or x.grad is not None for x in (query, key, value))


def test_one_whose_gradient_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Any:
        out, _ = torch_sdpa.run(query, key, value, call)
        return out.detach(), None  # which autograd cannot follow

    monkeypatch.setattr(native, "run", run)
    both = (Candidate("torch"), Candidate("sdpa", "sdpa_ref"))
    given = (*operands(seqlen_q=288, seqlen_k=288, dtype=F32), Call())
    part = slices.choose(WANTS, 1.0)
    figures = measure.measure(both, WANTS, given, part)
    assert "torch" in figures.times and "failed" in figures.left_out["sdpa:sdpa_ref"]
