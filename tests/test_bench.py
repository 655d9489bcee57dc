# SPDX-License-Identifier: Apache-2.0
"""test_bench.py - `wan_attn bench`: bad options, small runs of each action, and what they write."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_attn.__main__ import main
from wan_attn.bench import (
    accuracy,
    facts,
    kernels,
    model,
    peers,
    plots,
    progress,
    report,
    step,
    suite,
)
from wan_attn.bench.model import ARCHS, Video, reduced
from wan_attn.bench.report import Column, Report
from wan_attn.native import op
from wan_attn.request import Request
from wan_attn.workloads import WORKLOADS, parse_shape

CPU = ["--device", "cpu", "--rounds", "2"]
KERNELS = ["bench", "kernels", *CPU, "--shape", "1x64x2x64", "--dtype", "fp32"]


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = main(words)
    except SystemExit as exit_:
        code = int(str(exit_.code))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "--shape", "1x2x3"], "--shape must be BxLxHxD"),
        (["kernels", "--shape", "1x0x1x64"], "lengths of at least 1"),
        (["kernels", "--kernels", "sdpa_ref,flesh"], "got 'flesh'"),
        (["kernels", "--dtype", "int8"], "--dtype must be one of"),
        (["kernels", "--dtype", ","], "--dtype must be one of"),
        (["kernels", "--qk-dtype", "fp16", "--dtype", "bf16"], "--qk-dtype must be fp32"),
        (["kernels", "--rounds", "1"], "--rounds must be at least 2"),
        (["kernels", "--seconds", "0"], "--seconds must be above 0"),
        (["kernels", "--threads", "0"], "--threads must be at least 1"),
        (["kernels", "--device", "tpu"], "--device must be cpu"),
        (["kernels", "--device", "cuda:99"], "torch sees"),
        (["kernels", "--picture", "gif"], "invalid choice"),
        (["step", "--layers", "31"], "at most 30, got 31"),
        (["step", "--layers", "few"], "got 'few'"),
        (["step", "--size", "896x511"], "--size: width and height"),
        (["step", "--size", "big"], "--size must be WxH"),
        (["step", "--frames", "80"], "--frames: frames must be 4*n + 1"),
        (["step", "--backends", "fa4"], "got 'fa4'"),
        (["step", "--batch", "0"], "--batch must be at least 1"),
        (["step", "--batch", "2", "--fill", "1,0"], "--fill must be"),
        (["step", "--fill", "1,0.5"], "--fill must be"),
        (["step", "--source", "wan22"], "WAN22_DIR"),
        (["rope", "--routes", "flashinfer"], "got 'flashinfer'"),
        (["rope", "--routes", ""], "--routes must name"),
        (["rope", "--frames", "4"], "--frames: frames must be 4*n + 1"),
        (["rope", "--size", "100x100"], "--size: width and height"),
        (["suite"], "--output"),
        (["suite", "--output", "x.txt"], "--output must end in .csv"),
        (["suite", "--output", "x.csv", "--settings", "mine"], "cpu-small; got 'mine'"),
        (["suite", "--output", "x.csv", "--test-frames", "24"], "--test-frames: frames must"),
        (["suite", "--output", "x.csv", "--test-frames", "a"], "--test-frames must be an integer"),
        (["suite", "--output", "x.csv", "--blocks", "0"], "--blocks must be at least 1"),
        (["suite", "--output", "x.csv", "--backends", ""], "--backends must name"),
        (["flops"], "invalid choice"),
    ],
)
def test_bad_options(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WAN22_DIR", raising=False)
    code, out, err = run(["bench", *words], capsys)
    assert code == 2
    assert message in err
    assert out == ""


def test_kernels_measures_each_kernel_against_torch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, native: str
) -> None:
    code, out, err = run([*KERNELS, "--out", str(tmp_path)], capsys)
    assert code == 0
    assert "[1/2] matmul fp32" in err and "[2/2] 1x64x2x64 fp32" in err, "no terminal: plain lines"
    found = json.loads((tmp_path / "kernels.json").read_text())
    rows = {row["kernel"]: row for row in found["rows"]}
    best = op.kernels()[0]
    assert "torch" in rows and rows["torch"]["speedup"] == 1.0
    assert any(row["ours"] for row in rows.values())
    for name, row in rows.items():
        assert name in out
        assert len(row["samples_ms"]) == row["iters"] == 2
        assert 0 < row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"]
        assert row["tflops"] == pytest.approx(4 * 2 * 64 * 64 * 64 / row["p50_ms"] / 1e9, rel=1e-4)
        limit = 0.05 if row["lossy"] else 1e-5
        assert row["max_error"] < limit, f"{name} against float64"
    assert {s["what"] for s in found["skipped"]} >= {"fa2", "fa3", "sage", "xformers"}
    assert all(s["reason"] for s in found["skipped"])
    environment = found["environment"]
    assert environment["torch"] == torch.__version__ and environment["cpu"] and best
    assert str(Path.home()) not in json.dumps(found) or len(str(Path.home())) < 3
    table = list(csv.DictReader(io.StringIO((tmp_path / "kernels.csv").read_text())))
    assert [row["kernel"] for row in table] == [row["kernel"] for row in found["rows"]]
    text = (tmp_path / "kernels.md").read_text()
    assert text.count("\n| ") == 1 + len(rows) and "```json" in text


def test_kernels_as_json_names_only_what_was_asked(
    capsys: pytest.CaptureFixture[str], native: str
) -> None:
    name = next(k.name for k in op.kernels() if k.name == "sdpa_ref")
    code, out, _ = run([*KERNELS, "--kernels", name, "--json"], capsys)
    assert code == 0
    assert [row["kernel"] for row in json.loads(out)["rows"]] == [name, "torch"]


def test_a_kernel_that_is_wrong_shows_in_its_error(native: str) -> None:
    call = parse_shape("1x64x2x64")
    query, key, value = kernels.operands(call, torch.float32, None, torch.device("cpu"))
    exact = accuracy.reference(query, key, value)
    out = peers._torch(query, key, value)
    right, wrong = accuracy.error(out, exact), accuracy.error(out + 0.01, exact)
    assert right.max < 1e-5 < 0.009 < wrong.max
    assert wrong.relative_rms > 1e3 * right.relative_rms
    a, b = out.double().flatten() + 0.01, exact.out.flatten()
    expected = 1 - float(a @ b / (a.norm() * b.norm()))
    assert wrong.one_less_cosine == pytest.approx(expected, rel=1e-6)
    assert right.one_less_cosine < 1e-12
    assert accuracy.error(2 * out, exact).one_less_cosine < 1e-12


def test_the_reference_leaves_padding_out() -> None:
    query, key, value = (torch.randn(2, 9, 2, 8) for _ in range(3))
    key[1, 5:] = value[1, 5:] = torch.nan
    exact = accuracy.reference(query, key, value, [9, 5])
    assert bool(exact.out.isfinite().all())
    alone = accuracy.reference(query[1:], key[1:, :5], value[1:, :5])
    assert torch.equal(exact.out[1:], alone.out)


def test_extra_memory_is_beside_the_output() -> None:
    x = torch.randn(256, 256)
    plain = accuracy.extra_bytes(lambda: x + 1, torch.device("cpu"))
    more = accuracy.extra_bytes(lambda: (x + 1) * (x + 2), torch.device("cpu"))
    if plain is None or more is None:
        pytest.skip("this torch's profiler counts no allocations")
    assert plain < 64  # the number 1 is a tensor, too
    assert more == pytest.approx(2 * x.numel() * 4, rel=0.01)


def test_named_shapes_are_scaled_on_a_cpu_and_given_ones_are_not() -> None:
    small = kernels.scaled(WORKLOADS["a14b-720p"])
    assert small.flops <= kernels.CPU_FLOP_MAX and "scaled down" in small.title
    cross = kernels.scaled(WORKLOADS["ti2v-5b-720p-cross"])
    assert cross.seqlen_k == 512 < cross.seqlen_q
    tiny = parse_shape("1x64x2x64")
    assert kernels.scaled(tiny) is not tiny and kernels.scaled(tiny) == tiny


def test_math_that_would_not_fit_is_skipped_before_it_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "free_bytes", lambda device: 1 << 20)
    device = torch.device("cpu")
    math_peer = next(p for p in peers.all_peers(device) if p.name == "torch-math")
    call = parse_shape("1x1024x2x64")
    operands = kernels.operands(call, torch.float32, None, device)
    request = Request.from_tensors(*operands)
    assert "GiB for scores" in str(math_peer.why_not(request))


def tiny_step(**change: Any) -> step.Options:
    arch, is_reduced = step.default_arch("ti2v-5b", torch.device("cpu"), full=False)
    values: dict[str, Any] = {
        "device": torch.device("cpu"),
        "arch": arch,
        "layers": 1,
        "videos": (Video(64, 32, 1),),
        "dtypes": (torch.float32,),
        "rounds": 2,
        "is_reduced": is_reduced,
    }
    return step.Options(**(values | change))


def test_step_measures_each_backend_against_the_stock_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("diffusers")
    found = step.run(tiny_step())
    assert [row["backend"] for row in found.rows][0] == step.STOCK
    assert found.rows[0]["speedup"] == 1.0
    for row in found.rows:
        assert 0 < row["attention"] < row["blocks"] < 1, row["backend"]
        assert row["video_min"] is None, "reduced dimensions must not be extrapolated"
    assert {what for _, what, _ in found.skipped} <= {"fa2", "fa3", step.ROPE}
    assert "Reduced for a CPU" in " ".join(found.notes)


def test_lengths_reach_the_attention_of_a_step() -> None:
    pytest.importorskip("diffusers")
    found = step.run(tiny_step(batch=2, fill=(1.0, 0.5), videos=(Video(64, 64, 1),)))
    assert step.STOCK in {what for _, what, _ in found.skipped}
    stack = step.make_stack(tiny_step(), torch.float32)
    stack.show(Video(64, 64, 1), 2, (1.0, 0.5))
    seen = []

    def attend(q: Any, k: Any, v: Any, k_lens: Any) -> Any:
        seen.append((k.shape[1], None if k_lens is None else k_lens.tolist()))
        return q

    stack.use(attend)
    with torch.inference_mode():
        stack.forward()
    assert seen == [(4, [4, 2]), (512, None)]


def test_a_full_step_is_extrapolated_by_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"step": 10.0, "blocks": 8.0, "attention": 4.0}
    monkeypatch.setattr(step, "split", lambda *args: parts)
    options = tiny_step(is_reduced=False, layers=2)
    row = {"p50_ms": 100.0}
    step._add_split(row, options, None, None, None)  # type: ignore[arg-type]
    # 20 ms outside the blocks, 80 ms in 2 of 30 blocks.
    assert row["full_step_s"] == pytest.approx((20 + 80 * 15) / 1e3)
    assert row["video_min"] == pytest.approx(row["full_step_s"] * 50 / 60)
    assert row["attention"] == 0.4


def test_stock_wan22() -> None:
    folder = os.environ.get("WAN22_DIR")
    if not folder:
        pytest.skip("WAN22_DIR is not set: no checkout of Wan2.2")
    video = Video(64, 64, 5)
    options = tiny_step(wan22=Path(folder), batch=2, fill=(1.0, 0.5), videos=(video,))
    found = step.run(options)
    backends = ["torch-batched", "torch", "chunked", "sdpa", step.ROPE]
    assert [row["backend"] for row in found.rows] == backends
    assert all(0 < row["attention"] < row["blocks"] < 1 for row in found.rows)
    assert any("flash_attn" in reason for _, name, reason in found.skipped if name == step.STOCK)
    stack = step.make_stack(options, torch.float32)
    stack.show(video, 2, (1.0, 0.5))
    seen = []

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: Any) -> torch.Tensor:
        seen.append(k_lens if k_lens is None else k_lens.tolist())
        return q

    stack.use(record)
    with torch.inference_mode():
        stack.forward()
    stack.close()
    assert seen == [[8, 4], None]
    assert not [name for name in sys.modules if name.startswith(model.ALIAS)]


@pytest.mark.parametrize("make", [lambda p: None, lambda p: (p / "wan").mkdir()])
def test_a_folder_that_is_no_wan22(tmp_path: Path, make: Any) -> None:
    make(tmp_path)
    with pytest.raises(model.ModelError, match="must be a checkout of Wan2.2"):
        step.run(tiny_step(wan22=tmp_path))


def test_dimensions_are_those_of_the_models() -> None:
    assert (ARCHS["ti2v-5b"].dim, ARCHS["a14b"].dim) == (3072, 5120)
    small = reduced(ARCHS["ti2v-5b"])
    assert small.ffn / small.dim == pytest.approx(14336 / 3072, rel=0.02)
    assert Video(1280, 704, 121).latent(ARCHS["ti2v-5b"]) == (48, 31, 44, 80)


def test_suite_and_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    small = dataclasses.replace(suite.SETTINGS["cpu-small"], sizes=((64, 32),))
    monkeypatch.setitem(suite.SETTINGS, "cpu-small", small)
    words = ["bench", "suite", *CPU, "--settings", "cpu-small", "--test-frames", "1,5"]
    words += ["--backends", "stock,torch", "--blocks", "2", "--output"]
    file = tmp_path / "a.csv"
    code, out, _ = run([*words, str(file)], capsys)
    assert code == 0 and "64x32x5" in out
    rows = list(csv.DictReader(file.open()))
    assert [(row["frames"], row["backend"], row["yardstick"]) for row in rows] == [
        ("1", "stock", "matmul"),
        ("1", "torch", "stock"),
        ("5", "stock", "matmul"),
        ("5", "torch", "stock"),
    ]
    assert rows[1]["yardstick_ms"] == rows[0]["samples_ms"], "of the same rounds"
    for row in rows:
        assert row["block_rounds"] == "2 2"
        assert len(row["samples_ms"].split()) == len(row["yardstick_ms"].split()) == 4
    code, out, _ = run(["bench", "compare", str(file), str(file)], capsys)
    assert code == 0 and "+0.0%" in out
    assert suite.default_setting(torch.device("cpu")) == "cpu-small"


def test_without_an_action_both_are_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(step, "PUBLISHED", ((64, 32),))
    monkeypatch.setattr(kernels, "CPU_LENGTHS", (64,))
    monkeypatch.setattr(facts, "matmul_tflops", lambda *args: 1.0)
    monkeypatch.setattr(kernels, "CPU_SHAPES", ("clip-vit-h",))
    words = ["bench", *CPU, "--seconds", "1", "--dtype", "fp32", "--out", str(tmp_path)]
    code, out, err = run(words, capsys)
    assert code == 0
    assert "Attention kernels on" in out and "One denoising step" in out
    names = {p.name for p in tmp_path.iterdir()}
    assert {"kernels.csv", "kernels.json", "kernels.md", "step.csv", "step.md"} <= names
    assert "kernels.md into an issue" in err


def small_report() -> Report:
    columns = (Column("name", "name"), Column("share", "share", ".0f", 100), Column("n", "n", "d"))
    rows = [{"name": "a|b", "share": 0.5, "n": 3}, {"name": "c", "share": float("nan"), "n": None}]
    skipped = [("x", "fa2", "not installed"), ("y", "fa2", "not installed"), ("x", "m", "too big")]
    return Report("kernels", "A title", columns, rows, skipped, ["A note."], {"torch": "2"})


def test_a_report_reads_as_text_markdown_and_json() -> None:
    text = report.as_text(small_report())
    assert "  a|b      50  3" in text and "  c         -  -" in text
    assert "fa2  not installed\n" in text, "told once, where it holds everywhere"
    assert "m    too big (x)" in text and "- A note." in text
    markdown = report.as_markdown(small_report())
    assert "| a\\|b | 50 | 3 |" in markdown and "|---|---:|---:|" in markdown
    found = json.loads(json.dumps(report.as_dict(small_report()), allow_nan=False))
    assert found["rows"][1] == {"name": "c", "share": None, "n": None}


def test_no_rows_are_said() -> None:
    empty = small_report()
    empty.rows = []
    assert "nothing could be measured" in report.as_text(empty)
    with pytest.raises(plots.NoPicture):
        plots.draw(empty, Path("never"))


def test_pictures_need_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(plots.NoPicture, match="pip install matplotlib"):
        plots.draw(small_report(), tmp_path / "x")


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress.make(2)
    for word in ("one", "two"):
        bar.step(word)
    bar.close()
    assert capsys.readouterr().err == "[1/2] one\n[2/2] two\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_progress_on_a_terminal_names_each_step(
    has_tqdm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    bar = progress.make(2, stream)
    for word in ("one", "two"):
        bar.step(word)
    bar.close()
    assert "one" in stream.getvalue()
