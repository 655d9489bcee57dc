# SPDX-License-Identifier: Apache-2.0
"""tiles_backward.py - the BACKWARD_ROW and TILE_BACKWARD lines of csrc/cuda/sdpa_rows.def."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from wan_attn.cuda.tiles import Row, WarpTile, _lines, _made, _smem_bytes, symbol_of


@dataclass(frozen=True)
class TileBackward(WarpTile):
    """One TILE_BACKWARD line for one of its row's dtypes; the fields from gpu_class on are its
    columns."""

    row: str
    symbol: str  # sdpa_backward_sm80_dq_bf16_d64
    dtype: str
    head_dim: int
    gpu_class: str
    of_keys: int
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    min_ctas: int

    source = "cuda/sdpa_backward.cuh"
    args = "wan_attn_cuda_backward_args"

    @property
    def smem_bytes(self) -> int:
        return _smem_bytes("BACKWARD", self)

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
        _made(TileBackward, (row.name, symbol_of(kernel, dtype), dtype, row.head_dim), columns)
        for row in backward_rows().values()
        for dtype in row.dtypes
        for name, kernel, *columns in _lines("TILE_BACKWARD")
        if name == row.name
    )
