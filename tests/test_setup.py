# SPDX-License-Identifier: Apache-2.0
"""test_setup.py - what setup.py makes of flags, of a missing compiler, and of old setuptools.

Whole installations, of every kind and beside several versions of torch: make install-matrix.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from source_tree import ROOT, files

Distribution = pytest.importorskip("setuptools").Distribution
UNSAFE = ["-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-fassociative-math"]
NEITHER = {"WAN_ATTN_NATIVE": "0", "WAN_ATTN_CUDA": "0"}  # Python alone: a build of a second


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, without its setup()."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which nothing has been built."""
    target = tmp_path / "wan_attn"
    for file in files():
        if file.parts[0] in ("wan_attn", "csrc", ".ci") or len(file.parts) == 1:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, target / file)
    return target


def setup(checkout: Path, *words: str, prepare: str = "", **environment: str) -> str:
    """What `python setup.py WORDS` prints; its exit code in the last line."""
    code = f"{prepare}\nimport runpy, sys\nsys.argv[:] = ['setup.py', *{list(words)!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')"],
        cwd=checkout,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return f"{done.stdout}\nexit {done.returncode}"


@pytest.mark.skipif(sys.platform == "win32", reason="MSVC takes no CFLAGS")
@pytest.mark.parametrize("variable", ("CFLAGS", "CPPFLAGS", "LDFLAGS"))
def test_flags_that_make_results_wrong_are_left_out_and_named(
    variable: str,
    script: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, " ".join(["-DKEPT", *UNSAFE]))
    made = script["compiler"]()
    words = {w for value in vars(made).values() if isinstance(value, list) for w in value}
    assert "-DKEPT" in words and not words & set(UNSAFE)
    script["say_ignored_flags"]()
    said = capsys.readouterr().out
    assert all(flag in said for flag in UNSAFE) and len(said.splitlines()) == 1
    monkeypatch.delenv(variable)
    script["say_ignored_flags"]()
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="setuptools looks for MSVC itself")
def test_without_a_compiler_the_build_says_how_to_get_one(checkout: Path) -> None:
    said = setup(checkout, "-q", "build_native", CC="no-such-cc", WAN_ATTN_CUDA="0")
    assert said.endswith("exit 1") and "Traceback" not in said
    for word in ("no command no-such-cc", "apt install gcc", "xcode-select", "WAN_ATTN_NATIVE=0"):
        assert word in said


def test_an_old_setuptools_is_refused(checkout: Path) -> None:
    old = "import setuptools; setuptools.__version__ = '63.2.0'"
    said = setup(checkout, "--version", prepare=old)
    assert said.endswith("exit 1")
    assert "setuptools must be 64 or newer, got 63.2.0" in said and "pip install" in said


def test_a_word_that_no_variable_takes_is_refused(checkout: Path) -> None:
    for variable in NEITHER:
        said = setup(checkout, "-q", "build_native", **NEITHER | {variable: "perhaps"})
        assert said.endswith("exit 1") and variable in said and "got perhaps" in said


def test_what_is_left_out_is_said_and_recorded(checkout: Path) -> None:
    said = setup(checkout, "-q", "build_native", "--inplace", **NEITHER)
    record = json.loads((checkout / "wan_attn/build_record.json").read_text())
    assert said.endswith("exit 0") and record["cubins"] == 0
    assert len(record["left_out"]) == 1 + (sys.platform != "darwin")
    for text in record["left_out"]:
        assert f"this build leaves out {text}" in said and "to get them" in text


def test_the_package_repeats_what_its_build_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan_attn.native import library

    monkeypatch.setattr(library, "_PACKAGE", tmp_path)
    assert "nothing is known" in library.left_out()[0], "a build by an older setup.py"
    (tmp_path / "build_record.json").write_text('{"cubins": 0, "left_out": ["kernels"]}')
    assert library.left_out() == ["kernels"]


