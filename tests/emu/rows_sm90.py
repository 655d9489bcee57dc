# SPDX-License-Identifier: Apache-2.0
"""rows_sm90.py - the TILE_SM90 lines of csrc/cuda/sdpa_rows.def for Python."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from emu.rows import _read

ARCH = "90a"


@dataclass(frozen=True)
class TileSm90:
    """One TILE_SM90 line; the fields are its columns."""

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
    emulated_arch = 90

    @property
    def name(self) -> str:
        shape = f"{self.block_m}x{self.block_n}_s{self.stages}_c{self.cluster}"
        return f"{self.row}_{shape}"

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


@cache
def tiles_sm90() -> tuple[TileSm90, ...]:
    return _read("TILE_SM90", TileSm90)


def tile_for(row: str, *, is_masked: bool, seqlen_q: int) -> TileSm90:
    """The line of the row that a call gets: the loader's rule."""
    uses = ("MASKED", "ANY") if is_masked else ("ANY",)
    fits = (t for t in tiles_sm90() if t.row == row and t.use in uses and seqlen_q >= t.from_q)
    return next(fits)
