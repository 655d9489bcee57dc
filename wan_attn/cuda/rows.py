# SPDX-License-Identifier: Apache-2.0
"""rows.py - which kernels of sdpa_rows.def an architecture runs, and what a compiler is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from wan_attn.cuda import sources
from wan_attn.cuda.tiles import (
    Helper,
    RopeKernel,
    Row,
    RowError,
    Tile,
    TileListed,
    TileListedQk8,
    TileQk8,
    TileSm90,
    gpus,
    half_rate,
    helpers,
    rope_kernels,
    table_rows,
    tegra,
    tiles,
    tiles_listed,
    tiles_listed_qk8,
    tiles_qk8,
    tiles_sm90,
)
from wan_attn.cuda.tiles_backward import TileBackward, backward_rows, tiles_backward

__all__ = [
    "SHIPPED",
    "SHIPPED_FOR_BOARDS",
    "Helper",
    "Job",
    "Kernel",
    "RopeKernel",
    "Row",
    "RowError",
    "Tile",
    "TileBackward",
    "TileListed",
    "TileListedQk8",
    "TileQk8",
    "TileSm90",
    "backward_rows",
    "class_of",
    "gpus",
    "half_rate",
    "helpers",
    "jobs_for",
    "kernels_for",
    "rope_kernels",
    "serving",
    "table_rows",
    "tegra",
    "tiles",
    "tiles_backward",
    "tiles_backward_for",
    "tiles_for",
    "tiles_listed",
    "tiles_listed_for",
    "tiles_listed_qk8",
    "tiles_listed_qk8_for",
    "tiles_qk8",
    "tiles_qk8_for",
    "tiles_sm90",
]

# Architectures whose machine code travels in a wheel; what runs elsewhere of it says `serving`.
SHIPPED = (75, 80, 86, 90, 120)
# What travels for Linux on arm64 alone: for boards whose GPU runs no machine code of a card.
# 87 is Jetson Orin; the newer boards need NVRTC 13, whose machine code many drivers do not load.
SHIPPED_FOR_BOARDS = (87,)


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
        """Names the result for any compiler: a change of text or options changes the name."""
        return f"{self.name}-{self.target}-{_fingerprint(self)}"

    def made_by(self, version: tuple[int, int]) -> str:
        """Names the result of one version of NVRTC."""
        return f"{self.stem}-nvrtc{version[0]}.{version[1]}"


@cache
def _fingerprint(job: Job) -> str:
    texts = [[name, hashlib.sha256(text).hexdigest()] for name, text in job.texts().items()]
    return hashlib.sha256(json.dumps([job.options(), texts]).encode()).hexdigest()[:20]


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


def tiles_for(arch: int) -> tuple[Tile, ...]:
    """The tiles of sdpa_sm80.cuh that `arch` runs: those of its class."""
    gpu_class = class_of(arch)
    return tuple(tile for tile in tiles() if tile.gpu_class == gpu_class)


def tiles_qk8_for(arch: int) -> tuple[TileQk8, ...]:
    """Those of 8-bit scores. Hopper has none: refuse.c says why."""
    if arch in {tile.one_arch for tile in tiles_sm90()}:
        return ()
    gpu_class = class_of(arch)
    return tuple(tile for tile in tiles_qk8() if tile.gpu_class == gpu_class)


def tiles_listed_for(arch: int) -> tuple[TileListed, ...]:
    """Those for lists of blocks; Hopper runs them by mma.sync."""
    gpu_class = class_of(arch)
    return tuple(tile for tile in tiles_listed() if tile.gpu_class == gpu_class)


def tiles_listed_qk8_for(arch: int) -> tuple[TileListedQk8, ...]:
    """Those for lists of blocks with 8-bit scores; on Hopper, too."""
    gpu_class = class_of(arch)
    return tuple(tile for tile in tiles_listed_qk8() if tile.gpu_class == gpu_class)


def tiles_backward_for(arch: int) -> tuple[TileBackward, ...]:
    """Those of gradients."""
    gpu_class = class_of(arch)
    return tuple(tile for tile in tiles_backward() if tile.gpu_class == gpu_class)


def kernels_for(arch: int) -> tuple[Kernel, ...]:
    """All that `arch` runs: attention and its gradient, the passes before and after, norm and
    rotation."""
    sm90 = (t for t in tiles_sm90() if t.one_arch == arch)
    exact: tuple[Kernel, ...] = (*sm90, *tiles_for(arch), *tiles_listed_for(arch))
    lossy: tuple[Kernel, ...] = (*tiles_qk8_for(arch), *tiles_listed_qk8_for(arch))
    tiles = (*exact, *lossy, *tiles_backward_for(arch))
    return (*tiles, *helpers().values(), *rope_kernels().values())


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

    Machine code for X.y runs on X.z from z = y on, but not between cards and Tegra; that of another
    class of tile would be right there, but slow. One of an architecture alone runs there alone.
    """
    lower = [
        arch
        for arch in sorted(gpus(), reverse=True)
        if arch < job.arch
        and arch // 10 == job.arch // 10
        and gpus()[arch] == class_of(job.arch)
        and job.kernel.one_arch is None
        and not {arch, job.arch} & tegra()
    ]
    return [job, *(Job(job.kernel, arch) for arch in lower)]
