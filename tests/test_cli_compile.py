# SPDX-License-Identifier: Apache-2.0
"""test_cli_compile.py - `wan-attn compile`: what it makes, what it prints, how it fails."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from source_tree import read
from test_cuda_images import MERGE, ROW, WITH_12_8, Machine, full, machine, ship
from wan_attn.__main__ import main
from wan_attn.cli import compile as command
from wan_attn.cuda import nvrtc, rows, store
from wan_attn.doctor import cuda
from wan_attn.doctor.facts import Gpu

README = Path("README.md")

__all__ = ["machine"]  # the fixture


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(["compile", *argv])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def table(text: str) -> list[list[str]]:
    return [line.split(maxsplit=4) for line in text.split("\n\n")[0].splitlines()[1:]]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "cuda_devices", lambda: ([], "torch sees none"))


@pytest.mark.parametrize("text", ["86", "8.6", "sm_86", " SM_86 "])
def test_an_architecture(text: str) -> None:
    assert command.architecture(text) == 86


@pytest.mark.parametrize("text", ["", "8", "8.66", "sm86", "90a", "rtx3090", "-86", "1200"])
def test_no_architecture(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a compute capability"):
        command.architecture(text)


def test_it_fills_the_cache(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    ship(machine, MERGE, 86)
    code, out = run(capsys, "--arch", "8.9", "12.0")
    assert code == 0
    lines = table(out)
    expected = [[j.name, j.target] for arch in (89, 120) for j in rows.jobs_for(arch)]
    assert [line[:2] for line in lines] == expected
    origins = {line[4] for line in lines if line[:2] != [MERGE, "sm_89"]}
    assert origins == {"NVRTC 12.8"}
    assert [MERGE, "sm_89"] in [line[:2] for line in lines if line[4] == "shipped"]
    assert f"cache: {machine.cache}" in out
    assert len(store.names(machine.cache)) == len(expected) - 1
    machine.restart()
    code, out = run(capsys, "--arch", "89")
    assert code == 0 and {line[4] for line in table(out)} == {"cached", "shipped"}
    assert machine.asked == len(expected) - 1


def test_force_compiles_what_is_cached(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        code, out = run(capsys, "--arch", "89", "--row", ROW, "--force")
        assert code == 0 and table(out)[0][4] == "NVRTC 12.8"
    assert machine.asked == 2


def test_list_compiles_nothing(
    machine: Machine, capsys: pytest.CaptureFixture[str], no_gpu: None
) -> None:
    code, out = run(capsys, "--list", "--row", ROW)
    lines = [line.split(maxsplit=2) for line in out.splitlines()[1:] if line.startswith(ROW)]
    assert code == 0 and machine.asked == 0 and not machine.cache.exists()
    assert [line[1] for line in lines] == [f"sm_{arch}" for arch in rows.gpus() if arch >= 80]
    assert {line[2] for line in lines} == {"to compile"}


def test_list_has_a_line_for_each_gpu(
    machine: Machine, capsys: pytest.CaptureFixture[str], no_gpu: None
) -> None:
    for arch in rows.SHIPPED:
        for job in rows.jobs_for(arch):
            ship(machine, job.name, arch)
    run(capsys, "--arch", "87", "--row", MERGE)
    code, out = run(capsys, "--list")
    *lines, _, where = out.splitlines()
    assert code == 0 and where == f"cache: {machine.cache}"
    assert [line.split()[0] for line in lines] == [f"sm_{arch}" for arch in rows.gpus()]
    told = {line.split()[0]: line for line in lines}
    found = cuda.facts([])
    for arch in [*found["shipped"], *found["also"]]:  # as doctor says
        assert told.pop(f"sm_{arch}").split(maxsplit=1)[1] == f"{len(rows.jobs_for(arch))} shipped"
    count = len(rows.jobs_for(87))
    assert f"{count - 1} to compile" in told["sm_87"] and "1 cached" in told.pop("sm_87")
    assert told and all(re.search(r" \d+ to compile$", line) for line in told.values())


def test_all_compiles_for_every_gpu_of_the_list(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(capsys, "--all", "--row", MERGE)
    assert code == 0 and [line[1] for line in table(out)] == [f"sm_{a}" for a in rows.gpus()]


def test_the_gpus_of_this_machine(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [Gpu(i, "a card", capability, 24.0) for i, capability in enumerate([(8, 9), (8, 9)])]
    monkeypatch.setattr(command, "cuda_devices", lambda: (gpus, ""))
    code, out = run(capsys, "--row", MERGE)
    assert code == 0 and [line[:2] for line in table(out)] == [[MERGE, "sm_89"]]


def test_no_gpu_and_none_named(
    machine: Machine, capsys: pytest.CaptureFixture[str], no_gpu: None
) -> None:
    code, out = run(capsys)
    assert code == 2 and machine.asked == 0
    assert "torch sees none" in out and "--arch 86 89" in out and "RTX 40 and L4: 89" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "61"], "7.5 or newer"),
        (["--arch", "89", "--row", "nonsense"], "got 'nonsense'"),
        (["--arch", "75", "--row", ROW], "has no tile for compute capability 7.5"),
        (["--arch", "89", "--row", MERGE, "nonsense"], "got 'nonsense'"),
    ],
)
def test_nothing_to_do(
    machine: Machine, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    code, out = run(capsys, *argv)
    assert code == 2 and message in " ".join(out.split()) and machine.asked == 0


def test_a_row_that_some_of_the_gpus_have(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(capsys, "--arch", "75", "89", "--row", ROW)
    assert code == 0 and [line[:2] for line in table(out)] == [[ROW, "sm_89"]]


def test_a_compiler_that_fails(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.has(WITH_12_8, fails={WITH_12_8: nvrtc.NvrtcError("error: a line of its log")})
    code, out = run(capsys, "--arch", "89", "--row", ROW, MERGE)
    assert code == 1 and out.count("FAILED, see below") == 2
    assert out.count("a line of its log") == 2, "each with its reason"


def test_no_compiler(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.has()
    code, out = run(capsys, "--arch", "89", "--row", MERGE)
    assert code == 1 and "pip install nvidia-cuda-nvrtc-cu12" in out


def test_a_cache_that_cannot_be_written(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    full(machine)
    code, out = run(capsys, "--arch", "89", "--row", MERGE)
    assert code == 1, "filling the cache is what it was asked for"
    out = " ".join(out.split())
    assert "compiled, but not saved" in out and "is full" in out and "WAN_ATTN_CACHE_DIR" in out


def test_doctor_and_readme_name_the_same_cards(machine: Machine) -> None:
    for arch in rows.SHIPPED:
        for job in rows.jobs_for(arch):
            ship(machine, job.name, arch)
    found = cuda.facts([])
    assert found["shipped"] == list(rows.SHIPPED) and found["also"] == [89, 121]
    text = re.search(r"compute capability ([\d., and]+)\.", " ".join(read(README).split()))
    assert text, "README's sentence"
    named = {int(a.replace(".", "")) for a in re.findall(r"\d+\.\d", text[1])}
    assert named == {*found["shipped"], *found["also"]}


def test_doctor_tells(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SHIPPED", (75,))
    for job in rows.jobs_for(75):
        ship(machine, job.name, 75)
    machine.get()
    main(["doctor", "--no-selftest"])
    section = capsys.readouterr().out.split("\nCUDA kernels")[1].split("\n\n")[0]
    text = " ".join(section.split())
    assert "ready-made sm_75 compiler NVRTC 12.8" in text
    assert "NVRTC 12.8 (lib12)" in text
    assert "1 kernels, 0.0 MiB" in text
    machine.has()
    for file in machine.shipped.iterdir():
        file.rename(file.with_name(f"old{file.name}"))
    machine.cache.chmod(0o777)
    main(["doctor", "--no-selftest"])
    text = " ".join(capsys.readouterr().out.split())
    assert "none in this build: csrc/cuda has changed since, build again" in text
    assert "compiler none: no NVRTC 12.x or 13.x here" in text
    assert "can be written to by other users" in text
