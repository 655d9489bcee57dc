# SPDX-License-Identifier: Apache-2.0
"""rows.py - csrc/cuda/sdpa_rows.def for Python: the tiles, and what each compiler needs of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TypeVar

Made = TypeVar("Made")
CSRC = Path(__file__).resolve().parents[2] / "csrc"
LIST = CSRC / "cuda" / "sdpa_rows.def"


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

    @property
    def name(self) -> str:
        return f"{self.row}_{self.gpu_class.lower()}"

    @property
    def source(self) -> str:
        return f"cuda/sdpa_{self.body}.cuh"

    @property
    def args(self) -> str:
        return "wan_attn_cuda_args"

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

    @property
    def bf16_as_f16(self) -> bool:
        """Turing: k and v of a bf16 row are f16, with a scale each."""
        return self.gpu_class == "TURING" and self.dtype == "BF16"

    @property
    def emulated_arch(self) -> int:
        """Whose instructions the emulator offers; all from sm_80 on are alike to these kernels."""
        return 75 if self.gpu_class == "TURING" else 80


@dataclass(frozen=True)
class Helper:
    """One HELPER line: a pass before or after the attention."""

    name: str
    body: str
    num_threads: int
    pack_step: int

    emulated_arch = 80

    @property
    def row(self) -> str:
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


def _lines(macro: str) -> list[list[str]]:
    text = re.sub(r"/\*.*?\*/", "", LIST.read_text(encoding="utf-8"), flags=re.DOTALL)
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
def helpers() -> dict[str, Helper]:
    return {helper.name: helper for helper in _read("HELPER", Helper)}


@cache
def gpus() -> dict[int, str]:
    """Compute capability * 10 -> class."""
    return {int(arch): gpu_class for arch, gpu_class in _lines("GPU")}


@cache
def half_rate() -> tuple[tuple[int, str], ...]:
    """(compute capability * 10, words in the card's name) of cards that pv16 rows are for."""
    return tuple((int(arch), words.strip('"')) for arch, words in _lines("HALF_RATE"))


def tiles_for(arch: int) -> tuple[Tile, ...]:
    return tuple(tile for tile in tiles() if tile.gpu_class == gpus()[arch])
