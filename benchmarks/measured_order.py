# SPDX-License-Identifier: Apache-2.0
"""measured_order.py - is what `auto` measures right? On the CPU, in processes of their own.

    python benchmarks/measured_order.py                     three kinds of calls, 20 trials each
    python benchmarks/measured_order.py --trials 2 --quick  a short look whether it runs

A trial is a new process with an empty cache folder, which calls wan_attn.sdpa until the kind is
decided. Then every candidate is measured independently, on whole calls in interleaved rounds, and
the one that was chosen is compared with the best. Also shown: how many calls came before the
decision, and what it cost. The kinds differ in WAN_ATTN_CPU_ISA, so that the order differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

# (name, WAN_ATTN_CPU_ISA, shape, dtype)
KINDS = (
    ("portable fp32, few keys", "portable", (1, 4096, 512, 4, 64), "float32"),
    ("best fp32", "auto", (1, 4096, 1024, 4, 128), "float32"),
    ("best bf16, few keys", "auto", (1, 8192, 512, 4, 128), "bfloat16"),
)
BOUND = 1.03
WANTED = 0.95  # share of the trials that must be within BOUND


def trial(isa: str, shape: tuple[int, ...], dtype: str, rounds: int) -> dict[str, Any]:
    """What one process found, and what is true; runs in that process."""
    import time

    import torch

    from wan_attn.attention import sdpa
    from wan_attn.bench.timing import WallClock, interleave
    from wan_attn.request import Call, Request
    from wan_attn.selection import run
    from wan_attn.tuning.candidates import Candidate, alone

    batch, seqlen_q, seqlen_k, heads, head_dim = shape
    q = torch.randn(batch, seqlen_q, heads, head_dim, dtype=getattr(torch, dtype))
    k, v = torch.randn(2, batch, seqlen_k, heads, head_dim, dtype=getattr(torch, dtype))
    took = []
    for _ in range(2000):
        began = time.perf_counter()
        sdpa(q, k, v)
        took.append(time.perf_counter() - began)
        (plan,) = run._plans.values()
        if plan.turn is None:
            break
    entry = plan.choice.entry
    assert entry is not None, "it was not decided"
    names = [Candidate(*name.split(":")) for name in entry.times]
    assert isinstance(plan.request, Request)
    calls = {one.name: functools.partial(alone(one), q, k, v, Call()) for one in names}
    found = interleave(calls, WallClock(), warmup=1, rounds=rounds)
    medians = {name: statistics.median(times) for name, times in found.times.items()}
    chosen = plan.choice.candidate.name
    return {
        "chosen": chosen,
        "measured": entry.times,
        "independent": medians,
        "behind": medians[chosen] / min(medians.values()),
        "calls": len(took),
        "seconds": entry.seconds,
        "share": entry.seconds / max(sum(took) - entry.seconds, 1e-9),
    }


def in_a_process(isa: str, shape: tuple[int, ...], dtype: str, rounds: int) -> dict[str, Any]:
    """One trial, with an empty cache folder."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "WAN_ATTN_TUNE": "auto",
            "WAN_ATTN_CACHE_DIR": folder,
            "WAN_ATTN_CPU_ISA": isa,
        }
        words = [sys.executable, __file__, "--one", json.dumps([isa, shape, dtype, rounds])]
        answer = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
        result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
        return result


def main() -> int:
    """0: enough trials chose the best."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9, help="of the independent measurement")
    parser.add_argument("--quick", action="store_true", help="lengths of a quarter")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(trial(*json.loads(args.one))))
        return 0
    good = total = 0
    for name, isa, shape, dtype in KINDS:
        if args.quick:
            shape = (shape[0], shape[1] // 4, max(256, shape[2] // 4), *shape[3:])
        print(f"{name}: {shape}, {dtype}, WAN_ATTN_CPU_ISA={isa}", flush=True)
        for number in range(args.trials):
            found = in_a_process(isa, shape, dtype, args.rounds)
            total += 1
            good += found["behind"] <= BOUND
            told = ", ".join(
                f"{name} {ms:.1f}, slice {found['measured'][name]:.2f}"
                for name, ms in found["independent"].items()
            )
            print(
                f"  {number + 1:2}: {found['chosen']}, {found['behind']:.3f} of the best"
                f" ({told} ms); decided at call {found['calls']}, {found['seconds']:.2f} s,"
                f" {found['share']:.1%} of the calls",
                flush=True,
            )
    print(f"{good} of {total} within {BOUND - 1:.0%} of the best")
    return 0 if good >= WANTED * total else 1


if __name__ == "__main__":
    raise SystemExit(main())
