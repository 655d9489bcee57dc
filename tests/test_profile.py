# SPDX-License-Identifier: Apache-2.0
"""test_profile.py - WAN_ATTN_PROFILE: names of sites and layers, where the time went, the file."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import wan_attn
from test_bench_timing import FakeCuda
from wan_attn import config
from wan_attn.bench import profile as bench_profile
from wan_attn.integrations import _rope
from wan_attn.request import Request
from wan_attn.selection import profile
from wan_attn.selection.profile import Mark, Recorder, Site
from wan_attn.store import processes

CPU = torch.device("cpu")


class Layer(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = wan_attn.sdpa(x, x, x)
        assert isinstance(out, torch.Tensor)
        return out


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Recorder]:
    """Profiling is on; nothing is left to happen at exit."""
    monkeypatch.setattr(atexit, "register", lambda function: None)
    monkeypatch.setattr(profile, "_recorder", None)
    monkeypatch.setenv("WAN_ATTN_PROFILE", str(tmp_path / "profile.json"))
    config.refresh()
    yield profile.recorder(str(tmp_path / "profile.json"))
    monkeypatch.undo()
    config.refresh()


def test_calls_are_told_by_line_and_layer(recorder: Recorder) -> None:
    x = torch.randn(1, 8, 2, 16)
    first, second = Model(), Model()
    for model in (first, first, second):
        model(x)
    wan_attn.sdpa(x, x, x)
    sites = [mark.site for mark in recorder.marks]
    assert [(s.model, s.layer) for s in sites] == [
        *[("Model", "blocks.0"), ("Model", "blocks.1")] * 2,
        ("Model#2", "blocks.0"),
        ("Model#2", "blocks.1"),
        ("", ""),
    ]
    assert "test_profile.py:" in sites[0].line and "forward" in sites[0].line
    assert "test_calls_are_told" in sites[-1].line
    assert {mark.kind for mark in recorder.marks} == {"1x8x2x16 float32"}


class Normed(torch.nn.Module):
    """A layer whose forward is not the program's: as one of Wan2.2's that is patched."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _rope.rms_norm_rope(x, self.weight, eps=1e-6, dtype=torch.float32)
        out = wan_attn.sdpa(y, y, x)
        assert isinstance(out, torch.Tensor)
        return out


