# SPDX-License-Identifier: Apache-2.0
"""test_verify.py - `wan-attn verify` on installations made by hand: whole ones, damaged ones."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest

from wan_attn import __main__ as cli
from wan_attn.cli import verify
from wan_attn.doctor import installed
from wan_attn.native import library

FILES = {"__init__.py": b"# a package\n", "libwan_attn.so": b"\x7fELF 1234", "sub/one.py": b""}


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """site-packages with an installed wan_attn of three files; the library is a compiled one."""
    folder, info = tmp_path / "wan_attn", tmp_path / "wan_attn-1.dist-info"
    compiled = {"libwan_attn.so": sha256(FILES["libwan_attn.so"]).hex()}
    record = {"platform": "here", "commit": "abc", "cubins": 0, "left_out": [], "files": compiled}
    files = FILES | {"build_record.json": json.dumps(record).encode()}
    lines = ["wan_attn-1.dist-info/RECORD,,", "wan_attn/__pycache__/__init__.cpython-311.pyc,,"]
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        digest = base64.urlsafe_b64encode(sha256(data)).decode().rstrip("=")
        lines.append(f"wan_attn/{name},sha256={digest},{len(data)}")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wan-attn\nVersion: 1\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("\n".join(lines) + "\n")
    return folder


def test_a_whole_installation(package: Path) -> None:
    found = installed.examine(package)
    assert found.problems == [] and (found.in_record, found.compiled) == (4, 1)
    text = verify.render(found, "not loaded")
    assert "installed by pip" in text and "abc" in text and "All 4 files" in text


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_told(package: Path, name: str) -> None:
    data = bytearray(FILES[name] or b"x")
    data[0] ^= 1
    (package / name).write_bytes(data)
    found = installed.examine(package)
    assert f"wan_attn/{name}: its bytes are not those that were installed" in found.problems
    if name.endswith(".so"):
        assert f"wan_attn/{name}: it is not what the build has made" in found.problems
    assert all(p in verify.render(found, "x") for p in found.problems)


def test_a_file_that_is_gone_or_was_added_is_told(package: Path) -> None:
    (package / "sub/one.py").unlink()
    (package / "sub/two.py").write_text("")
    (package / "__pycache__").mkdir()
    (package / "__pycache__/two.pyc").write_text("")
    assert installed.examine(package).problems == [
        "wan_attn/sub/one.py: it is gone, or cannot be read",
        "wan_attn/sub/two.py: it was not installed",
    ]


def test_a_record_that_cannot_be_read_is_told(package: Path) -> None:
    (package / "build_record.json").write_text("[]")
    problems = installed.examine(package).problems
    assert len(problems) == 2 and all("build_record.json" in p for p in problems)


def test_a_checkout_has_compiled_files_alone(package: Path) -> None:
    for file in (package.parent / "wan_attn-1.dist-info").iterdir():
        file.unlink()
    found = installed.examine(package)
    assert (found.in_record, found.compiled, found.problems) == (0, 1, [])
    assert "editable" in verify.render(found, "x")
    (package / "build_record.json").unlink()
    assert "nothing to compare with" in verify.render(installed.examine(package), "x")


def test_the_command_looks_at_this_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: Path
) -> None:
    """Its exit code: 0, 1 and 2. The library that was loaded is this process's own."""
    monkeypatch.setattr(installed.examine, "__defaults__", (package,))
    assert cli.main(["verify"]) == 0
    built = library.lib().wan_attn_build_info().decode()
    assert built in " ".join(capsys.readouterr().out.split())
    (package / "libwan_attn.so").write_bytes(b"")
    assert cli.main(["verify"]) == 1
    assert "  ! wan_attn/libwan_attn.so: its bytes" in capsys.readouterr().out
