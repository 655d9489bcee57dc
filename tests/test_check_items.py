# SPDX-License-Identifier: Apache-2.0
"""test_check_items.py - what a check does with each kernel: on the CPU, with planted bugs, and from
end to end on the mock GPU with right, wrong and deadly kernels, and with the emulated ones."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_mock import check as mock_check
from emu.build import compiler
from oracle import attention as oracle_attention
from wan_attn.__main__ import main
from wan_attn.check import calls, plan, private, programs, run, sanitizer, speed
from wan_attn.check.calls import SmallCall, WrongError
from wan_attn.check.plan import STEPS
from wan_attn.check.target import CARD_SIZES, CpuCard, Kernel, Sizes, Target, label
from wan_attn.workloads import WORKLOADS, parse_shape

CPU = torch.device("cpu")
QUICK = Sizes(
    (parse_shape("1x300x2x128"), parse_shape("2x257x2x80")),
    (torch.float32,),
    products=(torch.float32,),
    lengths=tuple(range(1, 301, 37)),
    far=1 << 20,
    seconds=0.1,
)


def a_target(sizes: Sizes = QUICK) -> Target:
    return Target(CpuCard(), CPU, sizes)


@pytest.fixture
def kernel(native: str) -> Kernel:
    """The best one of this machine, in its first dtype."""
    return a_target().kernels()[0]


# --- the items themselves ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        *calls.mask_calls(16),
        *calls.length_calls((1, 30, 61), 16),
        SmallCall(9, 5, 16, is_causal=True),  # rows that see no key
    ],
    ids=str,
)
def test_the_results_to_compare_with_are_the_oracles(call: SmallCall) -> None:
    (query, key, value), truth = calls.known(call, False)
    options: dict[str, Any] = {"window": call.window, "scale": call.scale}
    lens: dict[str, Any] = {
        name: None if found is None else torch.tensor(found)
        for name, found in (("q_lens", call.q_lens), ("k_lens", call.k_lens))
    }
    out, lse = oracle_attention(query, key, value, **lens, is_causal=call.is_causal, **options)
    torch.testing.assert_close(truth.out, torch.from_numpy(out), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(truth.lse, torch.from_numpy(lse), rtol=1e-12, atol=1e-12)


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


def last_row_lost(out: Tensor, *_: Any) -> Tensor:
    out = out.clone()
    out[:, -1] = 0
    return out


def padding_read(out: Tensor, q: Any, k: Any, v: Any, k_lens: Any) -> Tensor:
    return out if k_lens is None else out + 0 * v[:, -1:].sum(dim=2, keepdim=True)


_turns = itertools.count()


def other_bits(out: Tensor, q: Any, *_: Any) -> Tensor:
    """Every other time, the next number. Not in the calls of a proof, which would find it first."""
    if q.shape[1] != 130 or next(_turns) % 2:
        return out
    return torch.nextafter(out, torch.full_like(out, math.inf))


PLANTED: list[tuple[str, str, Any]] = [
    ("small", "", last_row_lost),
    ("small", "", other_bits),
    ("lengths", "", padding_read),
    ("masks", "", last_row_lost),
    ("masks", "", lambda out, q, *_: out if q.is_contiguous() else out * 1.01),
    ("wan", QUICK.shapes[0].name, padding_read),
    ("wan", QUICK.shapes[0].name, lambda out, *_: out * 1.02),
    ("offsets", "", lambda out, *_: out + (out.shape[0] > 2) * 0.5),
    ("offsets", "", lambda out, q, k, *_: out + (k.stride(1) > 1 << 12) * 0.5),
]


@pytest.mark.parametrize(("step", "argument", "change"), PLANTED)
def test_planted_bugs_are_found(
    step: str, argument: str, change: Any, kernel: Kernel, broken: Any
) -> None:
    target = a_target()
    STEPS[step](target, kernel, argument)  # without the bug it passes
    broken(change)
    with pytest.raises(WrongError):
        STEPS[step](target, kernel, argument)


class Captured(CpuCard):
    """Graphs replay what was computed when they were captured, or do their work."""

    def __init__(self, is_right: bool) -> None:
        super().__init__()
        self.is_right = is_right

    def captured(self, attend: Any) -> Any:
        first = attend()
        return attend if self.is_right else lambda: first


def test_a_graph_that_replays_old_numbers_is_found(kernel: Kernel) -> None:
    for is_right in (True, False):
        target = Target(Captured(is_right), CPU, QUICK)
        if is_right:
            assert programs.check_graph(target, kernel, "") == {"replays": 3}
        else:
            with pytest.raises(WrongError, match="replay 0 differs"):
                programs.check_graph(target, kernel, "")


def test_what_a_kernel_refuses_by_design_is_no_failure(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = a_target()
    monkeypatch.setattr(target, "why_not", lambda *_, **__: f"{kernel.row.name}: takes few rows")
    assert calls.check_lengths(target, kernel, "")["skipped"] == "takes few rows"


def test_a_row_that_quantises_may_be_wrong_but_not_by_much(kernel: Kernel, broken: Any) -> None:
    lossy = Kernel(replace(kernel.row, is_lossy=True), kernel.dtype)
    factor = 1.02
    broken(lambda out, *_: out * factor)
    assert calls.check_small(a_target(), lossy, "")["calls"] > 0
    factor = 1.10
    with pytest.raises(WrongError, match="of 141824 elements are wrong"):
        calls.check_small(a_target(), lossy, "")


def test_times_come_with_errors_memory_and_the_candidates_names(kernel: Kernel) -> None:
    target, told = a_target(), list[str]()
    target.only = (kernel.row.name,)
    target.without = ("torch-flash/fp32",)
    name = f"{QUICK.shapes[0].name}/fp32"
    found = speed.measure_speed(target, None, name, told.append)
    rows = {row["kernel"]: row for row in found["rows"]}
    assert set(rows) <= set(told) and "torch" in rows and "torch-flash" not in told
    for row in rows.values():
        assert row["p50_ms"] > 0 and math.isfinite(row["max_error"]) and "extra_mib" in row
    assert found["broken"] == {} and "fa3" in found["skipped_peers"]


def test_a_call_that_would_take_all_the_time_is_left_out(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "WHOLE_S", 1e-9)
    found = speed.measure_speed(a_target(), None, f"{QUICK.shapes[0].name}/fp32")
    assert found["skipped"].startswith("would take about ")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_what_the_sanitizer_finds_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs a worker that does nothing but call each kernel once."""
    program, target = tmp_path / "compute-sanitizer", a_target()
    monkeypatch.setattr(sanitizer, "find", lambda: str(program))
    for count, code in ((0, 0), (3, 9)):
        said = f"echo '========= ERROR SUMMARY: {count} errors'"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\n{said}\nexit {code}\n')
        program.chmod(0o755)
        if not count:
            found = sanitizer.run_sanitizer(target, None, "memcheck")
            assert found == {"said": "========= ERROR SUMMARY: 0 errors"}
            continue
        with pytest.raises(WrongError, match="exit code 9: .* 3 errors"):
            sanitizer.run_sanitizer(target, None, "memcheck")
    words = (tmp_path / "words").read_text()
    assert words.startswith("--tool=memcheck --error-exitcode=9 ")
    assert words.rstrip().endswith("--device cpu --rows= --without= --touch")
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    skipped = sanitizer.run_sanitizer(target, None, "memcheck")["skipped"]
    assert skipped == "compute-sanitizer is not installed"


