# SPDX-License-Identifier: Apache-2.0
"""test.py - runs the wheels of one folder, as far as this machine can:

    PYTHONPATH=.ci python -m wheels.test [dist] [--quick] [--torch PYTHON ...]

Installs into fresh environments: beside each torch of --torch (a Python that has one), and without
any. Compiles the C drivers of tests/c for each platform and lets them call the wheel's own library:
directly, under wine, under qemu. What cannot run here is said. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from wheels.targets import TARGETS, Target

ROOT = Path(__file__).resolve().parents[2]
ARM_LIBRARIES = Path("/usr/aarch64-linux-gnu")  # Debian's libc6-arm64-cross
CALLS = {"": "100", "wine": "60", "qemu": "10"}  # of the CPU kernels


class Failed(RuntimeError):
    """A program has said something else than it should."""


class Skipped(RuntimeError):
    """This machine lacks something; says what."""


def run(
    words: Sequence[str | Path], cwd: Path, code: int = 0, more: dict[str, str] | None = None
) -> str:
    """A program's output; Failed if its exit code is another."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in left_out} | (more or {})
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    if done.returncode != code:
        shown = " ".join(map(str, words))[:300]
        raise Failed(f"{shown}: exit code {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


# --- installed wheels ----------------------------------------------------------------------------

# The op against the formula in float64, written out; then what was used.
CALL = """
import time; start = time.perf_counter(); import torch; had = time.perf_counter()
import wan_attn; took = time.perf_counter() - had
from wan_attn.native import library, op
torch.manual_seed(0)
q, k, v = (torch.randn(2, n, 3, 64) for n in (5, 70, 70))
scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8
expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double())
error = (wan_attn.sdpa(q, k, v).double() - expected).abs().max().item()
assert error < 1e-5, error
assert not torch.cuda.is_initialized()
said = f"torch {torch.__version__}: {op.binding()}, off by {error:.0e}, import {1000 * took:.0f} ms"
print(said if library.load_error() is None else said + ", without our library")
"""
WITHOUT_TORCH = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import wan_attn
assert "needs PyTorch 2.4 or newer" in str(said[0].message)
"""
PACKAGE = "import pathlib, wan_attn; print(pathlib.Path(wan_attn.__file__).parent)"


def environment(folder: Path, name: str, base: Path, wheel: Path, see: bool) -> Path:
    """A fresh environment with this wheel; its Python, which can `see` the packages of base."""
    venv = folder / name
    run([base, "-m", "venv", venv], folder)
    python = venv / "bin/python"
    run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], folder)
    if see:
        (packages,) = venv.glob("lib/python*/site-packages")
        ask = "import sysconfig, torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])"
        (packages / "torch_is_here.pth").write_text(run([base, "-c", ask], folder))
    return python


def damaged(python: Path, folder: Path) -> None:
    """One changed byte is told; without its library the package still computes and says why."""
    package = Path(run([python, "-W", "ignore", "-c", PACKAGE], folder).strip())
    (library,) = package.glob("libwan_attn.so")
    data = bytearray(library.read_bytes())
    data[-1] ^= 1
    library.write_bytes(data)
    if "libwan_attn.so: its bytes" not in run([python, "-m", "wan_attn", "verify"], folder, 1):
        raise Failed("verify does not name the library in which one byte was changed")
    library.unlink()
    if "without our library" not in run([python, "-c", CALL], folder):
        raise Failed("without its library the package does not say so")
    doctor = run([python, "-m", "wan_attn", "verify"], folder, 1)
    if "libwan_attn.so is not in the package" not in " ".join(doctor.split()):
        raise Failed(f"verify does not say that the library is gone:\n{doctor}")


def beside_torch(base: Path, wheel: Path, is_whole: bool = True) -> str:
    """Installs, calls, verifies and damages a wheel in an environment that sees base's torch."""
    with tempfile.TemporaryDirectory(prefix="wan-attn-wheel-") as name:
        folder = Path(name)
        python = environment(folder, "venv", base, wheel, see=True)
        said = run([python, "-c", CALL], folder).splitlines()[-1]
        if ("without our library" in said) == is_whole:
            raise Failed(said)
        version = tuple(map(int, re.findall(r"torch (\d+)\.(\d+)", said)[0]))
        if is_whole and (": shim," in said) != (version >= (2, 9)):
            raise Failed(f"another binding than this torch has: {said}")
        run([python, "-m", "wan_attn", "verify"], folder, 0)
        if is_whole:
            damaged(python, folder)
        return said


def without_torch(base: Path, wheel: Path) -> str:
    """The package imports, and its commands say what is missing."""
    with tempfile.TemporaryDirectory(prefix="wan-attn-wheel-") as name:
        folder = Path(name)
        python = environment(folder, "venv", base, wheel, see=False)
        run([python, "-c", WITHOUT_TORCH], folder)
        run([python, "-m", "wan_attn", "verify"], folder, 0)
        return "imports, and says that torch is missing; verify is content"


# --- C drivers against a wheel's library ---------------------------------------------------------


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


def c_drivers(target: Target, wheel: Path) -> str:
    """Both drivers call the wheel's library; the CUDA half with the mock driver."""
    with tempfile.TemporaryDirectory(prefix="wan-attn-c-") as name:
        folder = Path(name)
        start, kind = runner(target, folder)
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


def runner(target: Target, folder: Path) -> tuple[list[str | Path], str]:
    """The command that starts this platform's programs here, and which of CALLS it is."""
    if target.system == "linux" and target.machine == platform.machine():
        return [], ""
    if target.system == "win32" and target.machine == "amd64":
        wine = shutil.which("wine64") or shutil.which("wine")
        if wine is None:
            raise Skipped("no wine here (Debian: apt install wine64 wine)")
        return [wine], "wine"
    if target.system == "linux" and target.machine == "aarch64":
        qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
        if qemu is None or not ARM_LIBRARIES.is_dir():
            raise Skipped("no qemu here (Debian: apt install qemu-user libc6-arm64-cross)")
        return [qemu, "-L", ARM_LIBRARIES], "qemu"
    raise Skipped("nothing here runs its programs: wheels.check has read its files")


# --- all of it -----------------------------------------------------------------------------------


def attempt(name: str, what: str, test: Callable[[], str]) -> bool:
    """Prints one line of the table; whether the test did not fail."""
    start = time.monotonic()
    try:
        verdict, said = "ok", test()
    except Skipped as reason:
        verdict, said = "not run", str(reason)
    except (Failed, OSError, subprocess.TimeoutExpired) as error:
        verdict, said = "PROBLEM", str(error)
    print(
        f"   {name:22} {what:14} {verdict:8} {time.monotonic() - start:5.0f} s  {said}", flush=True
    )
    return verdict != "PROBLEM"


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 if a test has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("dist", type=Path, nargs="?", default=ROOT / "dist")
    parser.add_argument("--torch", type=Path, nargs="+", default=[], metavar="PYTHON")
    parser.add_argument("--quick", action="store_true", help="this machine's own wheel alone")
    args = parser.parse_args(arguments)
    wheels = {w.stem.rpartition("-")[2]: w.resolve() for w in args.dist.glob("*.whl")}
    own = next((t.platform for t in TARGETS.values() if t.machine == platform.machine()), "")
    fine = own in wheels
    if not fine:
        print(f"there is no wheel for this machine in {args.dist}: {sorted(wheels)}")
    for name, wheel in wheels.items():
        target = TARGETS[name]
        if args.quick and name != own:
            continue
        if name in (own, "any"):
            for base in args.torch:
                fine &= attempt(
                    name,
                    "beside torch",
                    lambda b=base, w=wheel, n=name: beside_torch(b.absolute(), w, n == own),  # type: ignore[misc]
                )
            fine &= attempt(
                name,
                "without torch",
                lambda w=wheel: without_torch(Path(sys.executable), w),  # type: ignore[misc]
            )
        if target.triple:
            fine &= attempt(name, "C drivers", lambda t=target, w=wheel: c_drivers(t, w))  # type: ignore[misc]
    return int(not fine)


if __name__ == "__main__":
    raise SystemExit(main())
