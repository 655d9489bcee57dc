# SPDX-License-Identifier: Apache-2.0
"""speed.py - how fast is a kernel, beside torch's; and what compute-sanitizer says of it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.items import Bench, head_dim_for, run_op
from wan_attn.bench import facts, kernels, peers
from wan_attn.bench.timing import clock_for, interleave, percentile
from wan_attn.request import Request
from wan_attn.workloads import parse_shape

TORCH_KERNELS = ("torch", "torch-flash", "torch-cudnn", "torch-efficient", "fa2", "fa3")
SANITIZER_TOOLS = ("memcheck", "racecheck")
BIG_FLOP = 5e13  # above this a call takes so long that three rounds must do


def measure_matmul(bench: Bench, row: None, _: str) -> dict[str, Any]:
    """The peak that torch's own matrix product reaches here, in bf16 and fp16."""
    clock = clock_for(bench.device)
    seconds = 0.5 if bench.is_dry else 2.0
    return {
        str(d).removeprefix("torch."): facts.matmul_tflops(bench.device, d, clock, seconds)
        for d in (torch.bfloat16, torch.float16)
    }


def measure_speed(bench: Bench, row: None, shape: str) -> dict[str, Any]:
    """Every row beside torch's kernels on one of Wan's calls, in turn."""
    call = parse_shape(shape)
    rows = {r.name for r in bench.rows()}
    results, skipped = [], {}
    before = facts.state(bench.device)
    for dtype in (torch.bfloat16, torch.float16):
        query, key, value = kernels.operands(call, dtype, None, bench.device)
        request = Request.from_tensors(query, key, value, needs_grad=False)
        functions = {}
        for peer in peers.all_peers(bench.device):
            if peer.name not in rows and peer.name not in TORCH_KERNELS:
                continue
            reason = peer.why_not(request)
            if reason is None:
                functions[peer.name] = functools.partial(peer.run, query, key, value)
            else:
                skipped[f"{peer.name} {dtype}"] = reason
        big = call.flops > BIG_FLOP
        with torch.inference_mode():
            found = interleave(
                functions, clock_for(bench.device), warmup=1 if big else 2,
                seconds=1.0 if bench.is_dry else 8.0, rounds=3 if big else None,
            )  # fmt: skip
        skipped |= {f"{name} {dtype}": reason for name, reason in found.skipped.items()}
        for name, times in found.times.items():
            results.append(
                {
                    "kernel": name,
                    "ours": name in rows,
                    "dtype": str(dtype).removeprefix("torch."),
                    "p10_ms": percentile(times, 10),
                    "p50_ms": percentile(times, 50),
                    "p90_ms": percentile(times, 90),
                    "rounds": len(times),
                    "tflops": call.flops / percentile(times, 50) / 1e9,
                }
            )
        del query, key, value, functions
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    after = facts.state(bench.device)
    throttled = sorted({*before.throttled, *after.throttled})
    clocks = {"before": before.values, "after": after.values, "throttled": throttled}
    return {"shape": call.shape, "results": results, "skipped": skipped, "clocks": clocks}


def sanitizer() -> str | None:
    """compute-sanitizer, where the toolkit is on the PATH or in its usual place."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for place in (None, f"{home}/bin", f"{home}/compute-sanitizer"):
        found = shutil.which("compute-sanitizer", path=place)
        if found:
            return found
    return None


def run_sanitizer(bench: Bench, row: None, tool: str) -> dict[str, Any]:
    """Each row once on a small call, watched."""
    program = sanitizer()
    if program is None:
        return {"skipped": "compute-sanitizer is not installed"}
    words = [program, f"--tool={tool}", "--error-exitcode=9", sys.executable]
    words += ["-m", "benchmarks.gpu_check.worker", "--touch"]
    answer = subprocess.run(
        words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    said = (answer.stdout + answer.stderr).strip().splitlines()
    tail = [line for line in said if line.startswith("=========")][-12:] or said[-6:]
    assert answer.returncode == 0, f"exit code {answer.returncode}: " + " / ".join(tail)
    return {"said": tail[-1] if tail else ""}


def touch(bench: Bench) -> None:
    """What the sanitizer watches."""
    for row in bench.rows():
        head_dim, dtype = head_dim_for(row, 128), row.dtypes[-1]
        q, k, v = (
            torch.randn(1, n, 1, head_dim, device=bench.device).to(dtype) for n in (130, 197, 197)
        )
        run_op(row, q, k, v, None, torch.tensor([150], device=bench.device), return_lse=True)
    bench.synchronize()
