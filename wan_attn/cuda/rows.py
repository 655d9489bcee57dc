# SPDX-License-Identifier: Apache-2.0
"""rows.py - csrc/cuda/sdpa_rows.def for Python: the tiles, and what each compiler needs of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Protocol, TypeVar

from wan_attn.cuda import sources

Made = TypeVar("Made")

# Architectures whose machine code travels in a wheel; what runs elsewhere of it says `serving`.
SHIPPED = (75, 80, 86, 90, 120)


class RowError(LookupError):
    """There is no such kernel, or none for this architecture."""


@dataclass(frozen=True)
class Tile:
    """One TILE line; the fields are its columns."""

    row: str
    gpu_class: str
    body: str
    dtype: str
    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    q_in_regs: int
    min_ctas: int
    pv_sum_f16: int

    one_arch = None

    @property
    def name(self) -> str:
        return f"{self.row}_{self.gpu_class.lower()}"

    @property
    def key(self) -> str:
        return self.row

    @property
    def source(self) -> str:
        return f"cuda/sdpa_{self.body}.cuh"

    @property
    def args(self) -> str:
        return "wan_attn_cuda_args"

    @property
    def bf16_as_f16(self) -> bool:
        """Turing: k and v of a bf16 row are f16, with a scale each."""
        return self.gpu_class == "TURING" and self.dtype == "BF16"

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    @property
    def rows_per_warp(self) -> int:
        return self.block_m // self.num_warps

    @property
    def smem_bytes(self) -> int:
        q_rows = 0 if self.q_in_regs else self.block_m
        return 2 * self.head_dim * (self.block_n * (self.stages + 1) + q_rows) + 16

    @property
    def max_registers(self) -> int:
        """What a thread may use so that min_ctas blocks fit the 65,536 registers of an SM."""
        return min(255, 65536 // (self.min_ctas * self.num_threads) // 8 * 8)

    def defines(self) -> dict[str, str]:
        """The macros that turn the body into this kernel."""
        return {
            "KERNEL_NAME": self.row,
            "IS_BF16": str(int(self.dtype == "BF16")),
            "HEAD_DIM": str(self.head_dim),
            "BLOCK_M": str(self.block_m),
            "BLOCK_N": str(self.block_n),
            "NUM_WARPS": str(self.num_warps),
            "STAGES": str(self.stages),
            "Q_IN_REGS": str(self.q_in_regs),
            "MIN_CTAS": str(self.min_ctas),
            "PV_SUM_F16": str(self.pv_sum_f16),
            "SMEM_BYTES": str(self.smem_bytes),
        }


@dataclass(frozen=True)
class TileSm90:
    """One TILE_SM90 line; the fields are its columns. A row has several, for different calls."""

    row: str
    use: str
    from_q: int
    dtype: str
    head_dim: int
    block_n: int
    consumers: int
    stages: int
    cluster: int
    regs_producer: int
    regs_consumer: int

    source = "cuda/sdpa_sm90.cuh"
    args = "wan_attn_cuda_sm90_args"
    # NVIDIA compiles wgmma for sm_90a alone: no other architecture has it, not even a later one.
    one_arch = 90

    @property
    def name(self) -> str:
        shape = f"{self.block_m}x{self.block_n}_s{self.stages}_c{self.cluster}"
        return f"{self.row}_{shape}"

    @property
    def key(self) -> str:
        columns = f"n{self.block_n}_w{self.consumers}_s{self.stages}_c{self.cluster}"
        return f"{self.row}_{columns}"

    @property
    def block_m(self) -> int:
        return 64 * self.consumers

    @property
    def num_threads(self) -> int:
        return 128 * (1 + self.consumers)

    @property
    def smem_bytes(self) -> int:
        rows = self.block_m + 2 * self.stages * self.block_n
        return 2 * self.head_dim * rows + 64 * self.stages + 16

    def defines(self) -> dict[str, str]:
        """The macros that turn the body into this kernel."""
        return {
            "KERNEL_NAME": self.row,
            "IS_BF16": str(int(self.dtype == "BF16")),
            "HEAD_DIM": str(self.head_dim),
            "BLOCK_N": str(self.block_n),
            "CONSUMERS": str(self.consumers),
            "STAGES": str(self.stages),
            "CLUSTER": str(self.cluster),
            "REGS_PRODUCER": str(self.regs_producer),
            "REGS_CONSUMER": str(self.regs_consumer),
            "SMEM_BYTES": str(self.smem_bytes),
        }


@dataclass(frozen=True)
class Helper:
    """One HELPER line: a pass before or after the attention."""

    name: str
    body: str
    num_threads: int
    pack_step: int

    one_arch = None

    @property
    def row(self) -> str:
        return self.name

    @property
    def key(self) -> str:
        return self.name

    @property
    def source(self) -> str:
        return f"cuda/{self.body}.cuh"

    @property
    def args(self) -> str:
        return f"wan_attn_cuda_{self.body}_args"

    def defines(self) -> dict[str, str]:
        return {
            "KERNEL_NAME": self.name,
            "NUM_THREADS": str(self.num_threads),
            "PACK_STEP": str(self.pack_step),
        }


class Kernel(Protocol):
    """What can be compiled: every kind of line of the list offers this."""

    @property
    def key(self) -> str:
        """What the loader asks for; one class of GPU has one kernel of that name."""

    @property
    def source(self) -> str:
        """The file, below csrc/."""

    @property
    def one_arch(self) -> int | None:
        """The only architecture that it is for (compiled for sm_90a, say); None: any."""

    def defines(self) -> dict[str, str]:
        """The macros that make this kernel of the file."""


@dataclass(frozen=True)
class Job:
    """A kernel for one architecture: all that a compiler is told, and nothing that it is not."""

    kernel: Kernel
    arch: int

    @property
    def name(self) -> str:
        return self.kernel.key

    @property
    def target(self) -> str:
        """sm_86, for example; sm_90a if the kernel is written for that architecture alone."""
        return f"sm_{self.arch}" + ("a" if self.kernel.one_arch else "")

    def options(self) -> list[str]:
        defines = (f"-D{name}={value}" for name, value in self.kernel.defines().items())
        return [f"--gpu-architecture={self.target}", "-std=c++17", *defines]

    def texts(self) -> dict[str, bytes]:
        """{name: text}; the first is to be compiled, the others are what it includes."""
        return sources.closure(self.kernel.source)

    @property
    def stem(self) -> str:
        """Names the result, whatever compiles it: a change of text or options changes the name."""
        return f"{self.name}-{self.target}-{_fingerprint(self)}"

    def made_by(self, version: tuple[int, int]) -> str:
        """Names the result of one version of NVRTC."""
        return f"{self.stem}-nvrtc{version[0]}.{version[1]}"


@cache
def _fingerprint(job: Job) -> str:
    texts = [[name, hashlib.sha256(text).hexdigest()] for name, text in job.texts().items()]
    return hashlib.sha256(json.dumps([job.options(), texts]).encode()).hexdigest()[:20]


def _lines(macro: str) -> list[list[str]]:
    text = (sources.root() / "cuda" / "sdpa_rows.def").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return [
        re.split(r"\s*,\s*", found.strip())
        for found in re.findall(rf"^{macro}\((.*)\)", text, re.M)
    ]


def _read(macro: str, made: type[Made]) -> tuple[Made, ...]:
    kinds = [field.type for field in fields(made)]  # type: ignore[arg-type]
    return tuple(
        made(*(int(x) if kind == "int" else x for kind, x in zip(kinds, line, strict=True)))
        for line in _lines(macro)
    )


@cache
def tiles() -> tuple[Tile, ...]:
    return _read("TILE", Tile)


@cache
def tiles_sm90() -> tuple[TileSm90, ...]:
    """Orders tiles as a call looks for its own."""
    return _read("TILE_SM90", TileSm90)


@cache
def helpers() -> dict[str, Helper]:
    return {helper.name: helper for helper in _read("HELPER", Helper)}


@cache
def gpus() -> dict[int, str]:
    """Compute capability * 10 -> class."""
    return {int(arch): gpu_class for arch, gpu_class in _lines("GPU")}


def class_of(arch: int) -> str:
    """The class of tile for `arch`; one that is not listed takes that of the one below it.

    Raises:
        RowError: `arch` is older than all of the list.
    """
    below = [known for known in gpus() if known <= arch]
    if not below:
        raise RowError(f"CUDA kernels need compute capability {_dotted(min(gpus()))} or newer")
    return gpus()[max(below)]


def _dotted(arch: int) -> str:
    return f"{arch // 10}.{arch % 10}"


@cache
def half_rate() -> tuple[tuple[int, str], ...]:
    """(compute capability * 10, words in the card's name) of cards that pv16 rows are for."""
    return tuple((int(arch), words.strip('"')) for arch, words in _lines("HALF_RATE"))


def tiles_for(arch: int) -> tuple[Tile, ...]:
    """The tiles of sdpa_sm80.cuh that `arch` runs: those of its class."""
    gpu_class = class_of(arch)
    return tuple(tile for tile in tiles() if tile.gpu_class == gpu_class)


def kernels_for(arch: int) -> tuple[Kernel, ...]:
    """All that `arch` runs: attention, and the passes before and after; no candidates."""
    sm90 = (t for t in tiles_sm90() if t.one_arch == arch and t.use != "SPARE")
    return (*sm90, *tiles_for(arch), *helpers().values())


def jobs_for(arch: int, names: Iterable[str] | None = None) -> tuple[Job, ...]:
    """Everything (or what is named) that `arch` runs.

    Raises:
        RowError: nothing of that name runs there.
    """
    mine = {kernel.key: kernel for kernel in kernels_for(arch)}
    jobs = []
    for name in mine if names is None else names:
        if name not in mine:
            known = name in {kernel.key for a in gpus() for kernel in kernels_for(a)}
            gpu = f"compute capability {_dotted(arch)} (class {class_of(arch)})"
            has = ", ".join(mine)
            raise RowError(
                f"{name} has no tile for {gpu}"
                if known
                else f"kernel must be one of {has}; got {name!r}"
            )
        jobs.append(Job(mine[name], arch))
    return tuple(jobs)


def serving(job: Job) -> list[Job]:
    """This job and those whose machine code serves as well, nearest first.

    Machine code for X.y runs on X.z from z = y on; that of another class of tile would be right
    there, but slow. One of an architecture alone runs there alone.
    """
    lower = [
        arch
        for arch in sorted(gpus(), reverse=True)
        if arch < job.arch
        and arch // 10 == job.arch // 10
        and gpus()[arch] == class_of(job.arch)
        and job.kernel.one_arch is None
    ]
    return [job, *(Job(job.kernel, arch) for arch in lower)]
