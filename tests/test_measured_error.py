# SPDX-License-Identifier: Apache-2.0
"""test_measured_error.py - the error that `auto` measures, what follows from it, and the report."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan_attn
from calls import BF16, F32, operands
from wan_attn import precision
from wan_attn.__main__ import main
from wan_attn.observe import later, place, sampling
from wan_attn.observe.place import Place
from wan_attn.precision import record, report, verdict
from wan_attn.request import PLAIN
from wan_attn.store import processes

pytestmark = pytest.mark.usefixtures("native", "as_in_a_new_process")


def inner(layer: int = 3, step: int = 4) -> Any:
    return precision.at(step=step, steps=10, layer=layer, layers=8, expert=0)


def sdpa(*x: Tensor, **options: Any) -> Any:
    return wan_attn.sdpa(*x, **options)


def some(heads: int = 8, seqlen: int = 96) -> list[Tensor]:
    return list(operands(seqlen_q=seqlen, seqlen_k=seqlen, heads_q=heads, head_dim=64))


def bad_heads(x: list[Tensor], *heads: int) -> list[Tensor]:
    """Scores in the hundreds: 8 bits are not enough for these heads."""
    for head in heads:
        x[0][:, :, head] *= 60.0
    return x


# --- rows ----------------------------------------------------------------------------------------


# A measurement costs as much as 100 rows, and 0.2 % of 400 calls may be spent. The first one is
# given.
MEASURED = {1: 1, 45: 1, 2048: 17, 8192: 66, 32_760: 263, 75_600: 400, 400_000: 400}


@pytest.mark.parametrize("seqlen", MEASURED)
def test_the_share_of_the_work(seqlen: int) -> None:
    allowance = sampling.Allowance()
    taken = [allowance.rows(seqlen) for _ in range(400)]
    measured = [rows for rows in taken if rows]
    assert taken[0], "the first call is always measured"
    assert abs(len(measured) - MEASURED[seqlen]) <= 1
    for rows in measured:
        assert len(set(rows)) == len(rows) <= 8
        assert 0 <= min(rows) and max(rows) < seqlen


def test_rows_are_spread_and_others_each_time() -> None:
    allowance = sampling.Allowance()
    seen: set[int] = set()
    for _ in range(50):
        rows = allowance.rows(75_600)
        assert len(rows) == sampling.ROWS and not seen & set(rows)
        assert max(b - a for a, b in zip(rows, rows[1:], strict=False)) < 75_600 // 3
        seen |= set(rows)
    assert all(any(low <= row < low + 7560 for row in seen) for low in range(0, 75_600, 7560))


def test_groups_of_heads() -> None:
    assert sampling.groups(40, 40) == tuple((i, i + 5) for i in range(0, 40, 5))
    assert sampling.groups(3, 3) == ((0, 1), (1, 2), (2, 3))
    assert sampling.groups(8, 2) == ((0, 8),)
    for heads in range(1, 50):
        groups = sampling.groups(heads, heads)
        assert [a for a, _ in groups[1:]] == [b for _, b in groups[:-1]]
        assert groups[0][0] == 0 and groups[-1][1] == heads


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_measured_error_is_that_of_the_rows(dtype: torch.dtype) -> None:
    """Held against float64 arithmetic on the results, group by group."""
    x = operands(seqlen_q=64, seqlen_k=64, heads_q=5, heads_k=5, head_dim=64, dtype=dtype)
    exact = torch.ops.wan_attn.sdpa(*x)[0]
    lossy = torch.ops.wan_attn.sdpa(*x, precision=1)[0]
    groups, rows = ((0, 2), (2, 5)), [3, 17, 40]
    from wan_attn.backends import native

    found = sampling.errors(native.run, rows, groups, (x[0], x[1], x[2]), lossy, PLAIN)
    for (a, b), square in zip(groups, found.tolist(), strict=True):
        want = exact[:, rows, a:b].double()
        off = (lossy[:, rows, a:b].double() - want).norm() / want.norm()
        assert math.isclose(square, float(off) ** 2, rel_tol=0.02 if dtype == BF16 else 1e-3)


def test_an_estimate_from_few_rows_is_near_the_error_of_all() -> None:
    x = some(seqlen=512)
    with precision.use("auto", budget=0.5) as used, inner():
        got = sdpa(*x)
    want = torch.ops.wan_attn.sdpa(*x)[0]
    groups = sampling.groups(8, 8)
    worst = max(
        float((got[:, :, a:b] - want[:, :, a:b]).norm() / want[:, :, a:b].norm()) for a, b in groups
    )
    (layer,) = used.report().layers
    assert 0.7 * worst < layer["largest_error"] < 1.5 * worst


# --- what follows --------------------------------------------------------------------------------


def test_heads_that_are_off_by_too_much_are_exact(caplog: pytest.LogCaptureFixture) -> None:
    """At once, and the others stay lossy."""
    x = bad_heads(some(), 2, 5)
    exact = torch.ops.wan_attn.sdpa(*x, return_lse=True)
    lossy = torch.ops.wan_attn.sdpa(*x, return_lse=True, precision=1)
    with precision.use("auto") as used, caplog.at_level(logging.INFO, "wan_attn"), inner():
        for _ in range(2):  # the second one knows it before
            out, lse = sdpa(*x, return_lse=True)
            for head in range(8):
                want, want_lse = exact if head in (2, 5) else lossy
                assert torch.equal(out[:, :, head], want[:, :, head]), head
                assert torch.equal(lse[:, head], want_lse[:, head]), head
    (layer,) = used.report().layers
    (event,) = layer["events"]
    assert layer["lossy_calls"] == 2 and event.startswith("layer 3 (self), heads 2, 5, step 4: an")
    assert "is above the budget of 2 %; computed again exactly. It is exact for" in event
    assert sum(event in r.message for r in caplog.records) == 1


def test_other_layers_and_the_next_run_are_not_concerned() -> None:
    x, good = bad_heads(some(1), 0), some(1)
    lossy = torch.ops.wan_attn.sdpa(*good, precision=1)[0]
    with precision.use("auto"):
        place.begin([float(t) for t in range(10, 0, -1)])
        with inner():
            sdpa(*x)
            assert not torch.equal(sdpa(*good), lossy)
        with inner(layer=4):
            assert torch.equal(sdpa(*good), lossy)
        place.begin([float(t) for t in range(10, 0, -1)])
        with inner():
            assert torch.equal(sdpa(*good), lossy)


def test_a_call_whose_error_cannot_be_measured_is_exact(caplog: pytest.LogCaptureFixture) -> None:
    x = some()
    with precision.use("auto"), caplog.at_level(logging.INFO, "wan_attn"), inner():
        for options in ({"is_causal": True}, {"window": (5, 5)}, {"q_lens": [90]}):
            want, _ = torch.ops.wan_attn.sdpa(
                *x,
                torch.tensor([90]) if "q_lens" in options else None,
                is_causal="is_causal" in options,
                window_left=5 if "window" in options else -1,
                window_right=5 if "window" in options else -1,
            )
            assert torch.equal(sdpa(*x, **options), want)
    said = {r.message for r in caplog.records if "cannot be measured" in r.message}
    assert len(said) == 2


class Api:
    """Stands in for torch.cuda: a copy is there once `passed` says so."""

    passed = False

    class Event:
        def record(self, stream: object) -> None:
            pass

        def query(self) -> bool:
            return Api.passed

        def synchronize(self) -> None:
            Api.passed = True

    @staticmethod
    def current_stream(device: object) -> None:
        return None


class _Late(later.Later):
    """Of a device whose copy is on its way."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self._event = Api.Event()


