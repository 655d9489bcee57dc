# SPDX-License-Identifier: Apache-2.0
"""bench_cpu.py - the CPU rows against torch's own attention, and against the machine's peak.

    OMP_WAIT_POLICY=passive python benchmarks/bench_cpu.py [--out FOLDER] [--name cpu]
                            [--runs 7] [--threads 1 2]
                            [--rows NAME ...] [--dtypes f32 bf16 f16] [--shapes s1 s2 ...] [--quick]

One run of torch and one of ours follow each other, so that a busy machine disturbs both alike; a
ratio is that of one such pair, the figure its median, the spread its quartiles. Times are the
process's CPU time (GFLOP/s per core) and wall time. Every run makes its output anew, as a model
does. The peak is what benchmarks/cpu_peak.c reaches in registers, compiled here with cc. A figure
for publication wants an idle machine: no other process on any core, and --runs 15.

Shapes are batch x queries x keys x heads x head_dim. s4 has real lengths of 512 and 77 keys; torch
gets the same as a boolean mask, which is how a model gives it. FLOP count real keys alone. decode,
frames (attention over time) and rows12 have few queries, which sdpa_few.inc computes.

At the end torch and we take turns, call by call: what that costs beyond each side's own time.

Writes NAME.csv and, with matplotlib (pip install matplotlib), NAME.png into FOLDER.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# A waiting OpenMP thread that spins would burn the CPU time it is judged by.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F

from wan_attn.doctor.facts import cpu_name
from wan_attn.native import op

HERE = Path(__file__).resolve().parent
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Batch, queries, keys, heads, head_dim, real keys of each sample.
Shape = tuple[int, int, int, int, int, tuple[int, ...] | None]
SHAPES: dict[str, Shape] = {
    "s1": (1, 4096, 4096, 4, 128, None),
    "s2": (1, 16384, 16384, 1, 128, None),
    "s3": (1, 8192, 512, 8, 128, None),
    "s4": (2, 8192, 512, 4, 128, (512, 77)),
    "d64": (1, 4096, 4096, 4, 64, None),
    "d80": (1, 4096, 4096, 4, 80, None),
    "decode": (1, 1, 4096, 32, 128, None),
    "frames": (512, 5, 5, 8, 128, None),
    "rows12": (1, 12, 512, 24, 128, None),
}
QUICK: dict[str, Shape] = {
    "s1": (1, 1024, 1024, 2, 128, None),
    "s4": (2, 1024, 512, 2, 128, (512, 77)),
}
# The peak that a row is measured against; of a row that is not here, the share is not known.
PEAKS = {
    "sdpa_amx": "tile_amx_bf16",
    "sdpa_avx512_bf16": "dot_avx512_bf16",
    "sdpa_avx512": "fma_avx512",
    "sdpa_avx2": "fma_avx2",
    "sdpa_neon": "fma_neon",
}
FIELDS = (
    "row dtype shape threads runs ours_gflops torch_gflops ours_wall_gflops torch_wall_gflops ratio"
    " ratio_q1 ratio_q3 wall_ratio wall_ratio_q1 wall_ratio_q3 peak_gflops fraction_of_peak"
).split()


def machine_peaks() -> dict[str, float]:
    """GFLOP/s of one core by kind of multiply-add; empty without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "cpu_peak"
        subprocess.run(
            [compiler, "-std=gnu11", "-O2", HERE / "cpu_peak.c", "-o", program], check=True
        )
        printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: float(value) for name, value in map(str.split, printed.splitlines())}


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """(process CPU time, wall time) of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def calls(
    row: op.KernelInfo, dtype: torch.dtype, shape: Shape
) -> tuple[Callable[[], object], Callable[[], object], float]:
    """(ours, torch's, FLOP) for one shape."""
    batch, seqlen_q, seqlen_k, heads, head_dim, real = shape
    query = torch.randn(batch, seqlen_q, heads, head_dim).to(dtype)
    key, value = (torch.randn(batch, seqlen_k, heads, head_dim).to(dtype) for _ in range(2))
    k_lens = None if real is None else torch.tensor(real)
    mask = None if k_lens is None else (torch.arange(seqlen_k) < k_lens[:, None])[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))

    def ours() -> object:
        return torch.ops.wan_attn.sdpa(query, key, value, None, k_lens, kernel=row.index)

    def torchs() -> object:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    keys = seqlen_k * batch if real is None else sum(real)
    return ours, torchs, 4.0 * seqlen_q * keys * heads * head_dim


def middle(values: list[float]) -> tuple[float, float, float]:
    """(median, first and third quartile)"""
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), q1, q3


