# SPDX-License-Identifier: Apache-2.0
"""test_gpu_check.py - benchmarks/gpu_check without a GPU: its checks on CPU kernels, and workers
that crash, hang, run out of time or find nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import items as gpu_items
from benchmarks.gpu_check import report, run, speed
from benchmarks.gpu_check import worker as gpu_worker
from wan_attn.native import op

ROOT = Path(__file__).resolve().parents[1]
DRY = gpu_items.Bench(torch.device("cpu"), is_dry=True)

WORKER = """
import json, os, sys, time
start = int(sys.argv[sys.argv.index("--start") + 1])
def say(**words): print(json.dumps(words), flush=True)
plan = [dict(step="small", row=f"row{i}", argument="", limit_s=LIMIT) for i in range(5)]
say(plan=plan, rows=["row0"], environment={"device": "a card"})
for n in range(start, 5):
    say(begin=n)
    print("a library says something")
    if n == 1:
        print("Segmentation fault in row1", file=sys.stderr, flush=True)
        os._exit(139)
    if n == 3:
        time.sleep(60)
    say(end=n, problem="wrong by 7" if n == 4 else "", detail={}, seconds=0.1)
"""


def worker(tmp_path: Path, code: str, limit: float = 2.0) -> list[str]:
    file = tmp_path / "worker.py"
    file.write_text(code.replace("LIMIT", str(limit)))
    return [sys.executable, str(file)]


def test_a_crash_and_a_hang_cost_their_own_item_only(tmp_path: Path) -> None:
    changes: list[int] = []
    results = run.orchestrate(
        worker(tmp_path, WORKER), 60, lambda found: changes.append(len(found.ended))
    )
    problems = {n: end["problem"] for n, end in results.ended.items()}
    assert problems[0] == problems[2] == ""
    assert "crashed: exit code 139" in problems[1] and "Segmentation fault" in problems[1]
    assert "hung: no answer within 2 s" in problems[3]
    assert problems[4] == "wrong by 7"
    assert gpu_check.verdict(results) == gpu_check.FAILED
    assert changes == sorted(changes) and changes[-1] == 5, "results are saved as they come"


def test_time_that_runs_out_is_no_failure(tmp_path: Path) -> None:
    code = WORKER.replace("if n == 1:", "if n == 1: say(out_of_time=n); sys.exit()\n    if n == 9:")
    results = run.orchestrate(worker(tmp_path, code), 60)
    assert list(results.ended) == [0] and results.trouble == ""
    assert gpu_check.verdict(results) == gpu_check.PASSED
    states = [item["state"] for item in report.as_dict(results, False)["items"]]
    assert states == ["passed"] + ["not run"] * 4


def test_a_worker_that_cannot_start_is_trouble(tmp_path: Path) -> None:
    results = run.orchestrate(worker(tmp_path, "raise SystemExit('no torch here')"), 60)
    assert "no torch here" in results.trouble
    assert gpu_check.verdict(results) == gpu_check.FAILED


def test_a_build_without_kernels_for_the_card_has_its_own_code(tmp_path: Path) -> None:
    code = 'import json; print(json.dumps({"plan": [], "rows": [], "environment": {}}))'
    results = run.orchestrate(worker(tmp_path, code), 60)
    assert gpu_check.verdict(results) == gpu_check.NO_ROWS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == gpu_check.NO_GPU
    assert "there is no GPU to check" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--only", "small,big"], "got 'big'"),
        (["--rows", "sdpa_x"], "got 'sdpa_x'"),
    ],
)
def test_bad_options(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(words)
    assert message in capsys.readouterr().err


def test_a_dry_run_in_its_own_process(tmp_path: Path, native: str) -> None:
    row = DRY.rows()[0].name
    words = ["--dry-run-on-cpu", "--rows", row, "--only", "small,graph,speed"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *words, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check-dry-run.json").read_text())
    assert found["dry_run_on_cpu"] and {i["state"] for i in found["items"]} == {"passed"}
    text = (tmp_path / "gpu_check-dry-run.md").read_text()
    assert "No GPU was used" in text and f"| `{row}` | ok |" in text
    assert "x flash" in text and "| torch-flash |" in text


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, native: str) -> Any:
    """Every call of the op goes through `change(out, query, key, value, k_lens)` first."""

    def plant(change: Any) -> None:
        true = torch.ops.wan_attn.sdpa

        def sdpa(q: Any, k: Any, v: Any, q_lens: Any = None, k_lens: Any = None, **o: Any) -> Any:
            out, lse = true(q, k, v, q_lens, k_lens, **o)
            return change(out, q, k, v, k_lens), lse

        monkeypatch.setattr(torch.ops.wan_attn, "sdpa", sdpa)

    return plant


def last_row_lost(out: torch.Tensor, *_: Any) -> torch.Tensor:
    out = out.clone()
    out[:, -1] = 0
    return out


def padding_read(out: torch.Tensor, q: Any, k: Any, v: Any, k_lens: Any) -> torch.Tensor:
    return out if k_lens is None else out + 0 * v[:, -1:].sum(dim=2, keepdim=True)


@pytest.mark.parametrize(
    ("step", "argument", "change"),
    [
        ("small", "", last_row_lost),
        ("lengths", "", padding_read),
        ("masks", "", last_row_lost),
        ("wan", gpu_worker.DRY_SHAPES[0], padding_read),
        ("wan", gpu_worker.DRY_SHAPES[0], lambda out, *_: out * 1.02),
        ("offsets", "", lambda out, *_: out + (out.shape[0] > 2) * 0.5),
    ],
)
def test_planted_bugs_are_found(step: str, argument: str, change: Any, broken: Any) -> None:
    row = DRY.rows()[0]
    gpu_worker.STEPS[step](DRY, row, argument)  # without the bug it passes
    broken(change)
    with pytest.raises(AssertionError):
        gpu_worker.STEPS[step](DRY, row, argument)


@pytest.mark.parametrize(
    ("said", "is_refusal"),
    [("{row}: takes few query rows only", True), ("no machine code for {row}", False)],
)
def test_a_refusal_by_the_row_is_no_failure(said: str, is_refusal: bool, broken: Any) -> None:
    row = DRY.rows()[0]

    def refuse(*_: Any) -> Any:
        raise RuntimeError("wan_attn: " + said.format(row=row.name))

    broken(refuse)
    if is_refusal:
        assert gpu_items.check_small(DRY, row, "") == {"skipped": "takes few query rows only"}
    else:
        with pytest.raises(RuntimeError, match="no machine code"):
            gpu_items.check_small(DRY, row, "")


def test_the_plan_has_every_step_for_every_row(native: str) -> None:
    items = gpu_worker.plan(DRY)
    steps = {item.step for item in items}
    assert steps | {"sanitizer"} == set(gpu_check.STEPS) == set(gpu_worker.STEPS)
    for row in (r for r in op.kernels() if r.device == "cpu" and r in DRY.rows()):
        mine = {item.step for item in items if item.row == row.name}
        assert mine == steps - {"speed", "matmul"}
    card = gpu_worker.plan(gpu_items.Bench(torch.device("cuda"), is_dry=False))
    speeds = [item.argument for item in card if item.step == "speed"]
    assert speeds == list(gpu_worker.WAN_SHAPES)
    assert [i.argument for i in card if i.step == "sanitizer"] == list(speed.SANITIZER_TOOLS)


def test_a_row_that_quantises_may_be_wrong_but_not_by_much(broken: Any) -> None:
    row = replace(DRY.rows()[0], is_lossy=True)
    factor = 1.02
    broken(lambda out, *_: out * factor)
    assert gpu_items.check_small(DRY, row, "")["calls"] > 0
    factor = 1.10
    with pytest.raises(AssertionError, match="relative rms error 10"):
        gpu_items.check_small(DRY, row, "")
