# SPDX-License-Identifier: Apache-2.0
"""backward_model.py - what machine code allows the gradient of attention on a GPU: an estimate.

    python -m benchmarks.backward_model

Prints the table of csrc/cuda/README.md: for each GPU and head_dim, how long the two kernels need
for one pair of a query row and a key, as static_model.py bounds them, beside the five products of
FlashAttention-2 at the full rate of the tensor cores. Of the seven products here two are S and dP
again, so that at most 5/7 of that is to be had; what the atomics of FlashAttention-2 cost is not
known to the model. Ends with 1 if a kernel is further from the tensor cores' rate than LEAST_TENSOR
says. Nothing was measured on a GPU.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import static_model
from benchmarks.static_model import GPUS, UNITS, Estimate, Gpu
from emu.rows import TileBackward, tiles_backward_for

HEAD_DIMS = (64, 128)
PRODUCTS = {1: 4, 0: 3}  # of dk and dv, of dq: 16-bit products of a row and a key
FLASH_ATTENTION_2 = 5
ATOMIC_KEYS = 128  # whose sums FlashAttention-2 adds to dq at a time
LEAST_TENSOR = 0.5


@dataclass(frozen=True)
class Kernel:
    tile: TileBackward
    estimate: Estimate

    def clocks(self, unit: str) -> float:
        """Of one SM, for one query row and one key."""
        return self.estimate.clocks[unit] / (self.tile.block_m * self.tile.block_n)

    @property
    def slowest(self) -> float:
        return max(map(self.clocks, UNITS))

    @property
    def unhidden(self) -> float:
        """As slowest, if nothing else is issued while tensor cores work."""
        return self.slowest / self.estimate.unhidden


def kernels(gpu: Gpu, head_dim: int) -> list[Kernel]:
    """Of bf16, or of f16 on Turing: dk and dv, then dq."""
    dtype = "F16" if gpu.arch < 80 else "BF16"
    found = []
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        for tile in tiles_backward_for(gpu.arch):
            if (tile.dtype, tile.head_dim) == (dtype, head_dim):
                static_model.compiled(tile, gpu.arch, cubin)
                found.append(Kernel(tile, static_model.estimate(gpu, tile, cubin)))
    return sorted(found, key=lambda kernel: -kernel.tile.of_keys)


def line(gpu: Gpu, head_dim: int, both: list[Kernel]) -> str:
    seconds = sum(kernel.slowest for kernel in both) / (gpu.sms * gpu.ghz * 1e9)
    tflops = FLASH_ATTENTION_2 * 2 * head_dim / seconds / 1e12
    cells = [gpu.name, str(head_dim), f"{tflops:.0f}", f"{tflops / gpu.peak():.0%}"]
    for kernel in both:
        tensor = kernel.clocks("tensor")
        shares = [f"{kernel.clocks(n) / tensor:.0%}" for n in ("issue", "shared", "exp2")]
        cells.append(f"{kernel.estimate.registers}: {', '.join(shares)}")
    unhidden = sum(kernel.slowest for kernel in both) / sum(kernel.unhidden for kernel in both)
    cells.append(f"{unhidden:.0%}")
    return f"| {' | '.join(cells)} |".replace("%", " %")


def atomic_bytes(tokens: int, heads: int, head_dim: int) -> int:
    """That FlashAttention-2 adds to dq in L2, in float32."""
    return -(-tokens // ATOMIC_KEYS) * tokens * heads * head_dim * 4


def main() -> int:
    why = static_model.what_is_missing()
    if why:
        print(why)
        return 1
    rows = [
        "| GPU | head_dim | bound, TFLOP/s | of five products at the tensor cores' rate |"
        " dk, dv: registers: issue, shared memory, exp2 | dq: the same |"
        " of the bound, if nothing is hidden |",
        "|---|---|---|---|---|---|---|",
    ]
    slow = []
    for gpu in GPUS:
        for head_dim in HEAD_DIMS:
            both = kernels(gpu, head_dim)
            rows.append(line(gpu, head_dim, both))
            for kernel in both:
                share = kernel.clocks("tensor") / kernel.slowest
                if share < LEAST_TENSOR:
                    slow.append(
                        f"{gpu.name}: {kernel.tile.name} keeps tensor cores {share:.0%} busy"
                    )
    print("\n".join(rows))
    moved = atomic_bytes(27280, 24, 128) / 1e9
    print(f"\nFlashAttention-2 adds {moved:.0f} GB to dq, in 27,280 tokens of 24 heads of 128.")
    print("\n".join(slow))
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