def note(words: list[int], squares: list[float], run: int = 0) -> record.Note:
    where = Place("self", 4, 10, 3, 8, 0, run)
    return where, _Late(torch.tensor(words, dtype=torch.int32)), _Late(torch.tensor(squares))


def test_what_a_gpu_tells_is_read_when_it_is_there(caplog: pytest.LogCaptureFixture) -> None:
    Api.passed = False
    layer = record.Layer(0, 3, "self", groups=((0, 2), (2, 4)))
    layer.pending += [note([0, 0, 0, 0], [1e-4, 1e-2]), note([0, 0, 0, 7], [])]
    with caplog.at_level(logging.INFO, "wan_attn"):
        verdict.read_pending(layer, 0.02)
        assert len(layer.pending) == 2 and not layer.why_exact
        Api.passed = True
        verdict.read_pending(layer, 0.02)
    assert not layer.pending and set(layer.why_exact) == {1, None}
    ((run, step, error, stands),) = layer.measured
    assert (run, step, stands) == (0, 4, True) and error == pytest.approx(0.1)
    assert [event.partition(":")[0] for event in layer.events] == [
        "layer 3 (self), heads 2-3, step 4",
        "layer 3 (self), step 4",
    ]
    assert all("its result was in use already" in event for event in layer.events)


def test_what_is_told_of_a_run_that_is_over_has_no_consequence() -> None:
    Api.passed = True
    layer = record.Layer(0, 3, "self", run=2, groups=((0, 4),))
    layer.pending += [note([0, 0, 0, 7], [], run=1), note([0, 0, 0, 0], [1.0], run=1)]
    verdict.read_pending(layer, 0.02, wait=True)
    assert not layer.pending and not layer.why_exact and not layer.running


