# SPDX-License-Identifier: Apache-2.0
"""test_wheel_tools.py - the tools that make and check wheels, without their compilers; setup.py's
targets. The wheels themselves: make wheels-check and make wheels-test.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import readme_tables
from wheels import build, drivers, foreign, hub, roots, running, targets

from source_tree import ROOT


@pytest.mark.parametrize("name", targets.TARGETS)
def test_each_target_names_its_platform(name: str) -> None:
    target = targets.TARGETS[name]
    assert target.platform == name
    if name != "any":
        assert target.triple in target.compiler()[-1] and target.platform.endswith(target.machine)
        assert ("-Wl,-install_name,@rpath/x" in target.link_flags("x")) == (name[:3] == "mac")


def test_what_is_packed_tells_its_commit_and_has_plain_permissions(tmp_path: Path) -> None:
    if not build.git("ls-files"):
        pytest.skip("no git here")
    build.copy_sources(tmp_path / "source")
    commit = (tmp_path / "source/.commit").read_text().strip()
    assert commit.removesuffix("-dirty") == build.git("rev-parse", "HEAD")
    modes = {f.stat().st_mode & 0o777 for f in (tmp_path / "source").rglob("*") if f.is_file()}
    assert modes == {0o644}
    assert not (tmp_path / "source/build").exists()


def test_a_build_takes_nothing_of_the_users_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CFLAGS", "CC", "LDFLAGS", "PYTHONPATH", "WAN_ATTN_NATIVE"):
        monkeypatch.setenv(name, "-DWRONG")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1234567890")
    found = build.environment(tmp_path)
    assert "-DWRONG" not in found.values() and found["SOURCE_DATE_EPOCH"] == "1234567890"


def test_the_page_of_find_links_has_every_files_hash(tmp_path: Path) -> None:
    file = tmp_path / "wan_attn-1-py3-none-any.whl"
    file.write_bytes(b"a wheel")
    digest = hashlib.sha256(b"a wheel").hexdigest()
    assert f'href="https://x/{file.name}#sha256={digest}"' in build.page([file], "https://x/")


def test_the_kernels_hub_gets_a_folder_for_each_system_and_cuda(tmp_path: Path) -> None:
    names = ("win_amd64", "manylinux_2_17_aarch64", "macosx_11_0_arm64", "any")
    for name in names:
        with zipfile.ZipFile(tmp_path / f"wan_attn-1-py3-none-{name}.whl", "w") as packed:
            packed.writestr("wan_attn/__init__.py", "")
            packed.writestr("wan_attn/build_record.json", '{"commit": "0123456789abcdef-dirty"}')
            packed.writestr("wan_attn-1.dist-info/licenses/LICENSE", "x")
    assert hub.main([str(tmp_path), "--out", str(tmp_path / "hub")]) == 0
    made = {folder.name: folder for folder in (tmp_path / "hub/build").iterdir()}
    arch = "torch-stable-abi29"
    linux = {f"{arch}-{b}-aarch64-linux" for b in ("cpu", "cu126", "cu130")}
    windows = {f"{arch}-{b}-x86_64-windows" for b in ("cpu", "cu126", "cu130")}
    assert set(made) == linux | windows | {f"{arch}-cpu-aarch64-darwin", "torch-universal"}
    for name, folder in made.items():
        about = json.loads((folder / "metadata.json").read_text())
        kind = "cuda" if "-cu1" in name else "cpu"
        assert (about["id"], about["backend"]) == (f"_wan_attn_{kind}_0123456789ab", {"type": kind})
        files = {f"wan_attn/{n}" for n in ("__init__.py", "build_record.json")}
        assert set(about["digest"]["files"]) == files | {"LICENSE", "__init__.py"}
        assert not list(folder.glob("*.dist-info"))


def test_what_a_machine_lacks_is_said_and_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    wheel = tmp_path / "wan_attn-1-py3-none-any.whl"
    arm, windows = (targets.TARGETS[n] for n in ("manylinux_2_17_aarch64", "win_amd64"))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(drivers, "ARM_LIBRARIES", tmp_path)
    monkeypatch.setattr(drivers, "ROOT", tmp_path)
    for what, test, reason in (
        ("wine", partial(foreign.windows, wheel), "no wine here"),
        ("wine", partial(drivers.run_both, windows, wheel), "no wine here"),
        ("qemu", partial(foreign.arm64, wheel), "no qemu here"),
        ("qemu", partial(drivers.run_both, arm, wheel), "no qemu here"),
        ("glibc", partial(drivers.with_oldest_glibc, arm, wheel), "only a Debian can make"),
    ):
        assert running.attempt("name", what, test), "a lack is not a failure"
        line = capsys.readouterr().out
        assert f"{what} " in line and "not run" in line and reason in line
    with pytest.raises(roots.NoRoot):
        roots.make("oldest", tmp_path)


def test_a_program_that_fails_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = partial(
        running.run, [sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path
    )
    assert not running.attempt("name", "what", test)
    line = capsys.readouterr().out
    assert "PROBLEM" in line and "exit code 3" in line and "why" in line


def test_a_release_cannot_forget_the_lines_that_install() -> None:
    line = r"pip install --no-deps ./wan_attn or .\x -m pip install .\wan_attn, ../wan_attn/csrc"
    published = r"pip install --no-deps wan-attn or .\x -m pip install wan-attn, ../wan_attn/csrc"
    assert readme_tables.install_lines(line, is_published=False) == line
    assert readme_tables.install_lines(line, is_published=True) == published


def test_a_wrong_hash_or_a_file_too_many_in_a_wheel_is_told() -> None:
    pytest.importorskip("lief")
    from wheels import check

    record = "wan_attn-1.dist-info/RECORD"
    files = {"a": b"1", record: b"a,sha256=a4ayc_80_OGda4BO_1o_V0etpOqiLx1JwB5S3beHW0s,1\n"}
    files[record] += record.encode() + b",,\n"
    assert list(check.record_problems(files)) == []
    assert list(check.record_problems(files | {"a": b"2"})) == ["a is not what RECORD says"]
    assert "b is in the wheel or in RECORD" in " ".join(check.record_problems(files | {"b": b""}))


def test_the_shim_exports_what_python_knows() -> None:
    pytest.importorskip("lief")
    from wheels import check

    from wan_attn.native import shim

    assert check.exported("wan_attn_shim") == set(shim.EXPORTED)
    assert "wan_attn_run" in check.exported("wan_attn")
    assert (ROOT / ".ci/wheels/requirements.txt").exists()
