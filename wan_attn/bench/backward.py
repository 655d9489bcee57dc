# SPDX-License-Identifier: Apache-2.0
"""backward.py - `bench backward`: the gradients of one call after another, by each of our rows and
by torch's SDPA, timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_attn.backends import native
from wan_attn.bench import facts, progress
from wan_attn.bench.kernels import operands
from wan_attn.bench.report import Column, Report
from wan_attn.bench.timing import CPU_TIME_NOTE, Clock, clock_for, interleave
from wan_attn.bench.timing import percentile as pct
from wan_attn.log import dtype_name
from wan_attn.native import backward
from wan_attn.native.kernels import backward_kernels
from wan_attn.request import Request
from wan_attn.workloads import Workload

TORCH = "torch SDPA"
COLUMNS = (
    Column("shape", "shape BxLxHxD"),
    Column("dtype", "dtype"),
    Column("kernel", "kernel"),
    Column("p10_ms", "p10 ms", ".2f"),
    Column("p50_ms", "p50 ms", ".2f"),
    Column("p90_ms", "p90 ms", ".2f"),
    Column("tflops", "TFLOP/s", ".3g"),
    Column("speedup", "x torch", ".2f"),
    Column("workspace_mib", "workspace MiB", ".1f"),
)
NOTE = (
    "Gradients of query, key and value alone, without forward. TFLOP/s counts five products, "
    "however many a kernel computes. The portable row is left out."
)


@dataclass(frozen=True)
class Options:
    """What was asked for; cli/bench.py checks it."""

    shapes: tuple[Workload, ...]
    dtypes: tuple[torch.dtype, ...]
    seconds: float = 60.0
    rounds: int | None = None
    cpu_time: bool = False
    device: torch.device = torch.device("cpu")


def run(options: Options, bar: progress.Progress | None = None) -> Report:
    """Measures every shape and dtype."""
    began, device = time.perf_counter(), options.device
    native.prove(device)
    report = Report("backward", f"Gradients of attention on {facts.device_name(device)}", COLUMNS)
    report.environment = facts.environment(device)
    before = facts.state(device)
    clock = clock_for(device, cpu_time=options.cpu_time)
    cases = [(shape, dtype) for shape in options.shapes for dtype in options.dtypes]
    bar = bar or progress.make(len(cases))
    for shape, dtype in cases:
        bar.step(f"backward {shape.name} {dtype_name(dtype)}")
        _measure(report, options, shape, dtype, clock, options.seconds / len(cases))
    bar.close()
    after = facts.state(device)
    report.state = {"before": before.values, "after": after.values}
    report.note([NOTE, CPU_TIME_NOTE] if options.cpu_time else [NOTE])
    report.note(facts.warnings_of(before, after, device))
    report.seconds = time.perf_counter() - began
    return report


def _by_torch(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> Callable[[], object]:
    q, k, v = (x.transpose(1, 2).contiguous().requires_grad_() for x in (query, key, value))
    is_grouped = query.shape[2] != key.shape[2]
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=is_grouped)
    grad = grad.transpose(1, 2)
    return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)


def _measure(
    report: Report,
    options: Options,
    shape: Workload,
    dtype: torch.dtype,
    clock: Clock,
    seconds: float,
) -> None:
    query, key, value = operands(shape, dtype, None, options.device)
    grad = torch.randn_like(query)
    request = Request.of(shape, dtype, options.device, needs_grad=True)
    calls: dict[str, Callable[[], object]] = {TORCH: _by_torch(query, key, value, grad)}
    where = f"{'x'.join(map(str, query.shape))} {dtype_name(dtype)}"
    why_not = native.why_not(request)
    if why_not is None:
        out, lse = torch.ops.wan_attn.sdpa(query, key, value, return_lse=True)
        for row in backward_kernels():
            if row.name != backward.PORTABLE and backward.why_not(request, row.index) is None:
                calls[row.name] = partial(
                    torch.ops.wan_attn.sdpa_backward,
                    *(grad, None, query, key, value, out, lse),
                    kernel=row.index,
                )
    else:
        report.skipped.append((where, native.TITLE, why_not))
    found = interleave(calls, clock, seconds=seconds, rounds=options.rounds)
    report.skipped += [(where, name, reason) for name, reason in found.skipped.items()]
    medians = {name: pct(times, 50) for name, times in found.times.items()}
    for name, times in found.times.items():
        size = None if name == TORCH else backward.workspace_bytes(request, name)
        row_of: dict[str, Any] = {
            "shape": "x".join(map(str, query.shape)),
            "dtype": dtype_name(dtype),
            "kernel": name,
            "ours": name != TORCH,
            "p10_ms": pct(times, 10),
            "p50_ms": medians[name],
            "p90_ms": pct(times, 90),
            "iters": len(times),
            "tflops": 2.5 * shape.flops / medians[name] / 1e9,
            "speedup": medians[TORCH] / medians[name] if TORCH in medians else None,
            "workspace_mib": None if size is None else size / 2**20,
            "samples_ms": list(times),
        }
        report.rows.append(row_of)
