# SPDX-License-Identifier: Apache-2.0
"""test_demo.py - the demo on a very small video: its files, its verdict, its messages."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wan_attn import attention, config
from wan_attn.__main__ import main
from wan_attn.demo import compare, options, pipeline, runs, text, wan22
from wan_attn.integrations import diffusers as wan_diffusers

for package in ("diffusers", "transformers"):
    pytest.importorskip(package, reason="needs the packages of the extra `demo`")
Image = pytest.importorskip("PIL.Image", reason="needs the packages of the extra `demo`")
render = importlib.import_module("wan_attn.demo.render")  # needs Pillow

TINY = ["--quick", "--frames", "5", "--height", "64", "--width", "96", "--steps", "2"]
TOKENS = 2 * 4 * 6


pytestmark = pytest.mark.usefixtures("default_settings")


def tiny_options(folder: Path, **changes: Any) -> options.Options:
    asked: dict[str, Any] = {
        **dict.fromkeys(("model", "prompt", "frames", "height", "width", "steps")),
        **{"seed": 0, "dtype": "auto", "device": "cpu", "is_quick": True},
        "output": str(folder),
        **changes,
    }
    return options.resolve(**asked)


def run(folder: Path, *argv: str) -> tuple[int, dict[str, Any]]:
    code = main(["demo", "--device", "cpu", *TINY, "--output", str(folder), *argv])
    return code, json.loads((folder / "report.json").read_text(encoding="utf-8"))


# ---- one run, seen from all sides


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """(folder, report.json, what the terminal showed) of one ordinary run."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "demo-out"
    command = [sys.executable, "-m", "wan_attn", "demo", "--device", "cpu", *TINY]
    done = subprocess.run(
        [*command, "--output", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "the first thing a user sees is calm"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return folder, report, done.stdout


def test_report_says_what_ran(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, report, _ = finished
    assert report["result"] == "same"
    assert report["shape"] == {
        **{"frames": 5, "height": 64, "width": 96, "steps": 2},
        "tokens": TOKENS,
    }
    assert (report["dtype"], report["device"]) == ("float32", "cpu")
    assert report["machine"]["torch"] == torch.__version__
    assert len(report["steps"]["stock"]["seconds"]) == 2
    assert report["speed_ratio"] == pytest.approx(
        report["steps"]["stock"]["median_seconds"] / report["steps"]["wan_attn"]["median_seconds"]
    )
    # 2 layers, 2 steps, 2 forwards a step (guidance), each with self- and cross-attention.
    calls = {row["shape"]: row["calls"] for row in report["attention_calls"]}
    assert calls == {f"1x{TOKENS}x2x128": 8, f"1x{TOKENS}:512x2x128": 8}
    for row in report["attention_calls"]:
        assert f"backend={row['backend']}" in " ".join(report["log"])
        assert (row["kernel"] or row["backend"]) in report["attention_by"] + row["backend"]


def test_difference_is_rounding_and_not_nothing(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    _, report, _ = finished
    names = [row["name"] for row in report["differences"]]
    assert names == ["latents, first step", "latents, last step", "frames (0..1)"]
    for row in report["differences"]:
        assert row["ok"]
        for measure in ("max", "rms"):
            assert 0 < row["rounding_alone"][measure] < 1e-3, "the yardstick is rounding"
            assert row["wan_attn"][measure] <= row["allowed"][measure]
    call = report["one_attention_call"]
    assert call["ok"]
    assert 0 < call["wan_attn_max_error"] <= call["allowed_max_error"] < 1e-3


def test_files_are_there(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, report, _ = finished
    files = report["files"]
    assert {path.name for path in folder.iterdir()} == {
        *("report.json", "report.md"),
        *(files["video"], files["picture"]),
    }
    with Image.open(folder / files["picture"]) as picture:
        assert picture.width > 3 * 96
        assert len(set(picture.convert("L").tobytes())) > 100, "a picture, not a blank sheet"
    if files["video"].endswith(".gif"):
        with Image.open(folder / files["video"]) as video:
            assert (video.n_frames, video.size) == (5, (96, 64))


def test_words_tell_the_same_as_the_numbers(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    folder, report, shown = finished
    page = (folder / "report.md").read_text(encoding="utf-8")
    ratio = f"{report['speed_ratio']:.2f}x"
    for words in (shown, page):
        assert text.SAME in words
        assert ratio in words
        assert report["attention_by"] in words
    lines = shown.replace(str(folder), "demo-out").splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 120
    assert f"| 1x{TOKENS}:512x2x128 | 8 |" in page


# ---- the pipeline


def test_attention_is_not_trivial_and_frames_are_not_grey(tmp_path: Path) -> None:
    asked = tiny_options(tmp_path, frames=5, height=64, width=96, steps=1)
    subject = pipeline.make(asked)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # Of a prompt of 512 tokens most are padding, and all paddings are alike.
        if key.shape[1] == query.shape[1]:
            seen.append((query, key))
        return wan_diffusers.attend(query, key, value)

    stock = runs.stock(subject, asked, "")
    wan_diffusers.replace_processors(subject.pipe.transformer, look)
    same = runs.stock(subject, asked, "")
    wan_diffusers.restore_processors(subject.pipe.transformer)
    assert len(seen) == 4
    for query, key in seen:
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        weights = scores.softmax(dim=-1)
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(dim=-1).mean()
        assert float(entropy) < math.log(key.shape[1]) - 0.3, "attention is nearly uniform"
    assert stock.frames.std() > 0.05
    assert np.abs(stock.frames[0] - stock.frames[-1]).mean() > 0.01, "nothing moves"
    # Attention matters to the picture: without it the frames are others by far more than rounding.
    wan_diffusers.replace_processors(subject.pipe.transformer, lambda q, k, v: torch.zeros_like(q))
    without = runs.stock(subject, asked, "")
    assert np.abs(without.frames - stock.frames).mean() > 0.01
    assert np.abs(same.frames - stock.frames).max() < 1e-3


def test_same_seed_same_video_other_prompt_other_video(tmp_path: Path) -> None:
    def frames(**changes: Any) -> Any:
        asked = tiny_options(tmp_path, frames=5, height=64, width=64, steps=1, **changes)
        return runs.stock(pipeline.make(asked), asked, "").frames

    first = frames()
    assert np.array_equal(first, frames())
    assert np.abs(first - frames(prompt="two cats")).max() > 0.01
    assert np.abs(first - frames(seed=1)).max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    code, report = run(tmp_path, "--dtype", dtype)
    assert code == 0
    assert report["dtype"] == dtype
    assert report["differences"][0]["rounding_alone"]["max"] > 1e-5


def test_weights_from_disk(tmp_path: Path) -> None:
    model = tmp_path / "my-model"
    pipeline.make(tiny_options(tmp_path, seed=5)).pipe.save_pretrained(model)
    code, report = run(tmp_path / "out", "--model", str(model))
    assert code == 0
    assert report["model"]["weights"] == "my-model"
    assert report["model"]["attention_layers"] == 4


def test_sizes_are_checked_against_the_model(tmp_path: Path) -> None:
    model = tmp_path / "ti2v"
    for name, content in {
        "model_index.json": {"_class_name": "WanPipeline"},
        "vae/config.json": {"scale_factor_spatial": 16},
        "transformer/config.json": {"patch_size": [1, 2, 2]},
    }.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(json.dumps(content))
    asked = {"model": str(model), "is_quick": False}
    assert tiny_options(tmp_path, **asked).size == options.REAL
    with pytest.raises(options.DemoError, match="--height must be a multiple of 32, got 112"):
        tiny_options(tmp_path, height=112, **asked)
    with pytest.raises(options.DemoError, match="cannot be loaded: .*download complete"):
        pipeline.make(tiny_options(tmp_path, **asked))


# ---- the verdict


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(lambda q, k, v, sdpa: sdpa(q, k, v, scale=1.001 / 128**0.5), id="scale"),
        pytest.param(lambda q, k, v, sdpa: sdpa(q, k[:, :-1], v[:, :-1]), id="last key"),
        pytest.param(lambda q, k, v, sdpa: sdpa(q, k, v) * math.nan, id="NaN"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_planted_error_is_found(
    plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sdpa = attention.sdpa
    monkeypatch.setattr(attention, "sdpa", lambda q, k, v: plant(q, k, v, sdpa))
    code, report = run(tmp_path)
    shown = capsys.readouterr().out
    assert code == 1
    assert report["result"] == "different"
    assert not any(row["ok"] for row in report["differences"])
    assert text.DIFFERENT in shown
    assert "too far: latents, first step" in shown
    assert text.ADVICE in shown
    assert text.DIFFERENT in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_backend_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wan_attn.backends import REGISTRY

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted failure")

    monkeypatch.setenv("USE_ATTENTION_BACKEND", "sdpa")
    config.refresh()
    monkeypatch.setattr(REGISTRY["sdpa"], "run", broken)
    code, report = run(tmp_path)
    assert code == 0
    assert "planted failure" in capsys.readouterr().out
    assert "planted failure" in " ".join(report["log"])


def made_run(shift: float) -> runs.Run:
    base = torch.linspace(-1, 1, 1000)
    frames = (base.reshape(1, 10, 100, 1).expand(1, 10, 100, 3) * 0.5 + 0.5 + shift).numpy()
    return runs.Run((1.0, 2.0, 4.0), base + shift, base + shift, frames)


@pytest.mark.parametrize(
    ("ours", "is_ok"), [(0.0, True), (2.9e-4, True), (3.2e-4, False), (math.nan, False)]
)
def test_bound_is_three_times_rounding_alone(ours: float, is_ok: bool) -> None:
    rows = compare.compare(made_run(0), made_run(ours), made_run(1e-4), torch.float32)
    assert [row.is_ok for row in rows] == [is_ok] * 3


def test_a_broken_yardstick_allows_nothing() -> None:
    rows = compare.compare(made_run(0), made_run(math.nan), made_run(math.nan), torch.float32)
    assert not any(row.is_ok for row in rows)


def test_median_leaves_out_the_first_step() -> None:
    assert made_run(0).median_step_seconds == 3.0


# ---- files


def test_amplification_is_a_round_number_that_shows() -> None:
    stock = np.zeros((2, 8, 8, 3), np.float32)
    assert render.amplification(stock, stock) == 0
    assert render.amplification(stock, stock + np.float32(1e-4)) == 5000
    assert render.amplification(stock, stock + np.float32(0.9)) == 1


def test_gif_where_there_is_no_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.random.default_rng(0).random((3, 16, 32, 3), dtype=np.float32)
    (tmp_path / "video.mp4").write_bytes(b"of an earlier run")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    path = render.write_video(frames, tmp_path, 8)
    assert path.name == "video.gif"
    assert not (tmp_path / "video.mp4").exists()
    with Image.open(path) as video:
        assert video.n_frames == 3


@pytest.mark.skipif(
    importlib.util.find_spec("imageio_ffmpeg") is None, reason="needs imageio-ffmpeg"
)
def test_mp4_where_there_is_ffmpeg(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).random((3, 16, 32, 3), dtype=np.float32)
    (tmp_path / "video.gif").write_bytes(b"of an earlier run")
    path = render.write_video(frames, tmp_path, 8)
    assert path.read_bytes()[4:8] == b"ftyp"
    assert not (tmp_path / "video.gif").exists()


# ---- messages: one line, and what to do


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--frames", "18"], "--frames must be 4n + 1, got 18; take 17 or 21"),
        (["--frames", "0"], "--frames must be 4n + 1, got 0; take 1 or 5"),
        (["--height", "100"], "--height must be a multiple of 16, got 100; take 96 or 112"),
        (["--width", "8"], "--width must be a multiple of 16, got 8; take 16 or 32"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got tpu"),
        (["--device", "cuda:99"], "--device cuda:99 does not exist"),
        (["--model", "nowhere"], "--model must be a folder, got nowhere"),
        (["--model", "empty"], "has no model_index.json; for Wan-AI's original files"),
        (["--model", "image"], "must hold a WanPipeline (text to video), got WanImageToVideo"),
        (["--model", "torn"], "download it again"),
        (["--output", "file"], "--output file cannot be written"),
        (["--output", "file/below"], "pass another folder"),
        (["--ckpt-dir", "empty"], "set WAN22_DIR to a checkout"),
        (["--ckpt-dir", "empty", "--model", "empty"], "pass one of them"),
        (["--ckpt-dir", "empty", "--dtype", "float16"], "--dtype means nothing to Wan2.2's"),
        (["--ckpt-dir", "empty", "--device", "cpu"], "--device means nothing to Wan2.2's"),
        (["--ckpt-dir", "empty", "--quick"], "--quick means nothing to Wan2.2's"),
        (["--task", "ti2v-5B"], "--task goes with --ckpt-dir"),
    ],
)
def test_bad_input(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "image", "torn"):
        Path(name).mkdir()
    Path("file").touch()
    Path("image/model_index.json").write_text('{"_class_name": "WanImageToVideo"}')
    Path("torn/model_index.json").write_text('{"_class_name": "Wan')
    assert main(["demo", *argv]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


@pytest.mark.parametrize("module", options.PACKAGES)
def test_missing_packages(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    assert main(["demo"]) == 2
    shown = capsys.readouterr().err
    assert f"{options.PACKAGES[module]} is not installed" in shown
    assert options.INSTALL in shown


def test_bad_variables_stop_it_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "fast")
    monkeypatch.setattr(config, "_current", None)
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "USE_ATTENTION_BACKEND must be one of" in capsys.readouterr().err


# ---- stock Wan2.2's generate.py

SCRIPT = """
import sys
from pathlib import Path
words = sys.argv[1:]
Path(words[words.index("--save_file") + 1]).write_text(" ".join(words))
raise SystemExit(3 if "fail" in words else 0)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Wan2.2, on a machine with a GPU."""
    folder = tmp_path / "Wan2.2"
    folder.mkdir()
    (folder / "generate.py").write_text(SCRIPT)
    (tmp_path / "Wan2.2-TI2V-5B").mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WAN22_DIR", str(folder))
    config.refresh()
    return tmp_path


def test_generate_runs_with_our_options(checkout: Path) -> None:
    out = checkout / "out"
    code = main(
        ["demo", "--ckpt-dir", str(checkout / "Wan2.2-TI2V-5B"), "--output", str(out)]
        + ["--frames", "17", "--steps", "4", "--prompt", "a cat", "--seed", "7"]
    )
    assert code == 0
    words = (out / "video.mp4").read_text()
    assert "--task ti2v-5B" in words
    assert "--size 1280*704 --base_seed 7" in words
    assert words.endswith("--prompt a cat --frame_num 17 --sample_steps 4")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (report["result"], report["exit_code"]) == ("done", 0)
    assert str(checkout) not in report["command"], "people paste this into issues"


def test_exit_code_of_generate_is_ours(checkout: Path) -> None:
    out = checkout / "out"
    argv = ["--ckpt-dir", str(checkout / "Wan2.2-TI2V-5B"), "--output", str(out)]
    assert main(["demo", *argv, "--prompt", "fail"]) == 3
    assert json.loads((out / "report.json").read_text())["result"] == "failed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "gone"}, "--ckpt-dir must be a folder"),
        ({"weights": "."}, "pass --task ti2v-5B or t2v-A14B"),
        ({"height": 480}, "must be given together"),
        ({"frames": 16}, "--frames must be 4n + 1, got 16"),
    ],
)
def test_what_generate_would_stumble_over(
    changes: dict[str, Any], message: str, checkout: Path
) -> None:
    asked: dict[str, Any] = {
        **dict.fromkeys(("task", "prompt", "frames", "height", "width", "steps")),
        **{"weights": "Wan2.2-TI2V-5B", "output": checkout, "seed": 0},
        **changes,
    }
    asked["weights"] = checkout / asked["weights"]
    with pytest.raises(options.DemoError, match=re.escape(message)):
        wan22.command(wan22.Asked(**asked), str(checkout / "Wan2.2"))


def test_generate_needs_a_gpu(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = wan22.Asked(checkout / "Wan2.2-TI2V-5B", None, checkout, None, 0, *[None] * 4)
    with pytest.raises(options.DemoError, match="needs a GPU that torch can use"):
        wan22.command(asked, str(checkout / "Wan2.2"))
    with pytest.raises(options.DemoError, match="has no generate.py"):
        wan22.command(asked, str(checkout))
