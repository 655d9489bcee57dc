# SPDX-License-Identifier: Apache-2.0
"""collect.py - the PTX of kernels, by NVRTC or nvcc; kept under build/ptx by content."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
import tempfile
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path

from emu import compile as compilers
from emu.rows import CSRC, Job
from wan_attn.cuda import nvrtc
from wan_attn.cuda.rows import SHIPPED, jobs_for

BUILT = Path(__file__).resolve().parents[2] / "build" / "ptx"


class CompileError(Exception):
    """What the compiler said."""


def shipped() -> tuple[Job, ...]:
    """Every kernel on every architecture whose machine code travels in a wheel."""
    return tuple(job for arch in SHIPPED for job in jobs_for(arch))


def _texts(job: Job, csrc: Path) -> dict[str, bytes]:
    """{name: text} of this kernel in other sources than the repository's; the first is compiled."""
    names = [job.kernel.source, *(n for n in job.texts() if n != job.kernel.source)]
    return {name: (csrc / name).read_bytes() for name in names}


def _options(job: Job) -> list[str]:
    """compute_86 for sm_86: the same PTX, without machine code that nobody reads."""
    return [option.replace("=sm_", "=compute_") for option in job.options()]


class Nvrtc:
    """One NVRTC, asked for PTX."""

    def __init__(self, loaded: nvrtc.Nvrtc) -> None:
        self.name = f"nvrtc{nvrtc.version_name(loaded.version)}"
        self._lib = ctypes.CDLL(str(loaded.path))
        for name in ("nvrtcGetPTXSize", "nvrtcGetProgramLogSize"):
            getattr(self._lib, name).argtypes = [c_void_p, ctypes.POINTER(c_size_t)]
        for name in ("nvrtcGetPTX", "nvrtcGetProgramLog"):
            getattr(self._lib, name).argtypes = [c_void_p, c_char_p]
        strings = ctypes.POINTER(c_char_p)
        self._lib.nvrtcCreateProgram.argtypes = [
            *(ctypes.POINTER(c_void_p), c_char_p, c_char_p, c_int, strings, strings)
        ]
        self._lib.nvrtcCompileProgram.argtypes = [c_void_p, c_int, strings]
        self._lib.nvrtcDestroyProgram.argtypes = [ctypes.POINTER(c_void_p)]

    def _get(self, what: str, program: c_void_p) -> str:
        size = c_size_t()
        getattr(self._lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(max(1, size.value))
        getattr(self._lib, f"nvrtcGet{what}")(program, text)
        return text.value.decode(errors="replace")

    def ptx(self, job: Job, csrc: Path) -> str:
        (name, text), *headers = _texts(job, csrc).items()
        program, options = c_void_p(), _options(job)
        self._lib.nvrtcCreateProgram(
            *(ctypes.byref(program), text, name.encode(), len(headers)),
            (c_char_p * len(headers))(*(t for _, t in headers)),
            (c_char_p * len(headers))(*(n.encode() for n, _ in headers)),
        )
        try:
            words = (c_char_p * len(options))(*(o.encode() for o in options))
            if self._lib.nvrtcCompileProgram(program, len(options), words):
                raise CompileError(self._get("ProgramLog", program))
            return self._get("PTX", program)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))


class Nvcc:
    """The toolkit's compiler, asked for PTX."""

    def __init__(self, path: str) -> None:
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"V([\d.]+)", said)
        self.name = f"nvcc{release[1] if release else ''}"
        self._path = path

    def ptx(self, job: Job, csrc: Path) -> str:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "kernel.ptx")
            command = [self._path, f"-I{csrc}", "-ptx", "-x", "cu", *job.options()]
            command += [str(csrc / job.kernel.source), "-o", str(output)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompileError(done.stderr)
            return output.read_text(encoding="utf-8")


Compiler = Nvrtc | Nvcc


@cache
def nvrtcs() -> tuple[Nvrtc, ...]:
    """Each NVRTC that Python's packages bring, the oldest first: NVRTC 12 is what ships."""
    loaded = sorted(compilers.nvrtcs().items())
    return tuple(Nvrtc(one) for _, one in loaded)


@cache
def all_compilers() -> tuple[Compiler, ...]:
    path = compilers.nvcc()
    return (*nvrtcs(), *([Nvcc(path)] if path else []))


def ptx_of(job: Job, compiler: Compiler, csrc: Path = CSRC) -> str:
    """The kernel's PTX.

    Raises:
        CompileError: the compiler refuses it.
    """
    digest = hashlib.sha256(repr((compiler.name, _options(job))).encode())
    for name, text in _texts(job, csrc).items():
        digest.update(name.encode() + text)
    kept = BUILT / f"{job.name}-{job.target}-{compiler.name}-{digest.hexdigest()[:16]}.ptx"
    if not kept.exists():
        ptx = compiler.ptx(job, csrc)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            file.write(ptx)
        Path(file.name).replace(kept)  # at once: several test processes may be at it
    return kept.read_text(encoding="utf-8")
