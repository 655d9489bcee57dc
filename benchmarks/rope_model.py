# SPDX-License-Identifier: Apache-2.0
"""rope_model.py - what limits the CUDA kernel of rms_norm_rope on each card, from its machine code.

    python -m benchmarks.rope_model

The call's options are put into the kernel's text as constants: what the compiler leaves is what the
call executes, once a warp but for the loop over the block's warps. Against it stands the time that
memory needs to read x and write out once; table and weight are read from the caches. This is an
estimate: nothing here was measured on a GPU.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import static_model  # isort: skip - puts the folder of the next ones on the path

from emu import compile as compilers
from emu import sass
from emu.rows import Job, rope_kernels

NUMBER, SIZE = {"f32": 0, "f16": 1, "bf16": 2}, {"f32": 4, "f16": 2, "bf16": 2}
VECTORS, WIDTH, ISSUED = 4, 8, 4  # ISSUED: instructions a clock, an SM


@dataclass(frozen=True)
class Gpu:
    """A card with its memory; float32 and float64 are lanes a clock of an SM."""

    card: static_model.Gpu
    gb_s: float
    float32: int
    float64: int

    @property
    def bytes_a_clock(self) -> float:
        """Of memory, for one SM."""
        return self.gb_s / self.card.sms / self.card.ghz


# Memory: NVIDIA's data sheets (A100: 80 GB); lanes: CUDA C++ Programming Guide, "Arithmetic
# Instructions".
_MORE = {
    "RTX 2080 Ti": (616, 64, 2),
    "A100": (2039, 64, 32),
    "RTX 3090": (936, 128, 2),
    "RTX 4090": (1008, 128, 2),
    "H200": (4800, 128, 64),
    "RTX 5090": (1792, 128, 2),
}
GPUS = tuple(Gpu(card, *_MORE[card.name]) for card in static_model.GPUS)


@dataclass(frozen=True)
class Call:
    """x, out and weight by dtype; Wan2.2's own: norm over all heads, rounded, and a grid."""

    x: str
    out: str
    weight: str
    heads: int = 24
    head_dim: int = 128

    @property
    def warps(self) -> int:
        return -(-(self.head_dim // WIDTH) * -(-self.heads // VECTORS) // 32)

    @property
    def elements(self) -> int:
        return self.heads * self.head_dim

    @property
    def bytes(self) -> int:
        """Of memory, for one token."""
        return self.elements * (SIZE[self.x] + SIZE[self.out])


# TI2V-5B's and A14B's tokens: in bfloat16 with a float32 or a bfloat16 weight, and in float32.
CALLS = tuple(
    Call(*dtypes, heads=heads)
    for heads in (24, 40)
    for dtypes in (
        ("bf16", "bf16", "f32"), ("bf16", "bf16", "bf16"), ("bf16", "f32", "f32"),
        ("f32", "bf16", "f32"), ("f32", "f32", "f32"),
    )
)  # fmt: skip


def _constants(call: Call) -> dict[str, str]:
    rounds = call.x != "f32"
    return {
        r"args\.has_norm|args\.has_grid|args\.table_is_f64|!args\.grid_sizes": "1",
        r"if \(args\.weight\)|if \(token\.is_rotated\)": "if (1)",
        r"!token\.is_rotated \|\|": "0 ||",
        r"args\.is_per_head|args\.table\.head_stride != 0": "0",
        r"args\.out_dtype": str(NUMBER[call.out]),
        r"args\.weight_dtype": str(NUMBER[call.weight]),
        r"args\.rounds_n": str(int(rounds)),
        r"args\.rounds_y": str(int(rounds and call.weight == call.x)),
        r"thread < \(u32\)args\.num_threads": f"thread < {32 * call.warps}",
    }


def specialised(call: Call, arch: int, output: Path) -> sass.Kernel:
    """The kernel's machine code with this call's options as constants."""
    job = Job(rope_kernels()[f"rms_norm_rope_{call.x}_sm75"], arch)
    texts = {name: text.decode() for name, text in job.texts().items()}
    for name in ("cuda/rope.cuh", "cuda/tile/rope_token.cuh"):
        for pattern, constant in _constants(call).items():
            texts[name] = re.sub(pattern, constant, texts[name])
        # One loop has as many turns as there are warps: written out.
        texts[name] = texts[name].replace(
            "#pragma unroll 1\n    for (u32 thread = 0", "#pragma unroll\n    for (u32 thread = 0"
        )
    compiler = compilers.nvrtcs()[min(compilers.nvrtcs())]
    code = {name: text.encode() for name, text in texts.items()}
    output.write_bytes(compiler.compile(arch, code, job.options()))
    return sass.read(output)


@dataclass(frozen=True)
class Estimate:
    """Clocks of an SM for one token, by unit."""

    gpu: str
    call: Call
    instructions: float  # an element
    clocks: dict[str, float]

    @property
    def limit(self) -> str:
        return max(self.clocks, key=lambda unit: self.clocks[unit])

    def microseconds(self, tokens: int, gpu: Gpu) -> float:
        return tokens * max(self.clocks.values()) / gpu.card.sms / gpu.card.ghz / 1e3


def estimate(gpu: Gpu, call: Call, kernel: sass.Kernel) -> Estimate:
    executed = sum(sass.histogram(kernel.instructions).values())
    floats = sass.count(kernel.instructions, "FADD", "FMUL", "FFMA", "FSETP", "FSEL")
    doubles = sass.count(kernel.instructions, "DADD", "DFMA", "F2F.F32.F64", "F2F.F64.F32")
    bytes_loaded = 512 * sass.count(
        kernel.instructions, "LDG.E.128", "STG.E.128", "LDG.E.128.CONSTANT", "LDS.128"
    )
    staging = min(call.warps, -(-call.head_dim // 2 // 32))  # warps that read the table
    return Estimate(
        gpu.card.name,
        call,
        executed * 32 * call.warps / call.elements,
        {
            "memory": call.bytes / gpu.bytes_a_clock,
            "issue": executed * call.warps / ISSUED,
            "float32": floats * call.warps * 32 / gpu.float32,
            "float64": doubles * staging * 32 / gpu.float64,
            "caches": bytes_loaded * call.warps / 128,
        },
    )


def estimates(calls: tuple[Call, ...] = CALLS) -> Iterator[tuple[Gpu, Estimate]]:
    with tempfile.TemporaryDirectory() as folder:
        for call in calls:
            for gpu in GPUS:
                kernel = specialised(call, gpu.card.arch, Path(folder) / "kernel.cubin")
                yield gpu, estimate(gpu, call, kernel)


def main() -> int:
    if sass.nvdisasm() is None or not compilers.nvrtcs():
        print("needs nvdisasm (nvidia-cuda-nvdisasm) and NVRTC (nvidia-cuda-nvrtc)")
        return 1
    print("An estimate from machine code; nothing was measured. Shares of the time that memory")
    print("needs; us: of 27,280 tokens (24 heads) or 75,600 (40), if nothing waits.\n")
    print("| GPU | heads | x | weight | out | instructions/element | issue | float32 | float64 "
          "| caches | us |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for gpu, e in estimates():
        shares = " | ".join(f"{e.clocks[u] / e.clocks['memory']:.0%}" for u in list(e.clocks)[1:])
        time = e.microseconds(27_280 if e.call.heads == 24 else 75_600, gpu)
        c = e.call
        print(f"| {e.gpu} | {c.heads} | {c.x} | {c.weight} | {c.out} | {e.instructions:.1f} "
              f"| {shares} | {time:.0f} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
