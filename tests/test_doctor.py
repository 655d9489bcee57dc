# SPDX-License-Identifier: Apache-2.0
"""test_doctor.py - doctor tells what is so, names what is wrong, survives what it finds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_attn import config
from wan_attn.__main__ import main
from wan_attn.backends import REGISTRY
from wan_attn.doctor import examine, facts, known, selftest, selftest_paths, selftest_run
from wan_attn.native import op
from wan_attn.request import Call
from wan_attn.selfcheck import reference as truth

KEYS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "versions": dict,
    "devices": dict,
    "packages": dict,
    "settings": list,
    "settings_error": (str, type(None)),
    "unknown_variables": list,
    "import_error": (str, type(None)),
    "backends": list,
    "kernels": list,
    "rope": list,
    "cuda_kernels": dict,
    "proofs": list,
    "choices": list,
    "precision": list,
    "sparse": list,
    "selftest": list,
    "selftest_error": (str, type(None)),
    "known": list,
    "failed_checks": list,
    "verdict": str,
    "exit_code": int,
    "next": list,
    "seconds": float,
}


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in config.VARIABLES:
        if variable.name not in ("WAN_ATTN_BINDING", "WAN22_DIR"):
            monkeypatch.delenv(variable.name, raising=False)
    config.refresh()
    yield
    monkeypatch.undo()
    config.refresh()


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-test of two calls: enough where the subject is what is done with the results."""
    few = [truth.Case(257, 513, 80, "causal"), truth.Case(513, 257, 64, "full")]
    monkeypatch.setattr(selftest, "cases", lambda: iter(few))


# --- the report -------------------------------------------------------------------------------


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--json", "--in-process", *argv])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("one_case")
def test_a_sound_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = report(capsys)
    assert code == 0 and found["exit_code"] == 0, found["verdict"]
    assert {key: isinstance(found[key], kind) for key, kind in KEYS.items()} == dict.fromkeys(
        KEYS, True
    )
    assert set(found) == set(KEYS)
    assert found["failed_checks"] == []
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["binding"] == op.binding()
    assert [b["name"] for b in found["backends"] if b["device"] == "cpu"] == list(REGISTRY)
    assert [k["name"] for k in found["kernels"]] == [k.name for k in op.kernels()]
    assert all(row["usable"] == (row["reason"] is None) for row in found["backends"])
    assert {s["name"] for s in found["settings"]} == {v.name for v in config.VARIABLES}
    tested = {(r["kind"], r["name"]) for r in found["selftest"] if r["calls"]}
    usable = {("kernel", k["name"]) for k in found["kernels"] if k["usable"]}
    lossy = {row.name for row in op.kernels() if row.is_lossy}  # not held against exact ones
    usable -= {("kernel", name) for name in lossy}
    usable |= {("backend", b["name"]) for b in found["backends"] if b["usable"]}
    assert tested == usable | {("function", "flash_attention")}


