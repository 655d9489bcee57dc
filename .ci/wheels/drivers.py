# SPDX-License-Identifier: Apache-2.0
"""drivers.py - the C drivers of tests/c, compiled for a wheel's platform, call the wheel's own
library: directly, under wine, under qemu, and with the oldest glibc that can be had.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from wheels import roots
from wheels.running import ROOT, Failed, Skipped, run
from wheels.targets import Target

ARM_LIBRARIES = Path("/usr/aarch64-linux-gnu")  # Debian's libc6-arm64-cross
CALLS = {"": "100", "wine": "60", "qemu": "10"}  # of the CPU kernels


def wine() -> str:
    found = shutil.which("wine64") or shutil.which("wine")
    if found is None or platform.machine() != "x86_64":
        raise Skipped("no wine here (Debian on x86-64: apt install wine64 wine)")
    return found


def qemu() -> str:
    found = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if found is None:
        raise Skipped("no qemu here (Debian: apt install qemu-user)")
    return found


def unpack(wheel: Path, folder: Path) -> Path:
    """The wheel's libwan_attn, in the folder."""
    with zipfile.ZipFile(wheel) as packed:
        names = (n for n in packed.namelist() if re.fullmatch(r"wan_attn/(lib)?wan_attn\.\w+", n))
        (name,) = names
        made = folder / Path(name).name
        made.write_bytes(packed.read(name))
    return made


def zig(folder: Path, *words: str | Path) -> None:
    cache = str(ROOT / "build/wheels/zig")
    caches = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    run([sys.executable, "-m", "ziglang", *words], folder, more=caches)


def import_library(folder: Path, library: Path, machine: str) -> Path:
    """What a linker for Windows needs to know of a DLL, from tests/abi.txt."""
    names = [
        w for w in (ROOT / "tests/abi.txt").read_text().splitlines() if re.fullmatch(r"\w+", w)
    ]
    (folder / "abi.def").write_text("EXPORTS\n" + "\n".join(names) + "\n")
    made = folder / "abi.lib"
    kind = {"amd64": "i386:x86-64", "arm64": "arm64"}[machine]
    zig(folder, "dlltool", "-m", kind, "-d", "abi.def", "-D", library.name, "-l", made)
    return made


def with_oldest_glibc(target: Target, wheel: Path) -> str:
    """As run_both, with the loader and the C library of the oldest Debian that can be had."""
    try:
        root = roots.make("oldest", ROOT / "build/wheels/roots")
    except roots.NoRoot as reason:
        raise Skipped(str(reason)) from reason
    libraries = root / "lib/x86_64-linux-gnu"
    (glibc,) = libraries.glob("libc-*.so")
    start: list[str | Path] = [libraries / "ld-linux-x86-64.so.2", "--library-path", libraries]
    return f"{glibc.stem.replace('libc-', 'glibc ')}: {run_both(target, wheel, start)}"


def run_both(target: Target, wheel: Path, starter: Sequence[str | Path] = ()) -> str:
    """Both drivers call the wheel's library; the CUDA half with the mock driver."""
    with tempfile.TemporaryDirectory(prefix="wan-attn-c-") as name:
        folder = Path(name)
        start, kind = (list(starter), "") if starter else runner(target)
        library = unpack(wheel, folder)
        link = library
        if target.system == "win32":
            link = import_library(folder, library, target.machine)
        tests, suffix = ROOT / "tests", ".exe" if target.system == "win32" else ""
        mock = folder / ("nvcuda.dll" if suffix else "libcuda.so.1")
        words = ["cc", "-target", target.triple, "-std=c11", "-D_GNU_SOURCE", "-O1"]
        words += ["-fno-sanitize=all", f"-I{ROOT / 'csrc'}"]
        ends = ["-lpthread"] if suffix else ["-lpthread", "-lm", "-ldl", "-Wl,-rpath,$ORIGIN"]
        for driver in ("test_core", "test_cuda"):
            zig(folder, *words, tests / f"c/{driver}.c", link, "-o", driver + suffix, *ends)
        zig(folder, *words, "-shared", "-fPIC", tests / "cuda_mock/driver.c", "-o", mock, *ends[:1])
        calls = CALLS[kind]
        there = f"Z:{mock}" if suffix else str(mock)
        more = {"WINEDEBUG": "-all", "WINEPREFIX": str(folder / "wine"), "LC_ALL": "C.UTF-8"}
        said = run([*start, folder / f"test_core{suffix}", calls], folder, more=more)
        said += run([*start, folder / f"test_cuda{suffix}", there, "100"], folder, more=more)
        if said.count(": right") != 2:
            raise Failed(said)
        return "; ".join(line.strip() for line in said.splitlines() if line.endswith(": right"))


def runner(target: Target) -> tuple[list[str | Path], str]:
    """The command that starts this platform's programs here, and which of CALLS it is."""
    if target.system == "linux" and target.machine == platform.machine():
        return [], ""
    if target.system == "win32" and target.machine == "amd64":
        return [wine()], "wine"
    if target.system == "linux" and target.machine == "aarch64":
        if not ARM_LIBRARIES.is_dir():
            raise Skipped("no C library for arm64 here (Debian: apt install libc6-arm64-cross)")
        return [qemu(), "-L", ARM_LIBRARIES], "qemu"
    raise Skipped("nothing here runs its programs: wheels.check has read its files")
