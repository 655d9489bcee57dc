# SPDX-License-Identifier: Apache-2.0
"""test_doctor_known.py - known problems on described machines, the advice, and hidden paths."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wan_attn import config, console
from wan_attn.doctor import facts, known
from wan_attn.doctor.facts import Gpu, Machine

# --- known problems ---------------------------------------------------------------------------

RTX_4090 = Gpu(0, "NVIDIA GeForce RTX 4090", (8, 9), 24.0)
RTX_2080 = Gpu(0, "NVIDIA GeForce RTX 2080 Ti", (7, 5), 11.0)
SOUND = Machine(
    torch="2.15.0+cu130",
    torch_cuda="13.0",
    torch_archs=["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"],
    cudnn=92600,
    gpus=[RTX_4090],
    driver="580.65",
    driver_gpus=["NVIDIA GeForce RTX 4090"],
    packages={"numpy": "1.26.4", "transformers": "4.51.3", "triton": "3.9.0"},
)


def test_a_sound_machine_has_no_known_problem() -> None:
    assert known.findings(SOUND) == []
    assert known.findings(Machine(torch="2.4.0")) == []
    assert known.findings(replace(SOUND, torch="2.9.1+cu128", cudnn=91500)) == []
    assert known.findings(replace(SOUND, torch="2.8.0+cu128", cudnn=91002)) == []
    newer_sage = {"sageattention": "2.2.0+cu130torch2.9.0andhigher.post4"}
    assert known.findings(replace(SOUND, packages=newer_sage)) == []


def _with(**packages: str) -> dict[str, str]:
    return {**SOUND.packages, **packages}


@pytest.mark.parametrize(
    ("machine", "name", "words"),
    [
        (Machine(torch_error="no module"), "torch-missing", "no module"),
        (replace(SOUND, torch="2.3.1+cu121"), "torch-too-old", "2.3.1+cu121"),
        (
            replace(SOUND, torch="2.15.0+cpu", torch_cuda=None, cudnn=None, gpus=[]),
            "torch-without-cuda",
            "RTX 4090",
        ),
        (replace(SOUND, gpus=[], no_gpu_reason="driver too old"), "cuda-not-working", "too old"),
        (
            replace(
                SOUND, torch_archs=["sm_75", "sm_80"], gpus=[replace(RTX_4090, capability=(9, 0))]
            ),
            "no-code-for-gpu",
            "compute capability 9.0",
        ),
        (
            replace(
                SOUND, torch_archs=["sm_75", "sm_80"], gpus=[replace(RTX_4090, capability=(6, 1))]
            ),
            "no-code-for-gpu",
            "6.1",
        ),
        (replace(SOUND, torch_cuda=None, torch_hip="6.4", driver=""), "rocm", "ROCm"),
        (replace(SOUND, torch="2.9.1+cu128", cudnn=91002), "conv3d-memory", "cuDNN 9.10.2"),
        (replace(SOUND, torch="2.9.0+cu130", cudnn=91400), "conv3d-memory", "cuDNN 9.14.0"),
        (replace(SOUND, gpus=[RTX_2080]), "bf16-emulated", "2080 Ti has no bf16"),
        (replace(SOUND, system="Windows", torch="2.14.0+cu130"), "windows-no-flash", "2.14.0"),
        (replace(SOUND, packages=_with(sageattention="1.0.6")), "sage-nan", "1.0.6"),
        (replace(SOUND, packages=_with(sageattention="2.2.0")), "sage-nan", "2.2.0"),
        (replace(SOUND, has_python_h=False), "no-python-h", "triton is installed"),
        (
            replace(SOUND, has_python_h=False, packages={"triton-windows": "3.4.0"}),
            "no-python-h",
            "triton-windows is installed",
        ),
        (replace(SOUND, broken={"flash_attn": "flash_attn is broken: x"}), "broken-package", "x"),
        (replace(SOUND, packages=_with(numpy="2.0.0")), "numpy-2", "numpy 2.0.0"),
        (replace(SOUND, python=(3, 13)), "python-too-new", "Python 3.13"),
        (replace(SOUND, packages=_with(transformers="4.52.0")), "transformers-range", "4.52.0"),
        (replace(SOUND, packages=_with(transformers="4.48.9")), "transformers-range", "4.48.9"),
    ],
)
def test_each_known_problem_is_recognised(machine: Machine, name: str, words: str) -> None:
    found = {f.name: f for f in known.findings(machine)}
    assert name in found, found
    assert words in found[name].text
    assert found[name].fix and found[name].source
    assert set(found) - {name, "bf16-emulated"} == set()


def test_every_rule_is_tested() -> None:
    marks = test_each_known_problem_is_recognised.pytestmark  # type: ignore[attr-defined]
    tested = {row[1] for row in marks[0].args[1]}
    assert tested == {rule.name for rule in known.RULES}


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_80"], (8, 9), True),  # machine code of the same major, an older minor
        (["sm_89"], (8, 6), False),
        (["sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (12, 0), True),  # PTX is compiled for newer cards
        (["compute_90"], (8, 9), False),
        (["sm_90a"], (9, 0), True),
        (["sm_120"], (12, 0), True),
        ([], (9, 0), True),  # not known: no claim
    ],
)
def test_which_cards_a_torch_has_code_for(
    archs: list[str], capability: tuple[int, int], runs: bool
) -> None:
    machine = replace(SOUND, torch_archs=archs, gpus=[replace(RTX_4090, capability=capability)])
    assert ("no-code-for-gpu" not in {f.name for f in known.findings(machine)}) == runs


# --- advice, redaction, versions --------------------------------------------------------------


def advice(machine: Machine, **changes: Any) -> str:
    from wan_attn.doctor import advice as doctor_next

    told = {
        "settings_error": None,
        "import_error": None,
        "selftest": [],
        "proofs": [],
        "kernels": [{"name": "sdpa_best", "device": "cpu"}, {"name": "sdpa_last", "device": "cpu"}],
        "known": [],
        "versions": {},
        "backends": [{"usable": True}],
        **changes,
    }
    return json.dumps(doctor_next.advice(told, machine))


def test_the_recipe_that_leaves_flash_attn_out() -> None:
    assert "grep -v flash_attn requirements.txt" in advice(SOUND)
    assert ") -notmatch 'flash_attn' | Set-Content" in advice(replace(SOUND, system="Windows"))
    assert "requirements" not in advice(replace(SOUND, packages=_with(flash_attn="2.8.3")))


def test_stock_wan22_is_not_advised_without_a_gpu() -> None:
    without = replace(SOUND, gpus=[], driver="", driver_gpus=[])
    assert "generate.py" in advice(SOUND) and "needs an NVIDIA GPU" not in advice(SOUND)
    assert "requirements" not in advice(without) and "generate.py" not in advice(without)
    assert "needs an NVIDIA GPU" in advice(without)
    # A torch without CUDA is another matter: its own finding says so.
    assert "generate.py" in advice(replace(without, driver_gpus=["a card"]))


def test_the_recipe_leaves_everything_else_in(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("the shell recipe")
    from wan_attn.doctor.advice import RECIPE

    lines = ["torch>=2.4.0", "flash_attn", "numpy>=1.23.5,<2"]  # no newline at the end, as upstream
    (tmp_path / "requirements.txt").write_text("\n".join(lines), encoding="utf-8")
    subprocess.run(RECIPE["sh"][0], shell=True, check=True, cwd=tmp_path)
    kept = (tmp_path / "requirements-wan.txt").read_text(encoding="utf-8").split()
    assert kept == [lines[0], lines[2]]


def test_a_wrong_path_is_worked_around() -> None:
    def wrong(kind: str, name: str, device: str = "cpu") -> str:
        return advice(SOUND, selftest=[{"kind": kind, "name": name, "device": device, "failed": 1}])

    assert "WAN_ATTN_CPU_ISA=portable" in wrong("kernel", "sdpa_best")
    assert "USE_ATTENTION_BACKEND=torch" in wrong("kernel", "sdpa_last")
    assert "USE_ATTENTION_BACKEND=torch" in wrong("kernel", "sdpa_sm80", "cuda:0")
    assert "USE_ATTENTION_BACKEND=sdpa" in wrong("backend", "torch")
    assert "DISABLE_FLASH_ATTN=1" in wrong("backend", "fa2", "cuda:0")
    for line in (
        "WAN_ATTN_CPU_ISA=portable",
        "USE_ATTENTION_BACKEND=torch",
        "DISABLE_FLASH_ATTN=1",
    ):
        name, _, value = line.partition("=")
        config.Settings.from_env({name: value})  # the advice can be followed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/x.py", "~/x.py"),
        ("at /home/ann, there", "at ~, there"),
        ("/Users/ann/Library/y", "~/Library/y"),
        (r"C:\Users\Ann\AppData\Local", r"~\AppData\Local"),
        ("file 'D:/Users/ann/z'", "file '~/z'"),
        ("/srv/data/me/lib.so", "~/lib.so"),
        ("/srv/data/me", "~"),
        ("/srv/data/mexico/lib.so", "/srv/data/mexico/lib.so"),
        ("/usr/lib/home.so", "/usr/lib/home.so"),
        ("the home of 3 users", "the home of 3 users"),
    ],
)
def test_home_paths_are_hidden(text: str, shown: str) -> None:
    assert console.redact(text, home="/srv/data/me") == shown
    assert console.redact({"a": [text, (text, 1)], text: None}, home="/srv/data/me") == {
        "a": [shown, [shown, 1]],
        shown: None,
    }


def test_a_home_that_names_nobody_is_left_alone() -> None:
    assert console.redact("/usr/lib", home="/") == "/usr/lib"


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    console.emit("caf\u00e9 \u4e2d")
    assert shown.getvalue().split() == [rb"caf\xe9", rb"\u4e2d"]


def test_a_reader_may_stop_reading() -> None:
    code = "from wan_attn.console import emit; emit('line\\n' * 100_000)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.9.1+cu128", (2, 9, 1)), ("2.11.0a0+git", (2, 11, 0)), ("1.26", (1, 26)), ("dev", ())],
)
def test_versions_are_read(text: str, numbers: tuple[int, ...]) -> None:
    assert known.version(text) == numbers


def test_cudnn_numbers_are_written_out() -> None:
    assert [known.cudnn_name(n) for n in (91002, 91500, 8907)] == [
        "9.10.2",
        "9.15.0",
        "8.9.7",
    ]


BROKEN = {
    "import error": "raise ImportError('DLL load failed while importing flash_attn_2_cuda')",
    "os error": "raise OSError('undefined symbol: _ZN3c104cuda')",
    "missing dependency": "import einops_that_nobody_has",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_flash_attn_is_shown(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN[kind] + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    broken = facts.broken_packages()
    assert "flash_attn is installed but broken" in broken["flash_attn"]
    (found,) = known.findings(replace(SOUND, broken=broken))
    assert found.name == "broken-package" and "installed but broken" in found.text
