# SPDX-License-Identifier: Apache-2.0
"""compile.py - kernels to cubins, with whatever compiler there is: nvcc, or NVRTC from PyPI."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path

from emu.rows import CSRC, Helper, Tile
from emu.rows_sm90 import TileSm90

Kernel = Tile | Helper | TileSm90


class CompileError(Exception):
    """What the compiler said."""


def options(tile: Kernel) -> list[str]:
    """What every CUDA compiler has to be told; the loader uses the same."""
    return [f"-I{CSRC}", "-std=c++17", *(f"-D{k}={v}" for k, v in tile.defines().items())]


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _nvcc(arch: int | str, source: Path, output: Path, *more: str) -> str:
    command = [nvcc() or "", f"-arch=sm_{arch}", "--Werror=all-warnings", *more, str(source)]
    done = subprocess.run(
        [*command, "-o", str(output)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CompileError(done.stderr)
    return done.stderr


def with_nvcc(tile: Kernel, arch: int | str, output: Path) -> str:
    """Compiles to the cubin `output`; warnings and spills are errors. Returns ptxas' remarks."""
    strict = ("-Xptxas", "-v,--warn-on-spills,-Werror")
    return _nvcc(arch, CSRC / tile.source, output, "-cubin", *strict, *options(tile), "-x", "cu")


def to_ptx(source: Path, arch: int | str, output: Path) -> None:
    _nvcc(arch, source, output, "-ptx", f"-I{CSRC}", "-std=c++17")


@cache
def nvrtcs() -> dict[tuple[int, int], ctypes.CDLL]:
    """Version -> NVRTC, for each of the PyPI packages that is importable (torch brings one)."""
    found = {}
    for folder in dict.fromkeys(Path(entry) for entry in sys.path):
        for file in sorted(folder.glob("nvidia/*/lib/libnvrtc.so.*")):
            # NVRTC looks for its builtins by name only: they must be there already.
            for builtins in file.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            library = ctypes.CDLL(str(file))
            major, minor = c_int(), c_int()
            library.nvrtcVersion(byref(major), byref(minor))
            found.setdefault((major.value, minor.value), library)
    return found


def _text(library: ctypes.CDLL, what: str, program: c_void_p) -> bytes:
    size = c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, text)
    return text.raw


def with_nvrtc(library: ctypes.CDLL, tile: Kernel, arch: int | str, output: Path) -> str:
    """Compiles to the cubin `output`. Returns ptxas' remarks."""
    program = c_void_p()
    source = (CSRC / tile.source).read_bytes()
    library.nvrtcCreateProgram(byref(program), source, tile.source.encode(), 0, None, None)
    flags = [f"--gpu-architecture=sm_{arch}", "--ptxas-options=-v", *options(tile)]
    status = library.nvrtcCompileProgram(
        program, len(flags), (c_char_p * len(flags))(*(flag.encode() for flag in flags))
    )
    try:
        if status != 0:
            raise CompileError(_text(library, "ProgramLog", program).decode())
        output.write_bytes(_text(library, "CUBIN", program))
        return _text(library, "ProgramLog", program).decode()
    finally:
        library.nvrtcDestroyProgram(byref(program))