@pytest.mark.usefixtures("one_case")
def test_8_bit_scores(
    native: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The self-test is exact whatever the variables ask for; a wrong schedule is the finding."""
    monkeypatch.setenv("WAN_ATTN_PRECISION", "fast")
    code, found = report(capsys)
    assert code == 0 and [r for r in found["selftest"] if r["name"] == "flash_attention"]
    (cpu,) = [p for p in found["precision"] if p["device"] == "cpu"]
    assert cpu["mode"] == "fast" and cpu["kernel"].endswith("_qk8") and cpu["error"] is None
    main(["doctor", "--in-process", "--no-selftest"])
    assert f"{cpu['kernel']}, lossy, in all but attention to images" in capsys.readouterr().out
    monkeypatch.setenv("WAN_ATTN_SCHEDULE", str(tmp_path / "missing.json"))
    code, found = report(capsys, "--no-selftest")
    assert code == 1 and found["verdict"].startswith("WAN_ATTN_SCHEDULE must be a JSON file")


def test_blocks_left_out(
    native: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is asked for, what computes it, from which length on; a wrong profile is the finding."""

    def told() -> tuple[dict[str, Any], str]:
        _, found = report(capsys, "--no-selftest")
        main(["doctor", "--in-process", "--no-selftest"])
        (cpu,) = [p for p in found["sparse"] if p["device"] == "cpu"]
        return cpu, " ".join(capsys.readouterr().out.split())

    cpu, text = told()
    assert cpu["mode"] == "off" and cpu["kernel"] and cpu["reason"] is None
    assert f"nothing (WAN_ATTN_SPARSE=off); if asked for: {cpu['kernel']}" in text
    profile = tmp_path / "profile.json"
    kept = {"kind": "sparse", "format": 1, "budget": 0.03, "mode": "sparse", "layers": []}
    profile.write_text(json.dumps(kept))
    for mode in ("near_exact", "sparse"):
        monkeypatch.setenv("WAN_ATTN_SPARSE", mode)
        monkeypatch.setenv("WAN_ATTN_ERROR_BUDGET", "0.03")
        monkeypatch.setenv("WAN_ATTN_SPARSE_PROFILE", str(profile))
        cpu, text = told()
        assert (cpu["mode"], cpu["budget"], cpu["error"]) == (mode, 0.03, None)
        assert f"{cpu['kernel']} leaves out blocks whose" in text
        assert "in self-attention of 12000 tokens and more, within 3 %" in text
    assert f"which begins as {profile}"[:30] in text
    monkeypatch.setenv("WAN_ATTN_ERROR_BUDGET", "0.04")
    code, found = report(capsys, "--no-selftest")
    said = "WAN_ATTN_SPARSE_PROFILE must be of mode sparse and a budget of 0.04, got 0.03"
    assert code == 1 and found["verdict"] == f"{said}: nothing can run until it is changed"


@pytest.mark.usefixtures("one_case")
def test_a_wrong_kernel_makes_the_exit_code_1_and_is_named(
    native: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def a_key_too_few(q: Any, k: Any, v: Any, *, k_lens: Any, **call: Any) -> selftest.Answer:
        k_lens = (k_lens - 1).clamp(min=0)
        return REGISTRY["torch"].run(q, k, v, Call(k_lens=k_lens, return_lse=True, **call))

    def planted() -> Iterator[selftest.Path]:
        for good in real():
            wrong = a_key_too_few if good.kind == "kernel" else good.run
            yield replace(good, run=wrong)

    real = selftest_paths.paths
    monkeypatch.setattr(selftest_run, "paths", planted)
    rows = [k.name for k in op.kernels() if k.device == "cpu"]
    code, found = report(capsys)
    assert code == 1 and found["exit_code"] == 1
    assert rows[-1] in found["verdict"]
    assert "failed their self-test" in found["verdict"]
    assert any(f"kernel {rows[-1]} is wrong on cpu" in step["text"] for step in found["next"])
    assert main(["doctor", "--in-process"]) == 1
    text = capsys.readouterr().out
    assert "FAIL" in text and "times the bound" in text


@pytest.mark.usefixtures("one_case")
def test_the_text_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--in-process"]) == 0
    text = capsys.readouterr().out
    assert text.isascii()
    assert [line for line in text.splitlines() if len(line) > 100] == []
    assert str(Path.home()) not in text
    for title in ("versions", "devices", "backends", "self-test", "known problems", "result"):
        assert f"\n{title}" in text


@pytest.mark.usefixtures("one_case")
def test_gpus_and_their_driver_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = facts.Gpu(1, "NVIDIA GeForce RTX 3090", (8, 6), 23.7)
    machine = facts.Machine(
        torch="2.9.1+cu128",
        torch_cuda="12.8",
        torch_archs=["sm_80", "sm_86"],
        cudnn=91002,
        gpus=[card],
        driver="580.65",
    )
    monkeypatch.setattr(facts, "machine", lambda guard: machine)
    assert main(["doctor", "--in-process"]) == 0
    text = capsys.readouterr().out
    assert "cuda:1  NVIDIA GeForce RTX 3090, compute capability 8.6, 23.7 GiB" in text
    assert "NVIDIA 580.65" in text and "2.9.1+cu128 (CUDA 12.8, cuDNN 9.10.2)" in text
    assert "problem torch 2.9.1+cu128 with cuDNN 9.10.2" in text
    assert "known problems here: conv3d-memory" in text
    assert "1. conv3d-memory: torch 2.9.1 or newer with nvidia-cudnn 9.15" in " ".join(text.split())


def test_nothing_usable_is_an_error() -> None:
    empty: dict[str, Any] = {
        "settings_error": None,
        "import_error": None,
        "selftest": [],
        "selftest_error": None,
        "backends": [{"usable": False}],
        "known": [],
    }
    assert examine.verdict(empty) == ("nothing is usable on this machine", 1)
    assert examine.verdict({**empty, "selftest_error": "it hung"})[1] == 1
    assert examine.verdict({**empty, "backends": [{"usable": True}]})[1] == 0


def test_an_impossible_variable_is_the_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "flash")
    code, found = report(capsys)
    assert code == 1
    assert "USE_ATTENTION_BACKEND must be one of auto, sdpa" in found["settings_error"]
    assert found["settings_error"] in found["next"][0]["text"]
    assert main(["doctor"]) == 1
    assert "WRONG  USE_ATTENTION_BACKEND must be one of" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["torch", "flash"])
