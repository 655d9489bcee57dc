# SPDX-License-Identifier: Apache-2.0
"""test_wheel_check.py - make wheels-check tells what is wrong with a library: small ones, compiled
here, each with one fault that a real build could have.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from wheels import targets

COMPILER = shutil.which("gcc")
if sys.platform != "linux" or platform.machine() != "x86_64" or COMPILER is None:
    pytest.skip("these faults are made with gcc on x86-64", allow_module_level=True)
lief = pytest.importorskip("lief")

from wheels import check  # noqa: E402 - imports lief

TARGET = targets.TARGETS["manylinux_2_17_x86_64"]
# Debian's start files are not guarded, and the linker says what is true of all that it has got.
COMPILE = ["-fPIC", "-shared", "-fvisibility=hidden", "-fcf-protection=full", "-nostartfiles"]
LINK = ["-s", "-Wl,--no-undefined,-z,relro,-z,now,-z,noexecstack"]
SHOWN = '__attribute__((visibility("default")))'


def library(
    folder: Path, text: str = "", link: tuple[str, ...] = (), names: set[str] | None = None
) -> list[str]:
    """What is said of a library that exports `names` and has this text in it, linked so."""
    exported = check.exported("wan_attn") if names is None else names
    source, made = folder / "library.c", folder / "library.so"
    lines = [
        "#include <stdlib.h>",
        *(f"{SHOWN} void *{n}(void) {{ return malloc(8); }}" for n in exported),
    ]  # noqa: E501
    source.write_text("\n".join([*lines, text, ""]))
    assert COMPILER is not None
    command: list[str | Path] = [COMPILER, *COMPILE, source, "-o", made, *LINK, *link]
    subprocess.run(command, check=True, capture_output=True)
    return list(check.library_problems(made.read_bytes(), TARGET, "wan_attn"))


def test_a_library_as_it_should_be(tmp_path: Path) -> None:
    assert library(tmp_path) == []


def test_an_export_too_many_and_one_too_few(tmp_path: Path) -> None:
    names = check.exported("wan_attn")
    (problem,) = library(tmp_path, f"{SHOWN} int helper(void) {{ return 0; }}")
    assert problem == "exports differ from what is declared: ['helper']"
    (problem,) = library(tmp_path, names=names - {"wan_attn_run"})
    assert problem == "exports differ from what is declared: ['wan_attn_run']"


FAULTS = {
    "RPATH": ("", ("-Wl,-rpath,/opt/lib,--disable-new-dtags",), "has RPATH"),
    "RUNPATH": ("", ("-Wl,-rpath,/opt/lib,--enable-new-dtags",), "has RUNPATH"),
    "stack": ("", ("-Wl,-z,execstack",), "its stack is executable"),
    "C++": ("", ("-Wl,--no-as-needed", "-lstdc++"), "needs libstdc++.so.6"),
    "relro": ("", ("-Wl,-z,norelro",), "its tables of addresses stay writable (no full RELRO)"),
    "lazy": ("", ("-Wl,-z,lazy",), "its tables of addresses stay writable (no full RELRO)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told(fault: str, tmp_path: Path) -> None:
    text, link, expected = FAULTS[fault]
    assert expected in library(tmp_path, text, link)


def test_a_library_for_another_processor(tmp_path: Path) -> None:
    library(tmp_path)
    data = (tmp_path / "library.so").read_bytes()
    arm = targets.TARGETS["manylinux_2_17_aarch64"]
    assert "is for X86_64" in list(check.library_problems(data, arm, "wan_attn"))


def test_a_newer_glibc_than_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "NEWEST_GLIBC", (2, 1))
    assert "needs glibc (2, 2, 5), newer than (2, 1)" in library(tmp_path)


def test_a_shim_whose_frames_torchs_errors_cannot_pass(tmp_path: Path) -> None:
    names = check.exported("wan_attn_shim")
    library(tmp_path, names=names)
    data = (tmp_path / "library.so").read_bytes()
    assert list(check.library_problems(data, TARGET, "wan_attn_shim")) == []
    bare = ["-fno-asynchronous-unwind-tables", "-fno-unwind-tables"]
    command: list[str | Path] = [
        str(COMPILER),
        *COMPILE,
        *bare,
        tmp_path / "library.c",
        "-o",
        tmp_path / "bare.so",
    ]
    subprocess.run([*command, *LINK], check=True, capture_output=True)
    data = (tmp_path / "bare.so").read_bytes()
    (problem,) = check.library_problems(data, TARGET, "wan_attn_shim")
    assert problem == "has no unwind tables: torch's errors cannot pass through"