# As in a stock environment of Python 3.10 or 3.11: neither setuptools nor `wheel` packs wheels.
PLAIN = """
import sys, setuptools
for name in ("setuptools.command.bdist_wheel", "wheel", "wheel.bdist_wheel", "setuptools._vendor.wheel"):
    sys.modules[name] = None
"""  # noqa: E501


def wheel(checkout: Path, prepare: str) -> Path:
    said = setup(checkout, "-q", "bdist_wheel", "-d", "dist", prepare=prepare, **NEITHER)
    assert said.endswith("exit 0"), said
    (made,) = (checkout / "dist").glob("*.whl")
    return made.rename(checkout / f"{len(prepare)}-{made.name}")


def metadata(members: zipfile.ZipFile) -> dict[str, list[str]]:
    """Header -> its values, without what versions of setuptools say differently."""
    (name,) = (n for n in members.namelist() if n.endswith("METADATA"))
    head = members.read(name).decode().split("\n\n")[0]
    found: dict[str, list[str]] = {}
    for line in head.splitlines():
        key, _, value = line.partition(": ")
        found.setdefault(key, []).append(value.replace(" ", ""))
    ignored = ("Metadata-Version", "Dynamic", "License-File")
    return {k: sorted(v) for k, v in found.items() if k not in ignored}


def test_a_plain_wheel_is_like_any_other(checkout: Path) -> None:
    try:
        import setuptools.command.bdist_wheel  # noqa: F401
    except ImportError:
        pytest.skip("this setuptools packs no wheel to compare with")
    usual, plain = wheel(checkout, ""), wheel(checkout, PLAIN)
    assert "-py3-none-" in usual.name and "-py3-none-" in plain.name
    with zipfile.ZipFile(usual) as one, zipfile.ZipFile(plain) as other:
        assert metadata(one) == metadata(other)
        assert "Requires-Dist" in metadata(one), "the extras"
        names = [{n for n in w.namelist() if "dist-info" not in n} for w in (one, other)]
        assert names[0] == names[1] and "wan_attn/build_record.json" in names[0]
        for members in (one, other):
            assert members.testzip() is None
            (record,) = (n for n in members.namelist() if n.endswith("RECORD"))
            listed = {line.split(",")[0] for line in members.read(record).decode().splitlines()}
            assert listed == set(members.namelist())


def test_a_plain_wheel_has_its_tag_before_it_is_finalized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an editable install of setuptools 64 asks for it."""
    for name in ("wheel", "wheel.wheelfile"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    command = runpy.run_path(str(ROOT / ".ci/plain_wheel.py"))["bdist_wheel"](Distribution())
    command.write_wheelfile(str(tmp_path))
    assert re.search(r"^Tag: py3-none-\w+$", (tmp_path / "WHEEL").read_text(), re.MULTILINE)


def test_requirements_of_a_plain_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As setuptools before 71 writes them, whose PKG-INFO has none."""
    packaging = pytest.importorskip("packaging.requirements")
    text = "one\n\n[:os_name == 'nt']\ntwo>=2\n\n[test]\nthree\n"
    text += "\n[test:sys_platform != 'darwin']\nfour\n"
    for name in ("wheel", "wheel.wheelfile"):  # importing it puts its own there
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    lines = runpy.run_path(str(ROOT / ".ci/plain_wheel.py"))["requirements"](text)
    found = [packaging.Requirement(line.removeprefix("Requires-Dist: ")) for line in lines]
    assert [(r.name, str(r.marker or "")) for r in found] == [
        ("one", ""),
        ("two", 'os_name == "nt"'),
        ("three", 'extra == "test"'),
        ("four", 'sys_platform != "darwin" and extra == "test"'),
    ]


def test_a_module_that_was_moved_is_not_installed(checkout: Path) -> None:
    for name in ("old", "new"):
        (checkout / f"wan_attn/{name}.py").write_text("")
        said = setup(checkout, "-q", "build", "--build-lib", "build/lib", **NEITHER)
        assert said.endswith("exit 0"), said
        (checkout / f"wan_attn/{name}.py").unlink()
    built = checkout / "build/lib/wan_attn"
    assert (built / "new.py").exists() and not (built / "old.py").exists()
