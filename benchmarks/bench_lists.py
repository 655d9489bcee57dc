# SPDX-License-Identifier: Apache-2.0
"""bench_lists.py - what lists of blocks save: calls with random lists beside dense ones.

    OMP_WAIT_POLICY=passive python benchmarks/bench_lists.py [--tokens 8192] [--rounds 5]

Every CPU row that takes them, one thread, CPU time, each way once a round; medians. Random lists
are the hardest kind: neighbours share nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import wan_attn  # noqa: F401 - registers the op
from wan_attn.bench import facts
from wan_attn.native import op
from wan_attn.request import BLOCK, PLAIN, Request

HEADS, HEAD_DIM = 4, 128
DENSITIES = (0.3, 0.1, 1.0)
CALLS = (
    ("sdpa_avx2", torch.float32),
    ("sdpa_avx512", torch.float32),
    ("sdpa_avx512_bf16", torch.bfloat16),
    ("sdpa_avx2_qk8", torch.float32),
    ("sdpa_avx512_qk8", torch.float32),
)


def random_lists(tokens: int, density: float) -> dict[str, Any]:
    """The arguments of a call in which each block of queries sees this share of the keys'."""
    blocks = -(-tokens // BLOCK)
    count = max(1, round(density * blocks))
    drawn = torch.rand(1, HEADS, blocks, blocks).argsort(-1)[..., :count]
    counts = torch.full((1, HEADS, blocks), count, dtype=torch.int32)
    return {"block_counts": counts, "block_indices": drawn.sort(-1).values.int()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{facts.device_name(torch.device('cpu'))}, {args.tokens} x {HEADS} x {HEAD_DIM}")
    print("times the dense call; + others: as their means")
    ways: dict[str, dict[str, Any]] = {"dense": {}}
    for density in DENSITIES:
        ways[f"{density:.0%}"] = random_lists(args.tokens, density)
        if density < 1.0:
            ways[f"{density:.0%} + others"] = ways[f"{density:.0%}"] | {"pools_others": True}
    rows = {row.name: row for row in op.kernels()}
    for name, dtype in CALLS:
        q, k, v = torch.randn(3, 1, args.tokens, HEADS, HEAD_DIM).to(dtype)
        request, row = Request.from_tensors(q, k, v, PLAIN), rows[name]
        reason = op.why_not(request, row.index)
        if reason is not None:
            print(f"{name}: {reason}")
            continue
        of_row = {w: o for w, o in ways.items() if not (row.is_lossy and "pools_others" in o)}
        times: dict[str, list[float]] = {way: [] for way in of_row}
        for _ in range(args.rounds):
            for way, options in of_row.items():
                begun = time.process_time()
                torch.ops.wan_attn.sdpa(q, k, v, kernel=row.index, **options)
                times[way].append(time.process_time() - begun)
        medians = {way: statistics.median(found) for way, found in times.items()}
        dense = medians.pop("dense")
        shares = "  ".join(f"{way}: {dense / median:.2f}" for way, median in medians.items())
        print(f"{name:17} {1e3 * dense:6.0f} ms  {shares}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
