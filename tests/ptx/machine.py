# SPDX-License-Identifier: Apache-2.0
"""machine.py - builds the machine, loads programs into it, and runs them."""

from __future__ import annotations

import ctypes
import hashlib
import pickle
import shutil
import subprocess
import tempfile
from collections import Counter
from ctypes import c_char_p, c_int, c_longlong, c_uint, c_void_p
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ptx import flow, parse, translate
from ptx.collect import BUILT

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-fPIC", "-O2", "-march=native", "-fwrapv", "-fno-strict-aliasing"]
FLAGS += ["-ftree-vectorize", "-fvect-cost-model=dynamic"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


class PtxError(AssertionError):
    """What the machine found wrong with a kernel."""


@dataclass(frozen=True)
class Knobs:
    """How the machine takes its liberties (machine.h)."""

    landing: int = 2  # asynchronous work: 0 at once, 1 as late as it may, 2 at random
    order: int = 2  # of warps and of parted lanes: 0 lowest first, 1 highest first, 2 at random
    seed: int = 0
    check_order: int = 1
    rank_bits: int = 1
    window: int = 0x400
    sum_block: int = 0
    sum_bits: int = 24
    ex2_error: int = 0
    flush_sums: int = 0
    registers: int = 0
    garbage: int = 0xFFFFFFFF


class _Knobs(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("landing", "order", "seed", "check_order", "rank_bits")),
        *((name, c_int) for name in ("window", "sum_block", "sum_bits", "ex2_error")),
        *((name, c_int) for name in ("flush_sums", "registers")),
        ("garbage", c_uint),
    ]


class _Program(ctypes.Structure):
    _fields_ = [
        *(("code", c_void_p), ("count", c_int), ("pool", c_void_p), ("kinds", c_void_p)),
        *(("constants", c_void_p), ("constant_slots", c_void_p)),
        *((name, c_int) for name in ("num_constants", "slots", "threads", "cluster")),
        *(("shared_bytes", c_int), ("param_bytes", c_int)),
        *(("params", c_void_p), ("executed", c_void_p)),
    ]


class Tensor_(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("data", c_void_p), ("bytes", c_longlong), ("output", c_int)]


def compiler() -> str | None:
    return next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)


def _made(target: Path, command: list[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as private:
        made = Path(private, target.name)
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        made.replace(target)


@cache
def machine() -> ctypes.CDLL:
    """The machine, compiled once for each version of its sources."""
    tool = compiler()
    assert tool is not None
    sources = sorted(HERE.glob("*.cpp"))
    version = subprocess.run(
        [tool, *FLAGS, "-Q", "--help=target", "--version"], capture_output=True, text=True
    ).stdout
    headers = b"".join(file.read_bytes() for file in sorted(HERE.glob("*.h")))
    common = hashlib.sha256(repr((FLAGS, version)).encode() + headers)
    objects = []
    for source in sources:
        digest = common.copy()
        digest.update(source.read_bytes())
        objects.append(BUILT / f"{source.stem}-{digest.hexdigest()[:16]}.o")
        # Sums of exact products in double: fusing them changes nothing.
        fused = "on" if source.stem == "wgmma" else "off"
        if not objects[-1].exists():
            _made(objects[-1], [tool, *FLAGS, f"-ffp-contract={fused}", "-c", str(source)])
    name = hashlib.sha256(repr([o.name for o in objects]).encode()).hexdigest()[:16]
    library = BUILT / f"machine-{name}.so"
    if not library.exists():
        _made(library, [tool, "-shared", *map(str, objects)])
    return ctypes.CDLL(str(library))


@cache
def table() -> translate.Table:
    """What the machine knows: name -> (number, operands)."""
    known: translate.Table = {}
    name, operands, number = c_char_p(), c_char_p(), 0
    while machine().ptx_op(number, ctypes.byref(name), ctypes.byref(operands)):
        assert name.value is not None and operands.value is not None
        known.setdefault(name.value.decode(), []).append((number, operands.value.decode().split()))
        number += 1
    return known


@cache
def _translator() -> bytes:
    files = (parse.__file__, flow.__file__, translate.__file__)
    texts = b"".join(Path(file).read_bytes() for file in files)
    return hashlib.sha256(texts + repr(sorted(table().items())).encode()).digest()


@dataclass
class Program:
    """A kernel that the machine can run, and how often it has run each instruction."""

    made: translate.Translated
    executed: Any = field(default=None)

    def __post_init__(self) -> None:
        self.executed = (ctypes.c_ulonglong * len(self.made.names))()

    def counts(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for name, times in zip(self.made.names, self.executed, strict=True):
            total[name] += times
        return total


def program(text: str) -> Program:
    """The program of this PTX; translations are kept.

    Raises:
        Refused: something in it is not known.
    """
    digest = hashlib.sha256(_translator() + text.encode()).hexdigest()[:24]
    kept = BUILT / f"{digest}.program"
    if kept.exists():
        return Program(pickle.loads(kept.read_bytes()))
    made = translate.translated(parse.parsed(text), table())
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
        file.write(pickle.dumps(made))
    Path(file.name).replace(kept)
    return Program(made)


def launch(
    kernel: Program,
    params: ctypes.Structure,
    grid: int,
    tensors: list[Any],
    *,
    shared_bytes: int = 0,
    threads: int = 0,
    fewer: bool = False,
    knobs: Knobs = Knobs(),
) -> None:
    """Runs a grid.

    Args:
        fewer: the kernel may be launched with fewer threads than it was compiled for (.maxntid).

    Raises:
        PtxError: what the machine found, and where.
    """
    made = kernel.made
    if ctypes.sizeof(params) != made.param_bytes:
        raise PtxError(f"{made.param_bytes} bytes of parameters, {ctypes.sizeof(params)} given")
    if threads > made.threads if fewer else threads not in (0, made.threads):
        raise PtxError(f"compiled for {made.threads} threads, launched with {threads}")

    def at(data: Any) -> int:
        return int(data.buffer_info()[0])

    kinds = (ctypes.c_ubyte * len(made.kinds)).from_buffer(made.kinds)
    what = _Program(
        *(at(made.code), len(made.names), at(made.pool), ctypes.addressof(kinds)),
        *(at(made.constants), at(made.constant_slots), len(made.constants), made.slots),
        *(threads or made.threads, made.cluster, shared_bytes, made.param_bytes),
        *(ctypes.addressof(params), ctypes.addressof(kernel.executed)),
    )
    values = _Knobs(*(getattr(knobs, name) for name, *_ in _Knobs._fields_))
    known = (Tensor_ * len(tensors))(*(Tensor_(t.name, t.data, t.bytes, t.output) for t in tensors))
    message = ctypes.create_string_buffer(1000)
    failed = machine().ptx_launch(
        *(ctypes.byref(what), ctypes.byref(values), known, len(known), grid, message, len(message))
    )
    if failed:
        raise PtxError(f"{made.kernel}: {message.value.decode()}")


def knobs_of(schedule: Any, knobs: Knobs = Knobs()) -> Knobs:
    """A schedule of cases.py, as these knobs."""
    return replace(
        knobs,
        landing=schedule.landing,
        order=schedule.seed % 3,
        seed=schedule.seed,
        check_order=int(schedule.check_order),
    )
