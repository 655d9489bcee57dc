# SPDX-License-Identifier: Apache-2.0
"""tiles_backward.py - the BACKWARD_ROW and TILE_BACKWARD lines of csrc/cuda/sdpa_rows.def."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from wan_attn.cuda.tiles import Row, _lines, _made, _smem_formula


@dataclass(frozen=True)
class TileBackward:
    """One TILE_BACKWARD line for one of its row's dtypes; the fields from kernel on are its
    columns."""

    row: str
    dtype: str
    head_dim: int
    kernel: str
    gpu_class: str
    of_keys: int
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    min_ctas: int

    source = "cuda/sdpa_backward.cuh"
    args = "wan_attn_cuda_backward_args"
    one_arch = None

    @property
    def symbol(self) -> str:
        """The name of the kernel: sdpa_backward_sm80_dq_bf16_d64 of sdpa_backward_sm80_dq_d64."""
        stem, head_dim = self.kernel.rsplit("_", 1)
        return f"{stem}_{self.dtype.lower()}_{head_dim}"

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
    def smem_bytes(self) -> int:
        names, formula = _smem_formula("BACKWARD")
        known = {name: getattr(self, name) for name in names}
        return int(eval(formula, {"__builtins__": {}}, known))

    @property
    def max_registers(self) -> int:
        """What a thread may use so that min_ctas blocks fit the 65,536 registers of an SM."""
        return min(255, 65536 // (self.min_ctas * self.num_threads) // 8 * 8)

    def defines(self) -> dict[str, str]:
        """The macros that turn the body into this kernel."""
        return {
            "KERNEL_NAME": self.symbol,
            "IS_BF16": str(int(self.dtype == "BF16")),
            "HEAD_DIM": str(self.head_dim),
            "OF_KEYS": str(self.of_keys),
            "BLOCK_M": str(self.block_m),
            "BLOCK_N": str(self.block_n),
            "NUM_WARPS": str(self.num_warps),
            "STAGES": str(self.stages),
            "MIN_CTAS": str(self.min_ctas),
        }


@cache
def backward_rows() -> dict[str, Row]:
    """The rows of the table of backward kernels for CUDA, best first."""
    return {
        name: Row(name, tuple(re.findall(r"DT\((\w+)\)", dtypes)), int(head_dim), False, False)
        for name, _, dtypes, head_dim in _lines("BACKWARD_ROW")
    }


@cache
def tiles_backward() -> tuple[TileBackward, ...]:
    """A tile for each dtype of its row."""
    return tuple(
        _made(TileBackward, (row.name, dtype, row.head_dim), line[1:])
        for row in backward_rows().values()
        for dtype in row.dtypes
        for line in _lines("TILE_BACKWARD")
        if line[0] == row.name
    )
