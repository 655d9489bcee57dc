# SPDX-License-Identifier: Apache-2.0
"""static_model.py - how fast a CUDA kernel could be, from its machine code alone: an estimate.

    python -m benchmarks.static_model [--row NAME] [--json FILE]

Counts what one block does for one clean tile of keys, divides by what an SM does in a clock, and
takes the slowest unit as the bound, as if everything overlapped perfectly. That is a ceiling, not
a prediction: it knows no latencies, no L2, no power limit. It says which unit limits a kernel, how
much room the others have, and what a change can gain at most. Nothing here was measured on a GPU.

Tensor rates are NVIDIA's published dense peaks divided by SMs and boost clock. On Hopper, mma.sync
is taken to reach 62 % of what wgmma does (as Luo et al. found on an H100, arXiv 2402.13499).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

from emu import compile as compilers
from emu import sass
from emu.rows import (
    Tile,
    TileBackward,
    TileQk8,
    tiles_for,
    tiles_listed_for,
    tiles_listed_qk8_for,
    tiles_qk8_for,
)

HMMA_FLOP = 2 * 16 * 8 * 16  # m16n8k16; Turing's m16n8k8 does half of it
IMMA_OPS = 2 * 16 * 8 * 32  # m16n8k32; Turing's m8n8k16 does a quarter of it
SHARED_BYTES = 128  # a clock, an SM
MUFU_LANES, SCHEDULERS = 16, 4
UNITS = ("tensor", "shared", "exp2", "issue")


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: int
    sms: int
    ghz: float
    flop_f32_sum: int  # a clock, an SM: 16-bit products summed in f32
    flop_f16_sum: int  # summed in f16
    ops_int8: int  # 8-bit products

    def peak(self) -> float:
        """TFLOP/s of 16-bit products summed in f32."""
        return self.flop_f32_sum * self.sms * self.ghz / 1e3


GPUS = (
    Gpu("RTX 2080 Ti", 75, 68, 1.545, 512, 1024, 2048),
    Gpu("A100", 80, 108, 1.41, 2048, 2048, 4096),
    Gpu("RTX 3090", 86, 82, 1.695, 512, 1024, 2048),
    Gpu("RTX 4090", 89, 128, 2.52, 512, 1024, 2048),
    Gpu("H200", 90, 132, 1.83, 2540, 2540, 5080),
    Gpu("RTX 5090", 120, 170, 2.407, 512, 1024, 2048),
)


@dataclass(frozen=True)
class Estimate:
    gpu: str
    row: str
    registers: int
    smem_bytes: int
    clocks: dict[str, float]  # that an SM needs for one block's tile, by unit
    others_per_product: float
    bound_tflops: float
    of_peak: float
    """Of what 16-bit products summed in f32 allow: what FlashAttention-2 can reach."""
    unhidden: float
    """Share of the bound that is left if nothing else is issued while tensor cores work."""
    shared_for: dict[str, float]
    """What the clocks of shared memory are for."""

    @property
    def limit(self) -> str:
        return max(UNITS, key=lambda unit: self.clocks[unit])


def estimate(gpu: Gpu, tile: Tile | TileBackward, cubin: Path) -> Estimate:
    loop = sass.read(cubin).main_loop()
    warps = tile.num_warps
    hmma_flop = HMMA_FLOP // (2 if sass.count(loop, "HMMA.1688") else 1)
    in_f16 = sass.count(loop, "HMMA.16816.F16")
    in_f32 = sass.count(loop, "HMMA") - in_f16
    in_int8 = sass.count(loop, "IMMA")
    imma_ops = IMMA_OPS // (4 if sass.count(loop, "IMMA.8816") else 1)
    shared = {  # 512 bytes each
        "K": sass.count(loop, "LDSM.16.M88"),
        "V": sass.count(loop, "LDSM.16.MT88"),
        "steps": tile.block_n // 16 if isinstance(tile, TileQk8) else 0,
        "copies": sass.count(loop, "LDGSTS", "STS.128"),
    }
    shared["Q"] = sass.count(loop, "LDS.128", "LDS.U.128") - shared["steps"]
    executed = sum(sass.histogram(loop).values())
    shared_for = {name: warps * 512 * n / SHARED_BYTES for name, n in shared.items()}
    clocks = {
        "tensor": warps * hmma_flop * (in_f16 / gpu.flop_f16_sum + in_f32 / gpu.flop_f32_sum)
        + warps * imma_ops * in_int8 / gpu.ops_int8,
        "shared": sum(shared_for.values()),
        "exp2": warps * 32 * sass.count(loop, "MUFU") / MUFU_LANES,
        "issue": warps * executed / SCHEDULERS,
    }
    products = in_f16 + in_f32 + in_int8
    work = warps * (hmma_flop * (in_f16 + in_f32) + imma_ops * in_int8)
    bound = work / max(clocks.values()) * gpu.sms * gpu.ghz / 1e3
    tensor, issue = clocks["tensor"], warps * (executed - products) / SCHEDULERS
    return Estimate(
        *(gpu.name, tile.symbol, sass.registers(cubin), tile.smem_bytes, clocks),
        *((executed - products) / products, bound, bound / gpu.peak()),
        max(clocks.values()) / max(tensor + issue, clocks["shared"]),
        shared_for,
    )


def compiled(tile: Tile | TileBackward, arch: int, output: Path) -> None:
    """With nvcc if it is there, else with the newest NVRTC."""
    if compilers.nvcc():
        compilers.with_nvcc(tile, arch, output)
    else:
        newest = max(compilers.nvrtcs())
        compilers.with_nvrtc(compilers.nvrtcs()[newest], tile, arch, output)


def estimates(row: str | None = None) -> Iterator[Estimate]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        for gpu in GPUS:
            exact = (*tiles_for(gpu.arch), *tiles_listed_for(gpu.arch))
            for tile in (*exact, *tiles_qk8_for(gpu.arch), *tiles_listed_qk8_for(gpu.arch)):
                if row in (None, tile.symbol):
                    compiled(tile, gpu.arch, cubin)
                    yield estimate(gpu, tile, cubin)


def what_is_missing() -> str:
    """Of the tools, in words; "": nothing."""
    if sass.nvdisasm() and (compilers.nvcc() or compilers.nvrtcs()):
        return ""
    return "needs nvdisasm (nvidia-cuda-nvdisasm) and nvcc or NVRTC (nvidia-cuda-nvrtc)"


def table(rows: list[Estimate]) -> str:
    lines = [
        "| GPU | kernel | regs | smem | tensor | shared | exp2 | issue | others/product | limit "
        "| bound, TFLOP/s | of f32-sum peak | unhidden |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        shares = " | ".join(f"{r.clocks[unit] / r.clocks['tensor']:.0%}" for unit in UNITS[1:])
        lines.append(
            f"| {r.gpu} | {r.row} | {r.registers} | {r.smem_bytes} | {r.clocks['tensor']:.0f} "
            f"| {shares} | {r.others_per_product:.2f} | {r.limit} | {r.bound_tflops:.0f} "
            f"| {r.of_peak:.0%} | {r.unhidden:.0%} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="estimates a bound for each kernel on each GPU")
    parser.add_argument("--row", help="only this row of csrc/cuda/sdpa_rows.def")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args()
    why = what_is_missing()
    if why:
        print(why)
        return 1
    rows = list(estimates(options.row))
    print("An estimate from machine code; nothing was measured. tensor: clocks of an SM for one")
    print("block's tile of keys; shared, exp2, issue: what those units need, as a share of that;")
    print("unhidden: of the bound, if nothing else were issued while tensor cores work.\n")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