def test_a_misspelt_variable_is_told(
    backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAN_ATTN_STRCT", "1")
    monkeypatch.setenv("USE_ATTENTION_BACKEND", backend)
    _, found = report(capsys, "--no-selftest")
    (told,) = found["unknown_variables"]
    assert told.startswith("WAN_ATTN_STRCT is set") and "WAN_ATTN_STRICT" in told
    main(["doctor", "--no-selftest"])
    assert f"unknown {told}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("one_case")
def test_variables_in_effect_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "torch")
    monkeypatch.setenv("WAN_ATTN_STRICT", "1")
    _, found = report(capsys, "--no-selftest")
    changed = {s["name"]: s["value"] for s in found["settings"] if not s["is_default"]}
    assert changed == {"USE_ATTENTION_BACKEND": "torch", "WAN_ATTN_STRICT": "1"} | {
        name: value for name, value in changed.items() if name in ("WAN_ATTN_BINDING", "WAN22_DIR")
    }
    assert {c["backend"] for c in found["choices"]} == {"torch"}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (facts, "nvidia_driver"),
        (facts, "packages"),
        (facts, "cuda_devices"),
        (facts, "cpu_facts"),
        (facts, "native_facts"),
        (facts, "broken_packages"),
        (known, "findings"),
        (selftest_paths, "devices"),
        (selftest_run, "run_here"),
        (op, "why_not"),
    ],
)
@pytest.mark.usefixtures("one_case")
def test_a_broken_check_is_reported_and_the_rest_goes_on(
    module: Any, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("the check itself is broken")

    monkeypatch.setattr(module, name, broken)
    if name == "why_not" and op.binding() == "torch":
        pytest.skip("no kernel row is asked (WAN_ATTN_BINDING=torch)")
    _, found = report(capsys)
    assert "OSError: the check itself is broken" in str(found["failed_checks"] + found["selftest"])
    assert found["verdict"]
    assert main(["doctor", "--in-process"]) in (0, 1)
    assert "the check itself is broken" in capsys.readouterr().out


# What stops `import wan_attn` must not stop doctor, which is part of it.
STOPPED = {
    "no torch": ("sys.modules['torch'] = None", "PyTorch cannot be imported"),
    "a DLL of torch is missing": (
        "sys.meta_path.insert(0, type('F', (), {'find_spec': staticmethod(fail)}))",
        "OSError: [WinError 126] c10.dll",
    ),
    "an old torch": ("import torch; torch.__version__ = '2.3.1'", "torch 2.3.1 is older than 2.4"),
    "an impossible variable": (
        "os.environ['USE_ATTENTION_BACKEND'] = 'best'",
        "WRONG  USE_ATTENTION_BACKEND must be one of auto, sdpa",
    ),
    "a binding that is not available": (
        "os.environ['WAN_ATTN_BINDING'] = 'shim'; import torch; torch.__version__ = '2.8.0'",
        "WAN_ATTN_BINDING=shim is not available: the shim needs torch >= 2.9",
    ),
}
STOPPED_SCRIPT = """
import os, runpy, sys
def fail(name, path=None, target=None):
    if name == "torch": raise OSError("[WinError 126] c10.dll")
PREPARE
sys.argv = ["wan-attn", *sys.argv[1:]]
runpy.run_module("wan_attn", run_name="__main__")
"""


def stopped(kind: str, *argv: str) -> subprocess.CompletedProcess[str]:
    script = STOPPED_SCRIPT.replace("PREPARE", STOPPED[kind][0])
    command = [sys.executable, "-c", script, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("kind", STOPPED)
def test_doctor_works_where_the_package_does_not(kind: str) -> None:
    answer = stopped(kind, "doctor")
    assert answer.returncode == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    flat = " ".join(answer.stdout.split())
    assert " ".join(STOPPED[kind][1].split()) in flat
    assert "what to do next" in flat and "checks that failed" not in flat


def test_other_commands_point_to_doctor() -> None:
    answer = stopped("a binding that is not available", "why", "--shape", "1x1x1x1")
    assert answer.returncode == 2
    assert "`wan-attn doctor` says more" in answer.stderr and "Traceback" not in answer.stderr


def test_a_package_that_cannot_be_used_says_so_at_import_and_at_use() -> None:
    code = (
        "import os, warnings; os.environ['WAN_FORCE_FP16'] = 'perhaps'\n"
        "with warnings.catch_warnings(record=True) as said: import wan_attn\n"
        "print(said[0].message)\n"
        "try: wan_attn.patch()\n"
        "except ImportError as error: print(error)\n"
        "try: from wan_attn import sdpa\n"
        "except ImportError as error: print(error)\n"
        "try: wan_attn.nonsense\n"
        "except AttributeError as error: print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True
    )
    lines = answer.stdout.splitlines()
    assert len(lines) == 4
    assert all("WAN_FORCE_FP16 must be 1 or 0" in line for line in lines[:3])
    assert lines[3] == "module 'wan_attn' has no attribute 'nonsense'"


def test_the_whole_command_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "wan_attn", "doctor", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads(answer.stdout)
    assert set(found) == set(KEYS)
    assert found["selftest_error"] is None
    assert any(r["calls"] and not r["failed"] for r in found["selftest"])