# --- the plan ---------------------------------------------------------------------------------


def test_a_rope_row_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, native: str) -> None:
    target, true = a_target(), torch.ops.wan_attn.rms_norm_rope
    name = target.rope_kernels()[0].name
    assert calls.check_rope(target, None, name)["calls"] > 0
    monkeypatch.setattr(
        torch.ops.wan_attn, "rms_norm_rope", lambda **given: true(**{**given, "eps": 0.1})
    )
    with pytest.raises(calls.WrongError, match="norm and rotation: out"):
        calls.check_rope(target, None, name)


def test_the_plan_has_every_step_for_every_kernel(native: str) -> None:
    target = a_target()
    items = plan.make(target)
    assert {item.step for item in items} | set(plan.ON_GPU_ONLY) == set(STEPS)
    names = [kernel.name for kernel in target.kernels()]
    assert len(names) == len(set(names)) > 0
    for name in names:
        mine = {item.step for item in items if item.kernel == name}
        assert mine == set(STEPS) - {"speed", "matmul", "rope", *plan.ON_GPU_ONLY}
    rope = [item.argument for item in items if item.step == "rope"]
    assert rope == [kernel.name for kernel in target.rope_kernels()] and len(rope) >= 3
    some = plan.make(target, ("small", "speed"))
    assert [item.step for item in some] == ["small"] * len(names) + ["speed"] * 2


def test_on_a_card_every_call_of_wans_models_is_timed_the_longest_once() -> None:
    target = a_target(CARD_SIZES)
    target.has_streams = True
    timed = [item.argument for item in plan.make(target) if item.step == "speed"]
    assert timed[:2] == ["ti2v-5b-720p/bf16", "ti2v-5b-720p/fp16"]
    assert {name.partition("/")[0] for name in timed} == {c.name for c in CARD_SIZES.shapes}
    assert "a14b-720p/bf16" in timed and "a14b-720p/fp16" not in timed
    tools = [item.argument for item in plan.make(target) if item.step == "sanitizer"]
    assert tools == list(sanitizer.TOOLS)
    head_dims = {call.head_dim for call in CARD_SIZES.shapes}
    assert head_dims == {64, 80, 128, 256}, "every row has a real call"


