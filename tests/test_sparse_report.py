# SPDX-License-Identifier: Apache-2.0
"""test_sparse_report.py - who asks for blocks to be left out, and what is told at the end."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_calls import inside, near, one, sdpa, use
from tolerances import off
from wan_attn import config, sparse
from wan_attn.__main__ import main
from wan_attn.request import Request
from wan_attn.sparse import report, state, steer
from wan_attn.workloads import WORKLOADS

pytestmark = pytest.mark.usefixtures("native", "as_in_a_new_process")


# --- who asks ------------------------------------------------------------------------------------


def test_the_environment_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WAN_ATTN_SPARSE", "sparse")
    config.refresh()
    watch = state.uses.active
    assert watch is not None and watch.wishes.budget == 0.05
    for tokens, is_taken in ((11_999, False), (12_000, True)):
        shape = replace(WORKLOADS["ti2v-5b-720p"], seqlen_q=tokens, seqlen_k=tokens)
        request = Request.of(shape, torch.float32, "cpu")
        assert (watch.wishes.why_not(request) is None) == is_taken
    monkeypatch.setenv("WAN_ATTN_ERROR_BUDGET", "0.1")
    config.refresh()
    assert state.uses.active is not None and state.uses.active.wishes.budget == 0.1
    monkeypatch.setenv("WAN_ATTN_SPARSE_PROFILE", str(tmp_path / "none.json"))
    config.refresh()
    with pytest.raises(config.ConfigError, match="WAN_ATTN_SPARSE_PROFILE must be a JSON file"):
        sdpa(*near())
    monkeypatch.setenv("WAN_ATTN_SPARSE", "off")
    config.refresh()
    assert state.uses.active is None
    sdpa(*near())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mode": "best"}, "mode must be one of off, near_exact, sparse, got 'best'"),
        ({"budget": 1.0}, "budget must be between 0 and 1, got 1.0"),
        ({"tau": "x"}, "tau must be a number"),
        ({"threshold": 0.06}, "threshold must be above 0 and at most 0.05, got 0.06"),
        ({"min_tokens": -1}, "min_tokens must be at least 0"),
        ({"dense_steps": 1.5}, "dense_steps must be between 0 and 1, got 1.5"),
        ({"always": [(3, 2)]}, "always must be at least 3"),
        ({"always": [7]}, "always must be pairs"),
        ({"profile": "/no/such"}, "profile must be a JSON file, got '/no/such'"),
        ({"profile": {"kind": "precision"}}, "profile must be a sparse report"),
    ],
)
def test_use_refuses(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match="^wan_attn: ") as caught:
        sparse.use(**asked)
    assert said in str(caught.value) and state.uses.active is None


# --- the report ----------------------------------------------------------------------------------


def test_a_report_can_start_the_next_run(tmp_path: Path) -> None:
    x = near()
    with use(budget=0.05) as used:
        for layer in (0, 3):
            with inside(layer=layer):
                sdpa(*x)
    file = tmp_path / "report.json"
    file.write_text(used.report().as_json())
    found = json.loads(file.read_text())
    assert [layer["layer"] for layer in found["layers"]] == [0, 3]
    text = used.report().as_text()
    assert text.startswith("sparse: 1 of 2 self-attention calls left blocks out; largest measured")
    assert "density" in text.splitlines()[1] and len(text.splitlines()) == 4
    searched = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(steer, "Search", lambda *_: searched.append(1))
        with use(budget=0.05, profile=str(file)) as again, inside():
            out = sdpa(*x)
    assert not searched and one(again, layer=3)["taus"] == one(used, layer=3)["taus"]
    assert 0 < off(out, sdpa(*x)) < 0.05
    with pytest.raises(RuntimeError, match=r"must be of mode sparse and a budget of 0.1, got 0.05"):
        use(budget=0.1, profile=str(file))
    with pytest.raises(RuntimeError, match="must have layers with taus"):
        use(budget=0.05, profile=found | {"layers": [{"taus": [math.nan]}]})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with use(budget=0.05) as used:
        for layer in (0, 3):
            with inside(layer=layer):
                sdpa(*near())
    found, file = used.report(), tmp_path / "report.json"
    file.write_text(found.as_json())
    assert main(["precision", str(file)]) == 0
    assert capsys.readouterr().out.strip() == found.as_text().strip()
    assert main(["precision", str(file), "--check"]) == 0
    found.found["layers"][1]["largest_error"] = 0.051
    file.write_text(found.as_json())
    assert main(["precision", str(file), "--check"]) == 1
    file.write_text('{"kind": "sparse", "format": 9, "wan_attn": "9.9"}')
    assert main(["precision", str(file)]) == 2
    assert "of another version of wan_attn (9.9)" in capsys.readouterr().err


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with use(budget=0.05) as used:
        for layer in (0, 3):
            with inside(layer=layer):
                sdpa(*near())
    (tmp_path / "report.json").write_text(used.report().as_json())
    path = tmp_path / "picture.svg"
    assert main(["precision", str(tmp_path / "report.json"), "--picture", str(path)]) == 0
    assert "blocks left out, by layer" in path.read_text() and "3 self, " in path.read_text()


def test_the_report_of_a_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with use(budget=0.05) as used, inside():
        sdpa(*near())
    assert used.watch is not None
    with caplog.at_level(logging.INFO, "wan_attn"):
        report.finish(used.watch, str(tmp_path / "a" / "report.json"))
    assert json.loads((tmp_path / "a" / "report.json").read_text())["kind"] == "sparse"
    assert sum("left blocks out" in r.message for r in caplog.records) == 1
    assert sparse.current_report().found == used.report().found
