# SPDX-License-Identifier: Apache-2.0
"""tiles.py - csrc/cuda/sdpa_rows.def for Python: its lines as dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache
from types import CodeType
from typing import TypeVar

from wan_attn.cuda import sources

Made = TypeVar("Made")


class RowError(LookupError):
    """There is no such kernel, or none for this architecture."""


def symbol_of(name: str, dtype: str) -> str:
    """The name of the kernel: sdpa_sm80_bf16_d128 of sdpa_sm80_d128."""
    stem, head_dim = name.rsplit("_", 1)
    return f"{stem}_{dtype.lower()}_{head_dim}"


@dataclass(frozen=True)
class Row:
    """One ROW line: a row of the kernel table, with a kernel for each of its dtypes."""

    name: str
    dtypes: tuple[str, ...]  # BF16, F16
    head_dim: int
    is_lossy: bool
    takes_lists: bool

    def symbol(self, dtype: str) -> str:
        """As symbol_of."""
        return symbol_of(self.name, dtype)


class WarpTile:
    """What tiles have whose warps are all alike; its fields are a tile's columns."""

    symbol: str
    gpu_class: str
    block_m: int
    num_warps: int
    min_ctas: int

    one_arch = None

    @property
    def name(self) -> str:
        return f"{self.symbol}_{self.gpu_class.lower()}"

    @property
    def key(self) -> str:
        return self.symbol

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    @property
    def rows_per_warp(self) -> int:
        return self.block_m // self.num_warps

    @property
    def max_registers(self) -> int:
        """What a thread may use so that min_ctas blocks fit the 65,536 registers of an SM."""
        return min(255, 65536 // (self.min_ctas * self.num_threads) // 8 * 8)


@dataclass(frozen=True)
class Tile(WarpTile):
    """One TILE line for one of its row's dtypes; the fields from gpu_class on are its columns."""

    row: str
    symbol: str
    dtype: str
    head_dim: int
    gpu_class: str
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    q_in_regs: int
    min_ctas: int
    pv_sum_f16: int

    source = "cuda/sdpa_sm80.cuh"
    args = "wan_attn_cuda_args"

    @property
    def bf16_as_f16(self) -> bool:
        """Turing: operands of a bf16 row that are not integers are f16, with a scale each."""
        return self.gpu_class == "TURING" and self.dtype == "BF16"

    @property
    def smem_bytes(self) -> int:
        return _smem_bytes("SM80", self)

    def defines(self) -> dict[str, str]:
        """The macros that turn the body into this kernel."""
        return {
            "KERNEL_NAME": self.symbol,
            "IS_BF16": str(int(self.dtype == "BF16")),
            "HEAD_DIM": str(self.head_dim),
            "BLOCK_M": str(self.block_m),
            "BLOCK_N": str(self.block_n),
            "NUM_WARPS": str(self.num_warps),
            "STAGES": str(self.stages),
            "Q_IN_REGS": str(self.q_in_regs),
            "MIN_CTAS": str(self.min_ctas),
            "PV_SUM_F16": str(self.pv_sum_f16),
        }


@dataclass(frozen=True)
class TileQk8(Tile):
    """One TILE_QK8 line for one of its row's dtypes: the same body with 8-bit scores."""

    @property
    def v_is_scaled(self) -> bool:
        """V comes in f16, with a scale for each head."""
        return bool(self.pv_sum_f16) or self.bf16_as_f16

    @property
    def smem_bytes(self) -> int:
        return _smem_bytes("QK8", self)

    def defines(self) -> dict[str, str]:
        """The macros that turn the body into this kernel."""
        return {**super().defines(), "QK_INT8": "1"}


@dataclass(frozen=True)
class TileListed(Tile):
    """One TILE_LISTED line for one of its row's dtypes: the same body, for lists of blocks."""

    args = "wan_attn_cuda_listed_args"

    @property
    def smem_bytes(self) -> int:
        return super().smem_bytes + _smem_bytes("LOST", self)

    def defines(self) -> dict[str, str]:
        """The macros that turn the body into this kernel."""
        return {**super().defines(), "LISTED": "1"}


@dataclass(frozen=True)
class TileListedQk8(TileQk8, TileListed):
    """One TILE_LISTED_QK8 line for one of its row's dtypes: lists of blocks and 8-bit scores."""


@dataclass(frozen=True)
class TileSm90:
    """One TILE_SM90 line for one of its row's dtypes; the fields from use on are its columns. A row
    has several, for different calls."""

    row: str
    symbol: str
    dtype: str
    head_dim: int
    use: str
    from_q: int
    block_n: int
    consumers: int
    stages: int
    cluster: int
    regs_producer: int
    regs_consumer: int

    source = "cuda/sdpa_sm90.cuh"
    args = "wan_attn_cuda_sm90_args"

    @property
    def one_arch(self) -> int:
        """NVIDIA compiles wgmma for sm_90a alone: no other architecture has it, nor a later one."""
        return next(gpu.arch for gpu in _gpu_lines() if gpu.body == "SM90")

    @property
    def name(self) -> str:
        shape = f"{self.block_m}x{self.block_n}_s{self.stages}_c{self.cluster}"
        return f"{self.symbol}_{shape}"

    @property
    def key(self) -> str:
        columns = f"n{self.block_n}_w{self.consumers}_s{self.stages}_c{self.cluster}"
        return f"{self.symbol}_{columns}"

    @property
    def block_m(self) -> int:
        return 64 * self.consumers

    @property
    def num_threads(self) -> int:
        return 128 * (1 + self.consumers)

    @property
    def smem_bytes(self) -> int:
        return _smem_bytes("SM90", self)

    def defines(self) -> dict[str, str]:
        """The macros that turn the body into this kernel."""
        return {
            "KERNEL_NAME": self.symbol,
            "IS_BF16": str(int(self.dtype == "BF16")),
            "HEAD_DIM": str(self.head_dim),
            "BLOCK_N": str(self.block_n),
            "CONSUMERS": str(self.consumers),
            "STAGES": str(self.stages),
            "CLUSTER": str(self.cluster),
            "REGS_PRODUCER": str(self.regs_producer),
            "REGS_CONSUMER": str(self.regs_consumer),
        }


@dataclass(frozen=True)
class _Pass:
    """A kernel that is the same on every card, and whose name is its own."""

    name: str
    body: str
    num_threads: int

    one_arch = None

    @property
    def symbol(self) -> str:
        return self.name

    @property
    def key(self) -> str:
        return self.name

    @property
    def source(self) -> str:
        return f"cuda/{self.body}.cuh"


@dataclass(frozen=True)
class Helper(_Pass):
    """One HELPER line: a pass before or after the attention."""

    pack_step: int

    @property
    def args(self) -> str:
        return f"wan_attn_cuda_{self.body}_args"

    def defines(self) -> dict[str, str]:
        return {
            "KERNEL_NAME": self.name,
            "NUM_THREADS": str(self.num_threads),
            "PACK_STEP": str(self.pack_step),
        }


@dataclass(frozen=True)
class RopeKernel(_Pass):
    """One ROPE_KERNEL line: a kernel of rms_norm_rope; its num_threads is the most a block has."""

    dtype: str  # of x: F32, F16, BF16, or ANY

    args = "wan_attn_cuda_rope_args"

    @property
    def smem_bytes(self) -> int:
        found = re.search(r"#define WAN_ATTN_CUDA_SMEM_ROPE (.+)", _text("args_rope.h"))
        if found is None:
            raise RowError("args_rope.h does not say what shared memory rms_norm_rope needs")
        return int(eval(found[1], {"__builtins__": {}}))

    def defines(self) -> dict[str, str]:
        defines = {"KERNEL_NAME": self.name, "NUM_THREADS": str(self.num_threads)}
        if self.dtype != "ANY":  # as wan_attn_dtype has them
            defines["X_DTYPE"] = str(("F32", "F16", "BF16").index(self.dtype))
        return defines


def _text(name: str) -> str:
    """A file of csrc/cuda without its comments."""
    text = (sources.root() / "cuda" / name).read_text(encoding="utf-8")
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def _lines(macro: str) -> list[list[str]]:
    return [
        re.split(r"\s*,\s*", found.strip())
        for found in re.findall(rf"^{macro}\((.*)\)", _text("sdpa_rows.def"), re.M)
    ]


@cache
def _smem_formula(body: str) -> tuple[list[str], CodeType]:
    """WAN_ATTN_CUDA_SMEM_<body> of args.h: its arguments, and its text, which is Python as well."""
    text = _text("args.h").replace("\\\n", " ")
    found = re.search(rf"#define WAN_ATTN_CUDA_SMEM_{body}\((.*?)\)\s+(.+)", text)
    if found is None:
        raise RowError(f"args.h does not say what shared memory a tile of {body} needs")
    return found[1].split(", "), compile(found[2].strip(), "args.h", "eval")


@cache
def _smem_bytes(body: str, tile: object) -> int:
    names, formula = _smem_formula(body)
    return int(eval(formula, {"__builtins__": {}}, {name: getattr(tile, name) for name in names}))


def _made(made: type[Made], first: tuple[object, ...], columns: list[str]) -> Made:
    """The dataclass `made` of these fields, then the columns of a line."""
    kinds = [field.type for field in fields(made)][len(first) :]  # type: ignore[arg-type]
    rest = (int(x) if kind == "int" else x for kind, x in zip(kinds, columns, strict=True))
    return made(*first, *rest)


@cache
def table_rows() -> dict[str, Row]:
    """The rows of the kernel table for CUDA, best first."""
    text = _text("sdpa_rows.def")
    families = {
        name: (lossy == "1", lists == "1")
        for name, lossy, lists in re.findall(
            r"^#define (\w+) +\d+, \w+, ([01]), ([01]), \"", text, re.M
        )
    }
    return {
        name: Row(name, tuple(re.findall(r"DT\((\w+)\)", dtypes)), int(head_dim), *families[family])
        for name, family, dtypes, head_dim in _lines("ROW")
    }


def _read_tiles(macro: str, made: type[Made]) -> tuple[Made, ...]:
    """A tile for each dtype of its row: first all lines for one of them, then for the other."""
    found = []
    for dtype in dict.fromkeys(dtype for row in table_rows().values() for dtype in row.dtypes):
        for line in _lines(macro):
            row = table_rows()[line[0]]
            if dtype in row.dtypes:
                first = (row.name, row.symbol(dtype), dtype, row.head_dim)
                found.append(_made(made, first, line[1:]))
    return tuple(found)


@cache
def tiles() -> tuple[Tile, ...]:
    return _read_tiles("TILE", Tile)


@cache
def tiles_qk8() -> tuple[TileQk8, ...]:
    return _read_tiles("TILE_QK8", TileQk8)


@cache
def tiles_listed() -> tuple[TileListed, ...]:
    return _read_tiles("TILE_LISTED", TileListed)


@cache
def tiles_listed_qk8() -> tuple[TileListedQk8, ...]:
    return _read_tiles("TILE_LISTED_QK8", TileListedQk8)


@cache
def tiles_sm90() -> tuple[TileSm90, ...]:
    """In the order in which a call looks for its own."""
    return _read_tiles("TILE_SM90", TileSm90)


@cache
def helpers() -> dict[str, Helper]:
    return {line[0]: _made(Helper, (), line) for line in _lines("HELPER")}


@cache
def rope_kernels() -> dict[str, RopeKernel]:
    return {line[0]: _made(RopeKernel, (), line) for line in _lines("ROPE_KERNEL")}


@dataclass(frozen=True)
class Gpu:
    """One GPU line."""

    arch: int
    gpu_class: str
    body: str


@cache
def _gpu_lines() -> tuple[Gpu, ...]:
    return tuple(_made(Gpu, (), line) for line in _lines("GPU"))


@cache
def gpus() -> dict[int, str]:
    """Compute capability * 10 -> class."""
    return {gpu.arch: gpu.gpu_class for gpu in _gpu_lines()}


@cache
def tegra() -> frozenset[int]:
    """Chips with a GPU inside: machine code for cards does not run there, nor theirs on cards."""
    return frozenset(int(arch) for (arch,) in _lines("TEGRA"))


@cache
def half_rate() -> tuple[tuple[int, str], ...]:
    """(compute capability * 10, words in the card's name) of cards that pv16 rows are for."""
    return tuple((int(arch), words.strip('"')) for arch, words in _lines("HALF_RATE"))