def measure(
    row: op.KernelInfo, dtype: str, name: str, shape: Shape, runs: int, peaks: dict[str, float]
) -> dict[str, object]:
    ours, torchs, flop = calls(row, DTYPES[dtype], shape)
    ours(), torchs()  # first calls make threads and touch memory
    pairs = [(seconds(ours), seconds(torchs)) for _ in range(runs)]
    cpu = [statistics.median(pair[side][0] for pair in pairs) for side in (0, 1)]
    wall = [statistics.median(pair[side][1] for pair in pairs) for side in (0, 1)]
    ratio, ratio_q1, ratio_q3 = middle([t[0] / o[0] for o, t in pairs])
    wall_ratio, wall_q1, wall_q3 = middle([t[1] / o[1] for o, t in pairs])
    peak = peaks.get(PEAKS.get(row.name, ""), 0.0)
    numbers = (
        *(flop / t / 1e9 for t in (*cpu, *wall)),
        *(ratio, ratio_q1, ratio_q3, wall_ratio, wall_q1, wall_q3),
        *(peak, flop / cpu[0] / 1e9 / peak if peak else 0.0),
    )
    start = (row.name, dtype, name, torch.get_num_threads(), runs)
    return dict(zip(FIELDS, (*start, *(f"{n:.3f}" for n in numbers)), strict=True))


def cost_of_turns(rounds: int = 200) -> float:
    """Wall time of a torch operator and ours in turns, over that of each by itself."""
    matrix = torch.randn(512, 512)
    query = torch.randn(1, 256, 4, 64)

    def product() -> object:
        return matrix @ matrix

    def attention() -> object:
        return torch.ops.wan_attn.sdpa(query, query, query)

    def wall(*functions: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(rounds):
            for function in functions:
                function()
        return time.perf_counter() - start

    wall(product, attention)
    ratios = [wall(product, attention) / (wall(product) + wall(attention)) for _ in range(7)]
    return statistics.median(ratios)


def picture(results: list[dict[str, object]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = [d for d in DTYPES if any(r["dtype"] == d for r in results)]
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 4), squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        mine = [r for r in results if r["dtype"] == dtype]
        shapes = list(dict.fromkeys(r["shape"] for r in mine))
        series = list(dict.fromkeys((r["row"], r["threads"]) for r in mine))
        width = 0.8 / len(series)
        for number, (row, threads) in enumerate(series):
            some = [r for r in mine if (r["row"], r["threads"]) == (row, threads)]
            heights = [float(str(r["ratio"])) for r in some]
            spread = [
                [h - float(str(r["ratio_q1"])) for h, r in zip(heights, some, strict=True)],
                [float(str(r["ratio_q3"])) - h for h, r in zip(heights, some, strict=True)],
            ]
            places = [shapes.index(r["shape"]) + number * width for r in some]
            axis.bar(places, heights, width, yerr=spread, capsize=2, label=f"{row}, {threads} thr.")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks([n + 0.4 - width / 2 for n in range(len(shapes))], shapes)
        axis.set_title(dtype)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("times as fast as torch (CPU time)")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the results")
    parser.add_argument("--name", default="cpu", help="of the files: this machine, in a word")
    parser.add_argument("--runs", type=int, default=7, help="pairs of runs for each figure")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", nargs="+", help="default: the best of each dtype and sdpa_avx2")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it works")
    return parser.parse_args()


def chosen_rows(wanted: list[str] | None, dtype: torch.dtype) -> list[op.KernelInfo]:
    able = [
        row
        for row in op.kernels()
        if row.device == "cpu"
        and dtype in row.dtypes
        and set(row.cpu_features) <= set(op.cpu_features())
    ]
    if wanted:
        return [row for row in able if row.name in wanted]
    return [row for row in able if row is able[0] or row.name == "sdpa_avx2"]


def main() -> int:
    options = arguments()
    if options.runs < 2:
        sys.exit("--runs must be at least 2, or there is no spread")
    shapes = QUICK if options.quick else {name: SHAPES[name] for name in options.shapes}
    peaks = machine_peaks()
    title = f"{cpu_name()} ({options.name}), torch {torch.__version__}, wan_attn {op.build_info()}"
    print(title)
    print("peak of one core, GFLOP/s:", peaks or "not measured, no C compiler")
    results: list[dict[str, object]] = []
    turns = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes:
            for row in chosen_rows(options.rows, DTYPES[dtype]):
                for name, shape in shapes.items():
                    result = measure(row, dtype, name, shape, options.runs, peaks)
                    results.append(result)
                    print(
                        "{row:17} {dtype:4} {shape:3} {threads} thr. {ours_gflops:>8} against "
                        "{torch_gflops:>8} GFLOP/s per core, ratio {ratio} ({ratio_q1} to "
                        "{ratio_q3}), wall {wall_ratio}, of peak {fraction_of_peak}".format(
                            **result
                        ),
                        flush=True,
                    )
        turns.append(f"{cost_of_turns():.2f} with {threads} threads")
    print("torch and ours in turns, over each by itself:", ", ".join(turns))
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / f"{options.name}.csv", "w", newline="", encoding="utf-8") as file:
        file.write(f"# {title}\n# in turns with torch, over each by itself: {', '.join(turns)}\n")
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)
    try:
        picture(results, title, options.out / f"{options.name}.png")
    except ImportError:
        print("no picture: matplotlib is not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
