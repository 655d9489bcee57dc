# SPDX-License-Identifier: Apache-2.0
"""build.py - compiles the emulator and kernels for it; keeps what it has made under build/emu."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from emu.rows import CSRC, Helper, RopeKernel, Tile, TileBackward, TileSm90, emulated_arch

HERE = Path(__file__).resolve().parent
BUILT = HERE.parents[1] / "build" / "emu"
MACHINE = ("fiber", "machine", "memory", "instructions", "bulk", "warpgroup", "sanitizer")

FLAGS = [
    *("-std=c++17", "-fPIC", "-g0", "-DWAN_ATTN_EMULATE", f"-I{HERE.parent}"),
    "-ffp-contract=off",  # fused operations are the kernel's to ask for
    *("-Wall", "-Wextra"),
    # The loops' pragmas are meant for the other compilers.
    *("-Wno-unknown-pragmas", "-Wno-pass-failed"),
]
# The machine runs for all; a kernel is there to be watched: uninitialised registers hold NaN
# (with clang++; g++'s pattern is a finite number) and register arrays know their bounds.
MACHINE_FLAGS = [*FLAGS, "-O2", "-Werror", f"-I{CSRC}", "-DEMULATED_ARCH=80"]
KERNEL_FLAGS = [
    *(*FLAGS, "-O1", "-ftrivial-auto-var-init=pattern"),
    *("-fsanitize=bounds,shift,integer-divide-by-zero", "-fno-sanitize-recover=all"),
]


@cache
def compiler() -> str | None:
    """clang++, else g++, else none; CXX decides if it is set."""
    chosen = os.environ.get("CXX", "").split()
    return next((c for c in (*chosen[:1], "clang++", "g++", "c++") if shutil.which(c)), None)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@cache
def _version() -> str:
    found = subprocess.run([compiler() or "", "--version"], capture_output=True, text=True)
    return found.stdout


def made(
    stem: str, suffix: str, sources: list[Path], command: list[str], folder: Path = BUILT
) -> Path:
    """The output of `command`, made unless it is there from the same sources and command."""
    digest = hashlib.sha256("\0".join([*command, _version()]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = folder / f"{stem}-{digest.hexdigest()[:16]}{suffix}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Into a file of its own first: several test processes may be at it.
        with tempfile.TemporaryDirectory(dir=folder) as private:
            made = Path(private) / target.name
            _run([*command, "-o", str(made)])
            made.replace(target)
    return target


def _sources(csrc: Path) -> list[Path]:
    return sorted([*csrc.glob("cuda/**/*.*h"), *HERE.glob("*.h"), *HERE.glob("*.cpp")])


@cache
def _machine() -> tuple[str, ...]:
    objects = []
    for stem in MACHINE:
        command = [compiler() or "", *MACHINE_FLAGS, "-c", str(HERE / f"{stem}.cpp")]
        objects.append(str(made(stem, ".o", _sources(CSRC), command)))
    return tuple(objects)


def definitions(
    kernel: Tile | TileBackward | TileSm90 | Helper | RopeKernel, arch: int | None = None
) -> dict[str, str]:
    """The macros that make one kernel of kernel.cpp."""
    return {
        "SMEM_BYTES": str(getattr(kernel, "smem_bytes", 0)),
        # The host says how many of a kernel's threads a launch has.
        **({"LAUNCH_THREADS": "args->num_threads"} if isinstance(kernel, RopeKernel) else {}),
        **kernel.defines(),
        "KERNEL_ARGS": kernel.args,
        "EMULATED_ARCH": str(arch or emulated_arch(kernel)),
        "KERNEL_BODY": kernel.source,
    }


@cache
def library(
    tile: Tile | TileBackward | Helper | RopeKernel, csrc: Path = CSRC, arch: int | None = None
) -> ctypes.CDLL:
    """The emulated kernel. `csrc`: other sources than the repository's (planted bugs)."""
    defines = [f"-D{name}={value}" for name, value in definitions(tile, arch).items()]
    strict = ["-Werror"] if csrc == CSRC else []  # bugs may leave things unused
    command = [
        *(compiler() or "", *KERNEL_FLAGS, *strict, f"-I{csrc}", "-shared", *defines),
        *(str(HERE / "kernel.cpp"), *_machine()),
    ]
    folder = BUILT if csrc == CSRC else csrc
    return ctypes.CDLL(str(made(tile.name, ".so", _sources(csrc), command, folder)))
