# SPDX-License-Identifier: Apache-2.0
"""nvrtc.py - NVIDIA's run-time compiler, through ctypes: finds it, and makes machine code with it.

It needs no GPU, no driver, no toolkit and no header. torch's CUDA wheels bring it; PyPI has it. It
compiles for one thread at a time, however many call it: what shall run side by side needs a process
of its own. Facts about it: NVIDIA, "NVRTC (Runtime Compilation)".
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from wan_attn import config
from wan_attn.transient import is_transient

MAJORS = (12, 13)  # what the kernels are tested with
INSTALL = "pip install nvidia-cuda-nvrtc-cu12"

_WINDOWS = sys.platform == "win32"
_TOOLKITS = (
    *("/usr/local/cuda/lib64", "/opt/cuda/lib64", "/usr/lib64", "/usr/lib/wsl/lib"),
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"),
)

_P = c_void_p  # nvrtcProgram
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "nvrtcGetErrorString": (c_char_p, [c_int]),
    "nvrtcVersion": (c_int, [POINTER(c_int), POINTER(c_int)]),
    "nvrtcGetNumSupportedArchs": (c_int, [POINTER(c_int)]),
    "nvrtcGetSupportedArchs": (c_int, [POINTER(c_int)]),
    "nvrtcCreateProgram": (
        c_int,
        [POINTER(_P), c_char_p, c_char_p, c_int, POINTER(c_char_p), POINTER(c_char_p)],
    ),
    "nvrtcCompileProgram": (c_int, [_P, c_int, POINTER(c_char_p)]),
    "nvrtcGetProgramLogSize": (c_int, [_P, POINTER(c_size_t)]),
    "nvrtcGetProgramLog": (c_int, [_P, c_char_p]),
    "nvrtcGetCUBINSize": (c_int, [_P, POINTER(c_size_t)]),
    "nvrtcGetCUBIN": (c_int, [_P, c_char_p]),
    "nvrtcDestroyProgram": (c_int, [POINTER(_P)]),
}


class NvrtcError(RuntimeError):
    """NVRTC is missing, cannot be used, or refuses a source: what, why, and where that helps,
    what to do."""


class UnknownArch(NvrtcError):
    """This NVRTC has no code for an architecture."""


@dataclass(frozen=True)
class Found:
    """An NVRTC on this machine; nothing of it is loaded yet."""

    path: Path
    builtins: Path | None  # what it opens by name only, and does not find beside itself
    version: tuple[int, int] | None  # None: only the library itself can tell

    def __str__(self) -> str:
        number = "of unknown version" if self.version is None else version_name(self.version)
        return f"NVRTC {number} ({self.path})"


def version_name(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _folders() -> Iterator[tuple[int, Path]]:
    """(rank, folder) of everywhere it may be: Python packages, conda, then a CUDA toolkit."""
    lib = "bin" if _WINDOWS else "lib"
    for entry in dict.fromkeys(sys.path):
        packages = Path(entry or ".")
        # nvidia/cuda_nvrtc (CUDA 12), nvidia/cu13; in CUDA 13's on Windows a folder deeper.
        for package in sorted(packages.glob(f"nvidia/*/{lib}")):
            yield 0, package
            yield 0, package / "x86_64"
        yield 0, packages / "torch" / "lib"
    yield 1, Path(sys.prefix, *(("Library", "bin") if _WINDOWS else ("lib",)))
    for home in config.cuda_homes():
        yield from ((2, Path(home, *part)) for part in (("lib64",), ("bin",), ("bin", "x64")))
    yield from ((2, Path(folder)) for folder in _TOOLKITS if not _WINDOWS)


def _builtins_version(file: Path) -> tuple[int, int] | None:
    """(12, 8) of libnvrtc-builtins.so.12.8[.93] and of nvrtc-builtins64_128.dll."""
    if match := re.search(r"builtins64_(\d+)(\d)\.dll$", file.name):
        return int(match[1]), int(match[2])
    if match := re.search(r"builtins.*\.so\.(\d+)\.(\d+)", file.name):
        return int(match[1]), int(match[2])
    return None


def _major(file: Path) -> int | None:
    """12 of libnvrtc.so.12[...] and of nvrtc64_120_0.dll."""
    match = re.search(r"nvrtc64_(\d+)\d_\d+\.dll$|\.so\.(\d+)", file.name)
    return int(match[1] or match[2]) if match else None


def _in(folder: Path) -> Iterator[Found]:
    files = [
        file
        for file in folder.glob("nvrtc*.dll" if _WINDOWS else "libnvrtc*.so.*")
        if ".alt." not in file.name
    ]
    builtins = {v: f for f in files if (v := _builtins_version(f)) is not None}
    for file in sorted(file for file in files if "builtins" not in file.name):
        major = _major(file)
        version = max((v for v in builtins if v[0] == major), default=None)
        if major in MAJORS:
            yield Found(file, builtins[version] if version else None, version)


@cache
def found() -> tuple[Found, ...]:
    """Every NVRTC here, in the order in which to try them.

    Python's packages before a toolkit; 12 before 13, whose machine code needs a newer driver; of
    those the newest.
    """
    ranked: dict[Path, tuple[tuple[int, int, int], Found]] = {}
    for rank, folder in _folders():
        for one in _in(folder):
            major, minor = one.version or (_major(one.path) or 0, 0)
            ranked.setdefault(one.path.resolve(), ((rank, major, -minor), one))
    return tuple(one for _, one in sorted(ranked.values(), key=lambda pair: pair[0]))


def not_found() -> str:
    """Says what was looked for, and what to do."""
    where = r"nvidia\*\bin\nvrtc64_*.dll" if _WINDOWS else "nvidia/*/lib/libnvrtc.so.*"
    return (
        f"no NVRTC {' or '.join(f'{major}.x' for major in MAJORS)} here (looked for {where} in"
        f" Python's packages, in torch/lib, and for a CUDA toolkit); {INSTALL}"
    )


class Nvrtc:
    """One NVRTC, loaded."""

    def __init__(self, where: Found) -> None:
        self.path = where.path
        self._lib = _open(where)
        major, minor = c_int(), c_int()
        self._check(self._lib.nvrtcVersion(byref(major), byref(minor)), "nvrtcVersion")
        self.version = (major.value, minor.value)
        if self.version[0] not in MAJORS:
            raise NvrtcError(f"{self} is not one of {MAJORS}")
        count = c_int()
        self._check(self._lib.nvrtcGetNumSupportedArchs(byref(count)), "nvrtcGetNumSupportedArchs")
        archs = (c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(archs), "nvrtcGetSupportedArchs")
        self.archs = tuple(archs)

    def __str__(self) -> str:
        return f"NVRTC {version_name(self.version)} ({self.path})"

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            said = self._lib.nvrtcGetErrorString(status).decode(errors="replace")
            raise NvrtcError(f"{what} of {self.path} failed: {said}")

    def compile(self, arch: int, texts: Mapping[str, bytes], options: Sequence[str]) -> bytes:
        """Machine code (a cubin) for `arch`.

        Args:
            texts: {name: text}; the first is compiled, the others are there for its #include.
            options: as on a command line, with the target among them.

        Raises:
            UnknownArch: `arch` is newer than this NVRTC, or too old for it.
            NvrtcError: what the compiler said.
        """
        return self.compile_and_tell(arch, texts, options)[0]

    def compile_and_tell(
        self, arch: int, texts: Mapping[str, bytes], options: Sequence[str]
    ) -> tuple[bytes, str]:
        """Returns machine code, and what the compiler remarked."""
        if arch not in self.archs:
            known = f"{self.archs[0]} to {self.archs[-1]}"
            raise UnknownArch(f"{self} does not know sm_{arch} (it knows {known})")
        (name, text), *headers = texts.items()
        program = _P()
        status = self._lib.nvrtcCreateProgram(
            byref(program),
            text,
            name.encode(),
            len(headers),
            _strings([text for _, text in headers]),
            _strings([name.encode() for name, _ in headers]),
        )
        self._check(status, "nvrtcCreateProgram")
        try:
            words = _strings([option.encode() for option in options])
            status = self._lib.nvrtcCompileProgram(program, len(options), words)
            if status != 0:
                said = self._lib.nvrtcGetErrorString(status).decode(errors="replace")
                raise NvrtcError(f"{self} cannot compile {name}: {said}\n{self._log(program)}")
            return self._get("CUBIN", program), self._log(program)
        finally:
            self._lib.nvrtcDestroyProgram(byref(program))

    def _log(self, program: c_void_p) -> str:
        text = self._get("ProgramLog", program).rstrip(b"\0")
        return text.decode(errors="replace").strip()

    def _get(self, what: str, program: c_void_p) -> bytes:
        size = c_size_t()
        status = getattr(self._lib, f"nvrtcGet{what}Size")(program, byref(size))
        self._check(status, f"nvrtcGet{what}Size")
        data = ctypes.create_string_buffer(max(size.value, 1))
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, data), f"nvrtcGet{what}")
        return data.raw[: size.value]


def _strings(words: Sequence[bytes]) -> ctypes.Array[c_char_p]:
    return (c_char_p * len(words))(*words)


def _open(where: Found) -> ctypes.CDLL:
    try:
        if _WINDOWS:
            os.add_dll_directory(str(where.path.parent))  # type: ignore[attr-defined]
        if where.builtins is not None:
            # NVRTC asks for it by name alone: it must be in the process already.
            ctypes.CDLL(str(where.builtins), mode=ctypes.RTLD_GLOBAL)
        lib = ctypes.CDLL(str(where.path))
        for name, (restype, argtypes) in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = restype, argtypes
    except (OSError, AttributeError) as error:
        if is_transient(error):
            raise
        raise NvrtcError(f"{where.path} does not load: {error}; reinstall it: {INSTALL}") from error
    return lib


@cache
def load(where: Found) -> Nvrtc:
    """The compiler at this place, loaded once.

    Raises:
        NvrtcError: it cannot be loaded, or is of a version that was never tested.
    """
    return Nvrtc(where)
