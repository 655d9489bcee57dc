# SPDX-License-Identifier: Apache-2.0
"""test_cuda_ship.py - the cubins of a build: made once, no stale ones, and a build without them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from source_tree import ROOT
from wan_attn.cuda import nvrtc, rows, ship, store

SHIP = ROOT / "wan_attn/cuda/ship.py"
HELPERS = ["wan_attn_find_scale", "wan_attn_convert"]
needs_nvrtc = pytest.mark.skipif(ship.compiler() is None, reason="no NVRTC 12 here")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two small kernels for one GPU; the names of their cubins."""
    jobs = rows.jobs_for(75, HELPERS)
    monkeypatch.setattr(ship, "wanted", lambda archs: list(jobs))
    return sorted(job.stem for job in jobs)


@needs_nvrtc
def test_a_build_compiles_once(few: list[str], tmp_path: Path) -> None:
    into, kept = tmp_path / "cubin", tmp_path / "kept"
    said = ship.ship(into, kept, 2)
    assert re.match(r"2 CUDA kernels for sm_75 sm_80 .* MiB \(2 compiled by NVRTC 12", said)
    assert sorted(store.names(into)) == few
    first = {name: store.read(into, name) for name in few}
    assert all(data and data.startswith(b"\x7fELF") for data in first.values())
    assert "(0 compiled by" in ship.ship(into, kept, 2), "from what was kept"
    damaged = next(kept.glob("*.cubin"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    store.write(into, "of-old-sm_75-0", b"left by another checkout")
    assert "(1 compiled by" in ship.ship(into, kept, 2)
    assert {name: store.read(into, name) for name in store.names(into)} == first
    if sys.platform != "win32":
        assert {f.stat().st_mode & 0o777 for f in into.iterdir()} == {0o644}, "others read it, too"


WORKERS = {
    "a kernel that does not compile": (
        "import sys\nfor line in sys.stdin: print('\"error: its log\"', flush=True)",
        "wan_attn_find_scale for sm_75: error: its log",
    ),
    "a compiler that crashes": (
        "input()",
        "wan_attn_find_scale for sm_75: the compiler's process died",
    ),
}


@needs_nvrtc
@pytest.mark.parametrize("worker", WORKERS)
def test_a_build_whose_compiler_fails(
    worker: str,
    few: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, expected = WORKERS[worker]
    (tmp_path / "worker.py").write_text(text)
    monkeypatch.setattr(ship, "__file__", str(tmp_path / "worker.py"))
    words = ["--into", str(tmp_path / "cuda"), "--kept", str(tmp_path / "kept"), "--workers", "1"]
    assert ship.main(words) == 0, "the package installs all the same"
    out = capsys.readouterr().out
    assert "this build leaves out ready CUDA kernels, so that each is compiled at its first" in out
    assert expected in out
    assert not (tmp_path / "cuda/cubin").exists()
    assert (tmp_path / "cuda/src/cuda/sdpa_rows.def").exists()
    assert ship.main([*words, "--cubins", "1"]) == 1


@needs_nvrtc
def test_a_worker_answers_what_the_compiler_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = io.StringIO(f'["{HELPERS[0]}", 75]\n["{HELPERS[1]}", 75]\n')
    monkeypatch.setattr(sys, "stdin", lines)
    options = rows.Job.options
    broken = [*options(rows.jobs_for(75, HELPERS[:1])[0]), "--nonsense"]
    monkeypatch.setattr(
        rows.Job, "options", lambda j: broken if j.name == HELPERS[0] else options(j)
    )
    ship.work(tmp_path)
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert "NVRTC 12" in first and "--nonsense" in first and second == ""
    assert len(store.names(tmp_path)) == 1


@needs_nvrtc
def test_an_old_compiler_ships_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(nvrtc.load(ship.compiler()), "archs", (50, 75, 80, 86, 87, 90))

    def wanted(archs: Iterable[int]) -> list[Any]:
        asked.extend(archs)
        return []

    monkeypatch.setattr(ship, "wanted", wanted)
    assert "for sm_75 sm_80 sm_86 sm_90, 0.0 MiB" in ship.ship(tmp_path / "a", tmp_path / "b", 1)
    assert asked == [75, 80, 86, 90]
    for machine, boards in (("x86_64", []), ("arm64", []), ("aarch64", [87])):
        asked.clear()
        ship.ship(tmp_path / "a", tmp_path / "b", 1, machine)
        assert asked == [75, 80, 86, 90, *boards], machine


def test_only_a_compiler_of_cuda_12_makes_what_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(*versions: tuple[int, int] | None) -> nvrtc.Found | None:
        there = tuple(nvrtc.Found(Path(f"lib{v}"), None, v) for v in versions)
        monkeypatch.setattr(nvrtc, "found", lambda: there)
        return ship.compiler()

    assert at() is None and at((13, 0)) is None and at(None) is None
    newest = at((12, 1), (13, 2), (12, 8), (12, 6))
    assert newest is not None and newest.version == (12, 8)


def start(tmp_path: Path, *words: str) -> tuple[int, str]:
    """As setup.py does, but by a Python that has nothing installed: no torch, no NVRTC."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", SHIP, "--into", tmp_path / "cuda", "--kept", tmp_path, *words],
        env={"PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.skipif(
    any(
        one.version and one.version[0] == 12 and "site-packages" not in one.path.parts
        for one in nvrtc.found()
    ),
    reason="a CUDA 12 toolkit would be found",
)
def test_a_build_without_torch_and_without_a_compiler(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    code, said = start(tmp_path, "--record", str(record))
    assert (code, len(said.splitlines())) == (0, 1), said
    assert "no NVRTC 12.x here; to get them, install wan_attn without --no-build-isolation" in said
    assert "pip install nvidia-cuda-nvrtc-cu12==12.8.93" in said
    recorded = json.loads(record.read_text())
    assert recorded["cubins"] == 0 and recorded["left_out"][0] in said
    copied = {
        str(f.relative_to(tmp_path / "cuda/src")) for f in (tmp_path / "cuda/src").rglob("*.*")
    }
    assert {"cuda/sdpa_rows.def", "cuda/sdpa_sm80.cuh", "cuda/ptx/ptx.cuh", "cuda/args.h"} <= copied
    assert start(tmp_path, "--cubins", "1")[0] == 1
    code, said = start(tmp_path, "--cubins", "0", "--editable")
    assert code == 0 and "WAN_ATTN_CUDA=0; to get them" in said
    assert not (tmp_path / "cuda/src").exists(), "an editable package reads csrc/"


def test_a_packages_own_texts_are_read(tmp_path: Path) -> None:
    """As in a wheel: the same kernels, by the same names, from the copy."""
    copy = tmp_path / "wan_attn" / "cuda"
    copy.mkdir(parents=True)
    for module in SHIP.parent.glob("*.py"):
        (copy / module.name).write_bytes(module.read_bytes())
    (tmp_path / "wan_attn/config.py").write_bytes((ROOT / "wan_attn/config.py").read_bytes())
    ship.copy_texts(copy / "src")
    code = f"""import sys, types
package = types.ModuleType("wan_attn")
package.__path__ = [{str(copy.parent)!r}]
sys.modules["wan_attn"] = package
from wan_attn.cuda import rows, sources
print(sources.root())
print(*(job.stem for job in rows.jobs_for(86)))
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    root, stems = done.stdout.splitlines()
    assert root == str(copy / "src")
    assert stems.split() == [job.stem for job in rows.jobs_for(86)]


def test_the_build_asks_for_what_the_message_names() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project]")[0]
    asked = set(re.findall(r'"(nvidia-cuda-nvrtc[^;"]*)', text))
    assert asked == {ship.REQUIREMENT}


@needs_nvrtc
@pytest.mark.parametrize("is_told", [False, True])
def test_it_runs_in_an_isolated_python(is_told: bool, tmp_path: Path) -> None:
    """ComfyUI portable's Python is one: it ignores PYTHONPATH, and setup.py says --site."""
    found = ship.compiler()
    assert found is not None
    command = [sys.executable, "-I", "-S", str(SHIP), "--worker", "--kept", str(tmp_path)]
    if is_told:
        # site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12
        command.append(f"--site={found.path.parents[3]}")
    done = subprocess.run(
        command,
        input=json.dumps([HELPERS[0], 75]) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == ("" if is_told else "NVRTC is gone")