def test_the_running_error_forgives_one_call() -> None:
    Api.passed = True
    layer = record.Layer(0, 3, "self", groups=((0, 4),))
    budget = 0.02
    for error, is_over in ((0.01, False), (0.03, False), (0.03, False), (0.03, True)):
        layer.pending.append(note([0, 0, 0, 0], [error**2]))
        verdict.read_pending(layer, budget)
        assert bool(layer.why_exact) == is_over
    layer = record.Layer(0, 3, "self", groups=((0, 4),))
    layer.pending.append(note([0, 0, 0, 0], [math.nan]))
    verdict.read_pending(layer, budget)
    assert "an error of NaN" in layer.events[0]


# --- report --------------------------------------------------------------------------------------


def a_run(**options: Any) -> report.Report:
    x = bad_heads(some(2), 1)
    with precision.use("auto", **options) as used:
        for step in range(10):
            for layer in range(3):
                operands = x if layer == 1 else some(2)
                with precision.at(step=step, steps=10, layer=layer, layers=3, expert=0):
                    sdpa(*operands)
    return used.report()


def test_the_report(tmp_path: Path) -> None:
    found = a_run()
    assert [(layer["layer"], layer["lossy_calls"]) for layer in found.layers] == [
        *((0, 0), (1, 6), (2, 0))
    ]
    lines = found.as_text().splitlines()
    assert lines[0].startswith("auto: 6 of 30 attention calls had 8-bit scores")
    assert lines[1].split() == [
        "layer",
        "calls",
        "8-bit",
        "ms/call",
        "8-bit",
        "ms",
        "error",
        "largest",
    ]
    assert lines[3].split()[:4] == ["1", "self", "10", "6"] and len(lines) == 6
    assert "head 1, step 2" in lines[5]
    assert report.text(json.loads(found.as_json())) == found.as_text()
    assert {len(line) for line in lines[1:5]} == {len(lines[1])}, "columns stand in line"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, clean = tmp_path / "report.json", tmp_path / "clean.json"
    found = a_run()
    file.write_text(found.as_json())
    assert main(["precision", str(file)]) == 0
    assert capsys.readouterr().out.strip() == found.as_text().strip()
    assert main(["precision", str(file), "--check"]) == 1
    with precision.use("auto") as used, inner():
        sdpa(*some())
    clean.write_text(used.report().as_json())
    assert main(["precision", str(clean), "--check"]) == 0
    for text, said in (("{", "cannot be read"), ("[]", "no precision report"), ("{}", "no prec")):
        file.write_text(text)
        assert main(["precision", str(file)]) == 2
        assert said in capsys.readouterr().err
    file.write_text('{"kind": "precision", "format": 9, "wan_attn": "9.9"}')
    assert main(["precision", str(file)]) == 2
    assert "of another version of wan_attn (9.9)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["precision", str(clean), "--picture", "report.jpg"])


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, path = tmp_path / "report.json", tmp_path / f"picture.{suffix}"
    file.write_text(a_run().as_json())
    assert main(["precision", str(file), "--picture", str(path)]) == 0
    assert path.stat().st_size > 2000 and f"written: {path}" in capsys.readouterr().out
    if suffix == "svg":
        text = path.read_text()
        assert "measured error (budget 2 %)" in text and "layer (self-attention)" in text


def test_at_exit(tmp_path: Path) -> None:
    """The table in the log, and the file."""
    code = """
import torch, wan_attn
from wan_attn import log, precision
log.enable()
x = [torch.randn(1, 64, 4, 64) for _ in range(3)]
for step in range(10):
    with precision.at(step=step, steps=10, layer=2, layers=5):
        wan_attn.sdpa(*x)
"""
    file = tmp_path / "folder" / "report.json"
    settings = {"WAN_ATTN_PRECISION": "auto", "WAN_ATTN_PRECISION_REPORT": str(file)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    (layer,) = json.loads(file.read_text())["layers"]
    assert layer["lossy_calls"] == 6 and 0 < layer["error"] < 0.02
    assert "[Attention] auto: 6 of 10 attention calls had 8-bit scores" in done.stderr
    assert "where `auto` allows them (WAN_ATTN_PRECISION=auto)" in done.stderr


def test_a_rank_is_known_when_its_group_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wan2.2's generate.py destroys it before it exits: all would write the same file."""
    with monkeypatch.context() as under_torchrun:
        under_torchrun.setattr(processes, "rank", lambda: 1)
        with precision.use("fast") as used:
            sdpa(*some())
    assert processes.rank() == -1 and used.watch is not None
    report.finish(used.watch, str(tmp_path / "report.json"))
    assert [file.name for file in tmp_path.iterdir()] == ["report.rank1.json"]


def test_an_exact_run_reports_nothing(tmp_path: Path) -> None:
    sdpa(*some())
    assert precision.current_report().layers == []
