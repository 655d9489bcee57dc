# SPDX-License-Identifier: Apache-2.0
"""compile.py - kernels to cubins, with whatever compiler there is: nvcc, or NVRTC from PyPI."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

from emu.rows import CSRC, Helper, Job, RopeKernel, Tile, TileBackward, TileSm90
from wan_attn.cuda import nvrtc

Kernel = Tile | Helper | TileBackward | TileSm90 | RopeKernel


class CompileError(Exception):
    """What the compiler said."""


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _nvcc(source: Path, output: Path, *more: str) -> str:
    command = [nvcc() or "", f"-I{CSRC}", "--Werror=all-warnings", *more, str(source)]
    done = subprocess.run(
        [*command, "-o", str(output)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CompileError(done.stderr)
    return done.stderr


def with_nvcc(tile: Kernel, arch: int, output: Path) -> str:
    """Compiles to the cubin `output`; warnings and spills are errors. Returns ptxas' remarks."""
    strict = ("-Xptxas", "-v,--warn-on-spills,-Werror")
    options = Job(tile, arch).options()
    return _nvcc(CSRC / tile.source, output, "-cubin", *strict, *options, "-x", "cu")


def to_ptx(source: Path, arch: int | str, output: Path, *defines: str) -> None:
    more = ("-ptx", f"-arch=sm_{arch}", "-std=c++17", *defines, "-x", "cu")
    _nvcc(source, output, *more)


@cache
def nvrtcs() -> dict[tuple[int, int], nvrtc.Nvrtc]:
    """Version -> NVRTC, for each of the PyPI packages that is importable (torch brings one)."""
    loaded = [nvrtc.load(one) for one in nvrtc.found() if "nvidia" in one.path.parts]
    return {one.version: one for one in reversed(loaded)}


def with_nvrtc(compiler: nvrtc.Nvrtc, tile: Kernel, arch: int, output: Path) -> str:
    """Compiles to the cubin `output`, just as the package does. Returns ptxas' remarks."""
    job = Job(tile, arch)
    options = [*job.options(), "--ptxas-options=-v"]
    try:
        cubin, remarks = compiler.compile_and_tell(arch, job.texts(), options)
    except nvrtc.NvrtcError as error:
        raise CompileError(str(error)) from error
    output.write_bytes(cubin)
    return remarks
