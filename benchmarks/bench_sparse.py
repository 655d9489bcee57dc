# SPDX-License-Identifier: Apache-2.0
"""bench_sparse.py - blocks left out of stock Wan2.2's block stack: density, error and time of each
layer and head, with tokens in raster order and along a Morton curve.

    python -m benchmarks.bench_sparse --wan22 DIR [--size 640x480] [--frames 33] [--heads 2]

The stack's weights are made by a seed (accuracy/wan_stack.py says how); `wan-attn bench sparse` has
heads that are made without a model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from wan_attn.bench import model, report, rope, sparse
from wan_attn.bench.timing import clock_for
from wan_attn.cli import bench_options

from .accuracy import wan_stack


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_sparse")
    parser.add_argument("--wan22", type=Path, required=True, help="a checkout of Wan2.2")
    parser.add_argument("--size", default="640x480", metavar="WxH")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--heads", type=int, default=2, help="of each layer")
    parser.add_argument("--layers", type=int, default=wan_stack.LAYERS)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    given = parser.parse_args(arguments)

    width, height = bench_options.size(given.size)
    video, arch = model.Video(width, height, given.frames), model.ARCHS["a14b"]
    grid = rope.grid_of(arch, video)
    options = sparse.Options(
        torch.device("cpu"), grid, (torch.bfloat16,), taus=(0.5, 1.0, 1.5), rounds=3
    )
    found = report.Report("sparse", f"Wan2.2's block stack, {video}", sparse.COLUMNS)
    found.note(sparse.NOTES)
    clock = clock_for(options.device, cpu_time=True)
    for layer, tensors in enumerate(wan_stack.operands(given.wan22, given.layers, video=video)):
        for number in range(min(given.heads, tensors[0].shape[1])):
            q, k, v = (x[None, :, number : number + 1].contiguous() for x in tensors)
            exact = (q.double(), k.double(), v.double())
            head = sparse.Head(f"{layer}.{number}", (q, k, v), exact, grid)
            sparse.measure(found, head, options, clock, 10.0)
            print(f"layer {layer}, head {number}", file=sys.stderr, flush=True)
    print(report.as_text(found))
    if given.json:
        report.write(found, given.json.with_suffix(""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