def test_a_call_that_was_cut_down_does_not_look_like_the_real_one() -> None:
    real = WORKLOADS["ti2v-5b-720p"]
    assert label(real) == "ti2v-5b-720p"
    assert label(replace(real, num_heads_q=4)) == "ti2v-5b-720p cut down to 1x27280x4x128"
    assert label(parse_shape("1x2x3x4")) == "1x2x3x4"


# --- from end to end --------------------------------------------------------------------------


def test_the_cpu_is_checked_where_there_is_no_gpu(
    kernel: Kernel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the report holds nothing of the user's: see test_check.py for what errors may hold."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    home = tmp_path / "jane.doe"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "jdoe42")
    monkeypatch.setenv("WAN_TOKEN", "hunter2")
    private.names.cache_clear()
    file = tmp_path / "report.md"
    words = ["--rows", kernel.row.name, "--only", "lengths", "--out", str(file)]
    assert main(["check", *words]) == 0
    said = capsys.readouterr()
    verdict = said.out.splitlines()[-1]
    count = len(kernel.row.dtypes)
    assert f"{count} of {count} kernels right" in verdict
    assert verdict.endswith("no GPU was checked") and "\nno GPU was checked" in said.out
    text = file.read_text(encoding="utf-8")
    assert "No GPU was checked: " in text
    assert set(private.names()) >= {"jdoe42", "jane.doe"}
    for secret in (*private.names(), str(tmp_path), "hunter2"):
        assert secret not in text
    private.names.cache_clear()


needs_mock = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")


@pytest.fixture
def on_mock(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    native: str,
) -> Any:
    """The command on a machine with a mock A100, whose kernels have these faults."""
    program = str(Path(mock_check.__file__))

    def go(faults: dict[str, str] | None, *words: str) -> tuple[int, dict[str, Any]]:
        def make_command(said: Any) -> list[str]:
            return [sys.executable, program, json.dumps(sys.path), "80", json.dumps(faults), *said]

        monkeypatch.setattr(run, "make_command", make_command)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.version, "hip", None)
        code = main(["check", *words, "--json", "--out", str(tmp_path / "report.md")])
        return code, json.loads(capsys.readouterr().out)

    return go


@needs_mock
def test_wrong_and_deadly_kernels_turn_the_verdict_red(on_mock: Any) -> None:
    faults = {
        "sdpa_sm80_bf16_d64": "wrong numbers",
        "sdpa_sm80_f16_d80": "hang",
        "sdpa_sm80_bf16_d80": "crash",
    }
    rows = ("--rows", "sdpa_sm80_d64,sdpa_sm80_d80")
    code, found = on_mock(faults, *rows, "--only", "small,speed")
    assert code == 1 and not found["is_fine"]
    assert found["kernels"] == {
        "sdpa_sm80_d64/fp16": "right",
        "sdpa_sm80_d64/bf16": "WRONG",
        "sdpa_sm80_d80/fp16": "WRONG",
        "sdpa_sm80_d80/bf16": "WRONG",
    }
    _, wrong, hung, crashed, *speeds = found["items"]
    assert "ragged: out[1, 17, 1, 5] is" in wrong["problem"]
    assert hung["problem"] == "hung: no answer within 30 s"
    assert crashed["problem"].startswith("crashed: the process was killed by SIGSEGV")
    # What has ended a worker is not timed; everything else is, and cuDNN says why it is not.
    assert [item["state"] for item in speeds] == ["passed"] * 4
    timed = {r["kernel"] for item in speeds for r in item["detail"]["rows"]}
    assert timed == {"sdpa_sm80_d64", "torch", "torch-flash"}
    assert "no valid execution plans" in speeds[0]["detail"]["skipped_peers"]["torch-cudnn"]
    assert "on NVIDIA A100-SXM4-80GB: 1 of 4 kernels right, WRONG: " in found["verdict"]


@needs_mock
def test_the_kernels_themselves_pass_on_the_emulated_gpu(on_mock: Any) -> None:
    words = ("--rows", "sdpa_sm80_d64", "--only", "lengths,wan,graph,stream,sanitizer")
    code, found = on_mock(None, *words)
    assert code == 0 and found["is_fine"]
    states = {item["step"]: item["state"] for item in found["items"]}
    skipped = dict.fromkeys(("graph", "stream", "sanitizer"), "skipped")
    assert states == {"lengths": "passed", "wan": "passed", **skipped}
    assert found["kernels"] == {"sdpa_sm80_d64/fp16": "right", "sdpa_sm80_d64/bf16": "right"}