def test_norm_and_rotation_are_marked_beside_attention(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    outer = Model()
    outer.blocks[0] = Normed()
    outer(torch.randn(1, 8, 2, 16))
    parts = [(mark.part, mark.site.layer) for mark in recorder.marks]
    assert parts == [
        (profile.ROPE, "blocks.0"),
        (profile.ATTENTION, "blocks.0"),
        (profile.ATTENTION, "blocks.1"),
    ]
    first = recorder.marks[0]
    assert first.kind == "1x8x2x16 float32" and first.title
    recorder.finish()
    bench_profile.finish(recorder, 1.0)
    found = json.loads(Path(recorder.path).read_text())
    assert (found["calls"], found["rope_calls"]) == (2, 1)
    assert found["where"]["norm_and_rope_ms"] == pytest.approx(first.ms)
    assert "norm and RoPE" in capsys.readouterr().err


def test_the_line_of_a_call_is_the_programs(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a forward of ours was called by torch's Module, the line is the one before."""
    ours = (profile._PACKAGE, __file__)  # frames of this file too
    monkeypatch.setattr(profile, "_PACKAGE", ours)
    namespace: dict[str, Any] = {}
    code = compile("def use(module, x):\n    return module(x)\n", "a_program.py", "exec")
    exec(code, namespace)
    namespace["use"](Layer(), torch.randn(1, 8, 2, 16))
    assert recorder.marks[0].site.line.startswith("a_program.py:2 ")


def test_a_model_is_not_kept_alive(recorder: Recorder) -> None:
    import gc
    import weakref

    model = Model()
    model(torch.randn(1, 8, 2, 16))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_file_and_the_summary(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(1, 8, 2, 16)
    model = Model()
    for _ in range(3):
        model(x)
    recorder.finish()
    said = capsys.readouterr().err
    assert "Where the time went" in said and "6 calls" in said and "Model: 3 forwards" in said
    found = json.loads(Path(recorder.path).read_text())
    assert found["calls"] == 6 and len(found["layers"]) == 2
    assert sum(site["calls"] for site in found["sites"]) == 6
    where = found["where"]
    assert sum(where.values()) / 1e3 == pytest.approx(found["run_seconds"], rel=1e-3)
    assert 0 < found["attention_share"] <= 1


def test_off_means_that_nothing_is_recorded() -> None:
    assert config.current().profile is None
    x = torch.randn(1, 8, 2, 16)
    wan_attn.sdpa(x, x, x)
    assert profile._recorder is None


def on_gpu() -> tuple[Request, str]:
    half = torch.bfloat16
    cuda = torch.device("cuda", 0)
    return Request(1, 8, 8, 2, 2, 64, half, half, half, cuda), "Flash Attention 2"


class Capturing(FakeCuda):
    """torch.cuda, with streams, and a graph that is being captured or not."""

    is_capturing = False

    def current_stream(self, device: Any) -> None:
        return None

    def is_current_stream_capturing(self) -> bool:
        return self.is_capturing


def test_events_are_read_without_waiting_and_the_rest_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profile, "DRAIN_EVERY", 2)
    cuda = Capturing()
    recorder = Recorder("unused", api=cuda)
    request, title = on_gpu()
    for milliseconds in (3.0, 5.0, 2.0):
        begun = recorder.start(request.device)
        cuda.work(milliseconds)
        recorder.stop(begun, request, title)
        cuda.work(10.0)
        if milliseconds == 3.0:
            cuda.synchronize()  # the program's own
    assert [mark.ms for mark in recorder.marks] == [3.0, -1.0, -1.0], "read before it has passed"
    assert cuda.log.count("synchronize") == 1, "a profile must not wait"
    recorder.drain(wait=True)
    assert [mark.ms for mark in recorder.marks] == [3.0, 5.0, 2.0]
    assert [mark.begin_ms for mark in recorder.marks] == [0.0, 13.0, 28.0]


def test_captured_calls_are_counted_and_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    cuda = Capturing()
    cuda.is_capturing = True
    recorder = Recorder("unused", api=cuda)
    request, title = on_gpu()
    recorder.stop(recorder.start(request.device), request, title)
    assert recorder.marks == [] and recorder.not_timed == 1 and cuda.log == []
    bench_profile.finish(recorder, 1.0)
    assert "(1 were captured in one)" in capsys.readouterr().err


def marks(times: list[list[float]], gap: float = 1.0) -> list[Mark]:
    """Forwards of a model, each a list of its layers' times; 2 ms around each call."""
    found, now = [], 0.0
    for forward in times:
        for layer, ms in enumerate(forward):
            site = Site("model.py:1 forward", "Model", f"blocks.{layer}")
            found.append(Mark(site, "1x8x2x64 bf16", "t", CPU, 0, 0, (now + ms) / 1e3, now, ms))
            now += ms + gap
    return found


def test_the_share_of_attention_and_its_spikes() -> None:
    times = [[10.0, 10.0], [10.0, 40.0], [10.0, 10.0], [10.0, 10.0]]
    found = bench_profile.analyse(marks(times), seconds=0.2)
    assert found["attention_share"] == pytest.approx(110 / 117)
    assert found["where"]["between_calls_ms"] == pytest.approx(7.0)
    (spike,) = found["spikes"]
    assert (spike["call"], spike["ms"], spike["usual_ms"], spike["layer"]) == (
        4,
        40,
        10,
        "blocks.1",
    )
    forwards = found["forwards"]["Model"]
    assert forwards["count"] == 4 and forwards["p50_ms"] == 22
    assert forwards["spikes"] == [{"forward": 2, "ms": 52.0}]
    text = bench_profile.as_text(found)
    assert "40.0 instead of 10.0 ms (blocks.1)" in text and "slow ones: 2 (52 ms)" in text


@pytest.mark.parametrize(
    ("rank", "pid", "name"),
    [
        (None, None, "p.json"),
        (-1, None, "p.json"),
        (1, None, "p.rank1.json"),
        (-1, 7, "p.pid7.json"),
    ],
)
def test_every_process_has_its_own_file(
    rank: Any, pid: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "is_child", lambda: pid is not None)
    monkeypatch.setattr(os, "getpid", lambda: pid)
    assert processes.file_for(tmp_path / "p.json", rank) == tmp_path / name


def test_a_file_that_cannot_be_written_does_not_fail_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    recorder = Recorder(str(tmp_path / "file" / "p.json"))
    recorder.marks = marks([[1.0]])
    bench_profile.finish(recorder, 1.0)
    assert "not written" in capsys.readouterr().err


def test_run_profiles_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch, wan_attn\n"
        "os.chdir('/')\n"
        "x = torch.randn(1, 8, 2, 16)\n"
        "for _ in range(4): wan_attn.sdpa(x, x, x)\n"
    )
    words = [sys.executable, "-m", "wan_attn", "run", "--profile", "p.json", str(script)]
    env = {**os.environ, "PYTHONPATH": str(Path(wan_attn.__file__).parents[1])}
    began = time.perf_counter()
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["calls"] == 4 and found["run_seconds"] < time.perf_counter() - began
    assert found["sites"][0]["line"].endswith("script.py:4 <module>")
    assert "written to" in done.stderr and done.stdout == ""
