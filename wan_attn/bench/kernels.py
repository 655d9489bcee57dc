# SPDX-License-Identifier: Apache-2.0
"""kernels.py - `bench kernels`: every peer on one call after another, timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wan_attn.bench import accuracy, facts, peers, progress
from wan_attn.bench.report import Column, Report
from wan_attn.bench.timing import (
    CPU_TIME_NOTE,
    Clock,
    clock_for,
    describe_failure,
    interleave,
    is_fatal,
)
from wan_attn.bench.timing import percentile as pct
from wan_attn.log import dtype_name
from wan_attn.request import Request
from wan_attn.workloads import WORKLOADS, Workload, parse_shape

# On a CPU the named calls are cut down to this much work, so that all of them together take a
# minute: fewer heads first (a head is a head), then shorter lengths.
CPU_FLOP_MAX = 5e9
CPU_HEADS_MAX = 4

GPU_SHAPES = (
    *("ti2v-5b-720p", "a14b-480p", "a14b-720p", "ti2v-5b-720p-cross", "clip-vit-h"),
    "h3-79k",
)
CPU_SHAPES = ("ti2v-5b-720p", "ti2v-5b-720p-cross", "clip-vit-h")
CPU_LENGTHS = (512, 2048)

COLUMNS = (
    Column("shape", "shape BxLxHxD"),
    Column("dtype", "dtype"),
    Column("kernel", "kernel"),
    Column("p10_ms", "p10 ms", ".2f"),
    Column("p50_ms", "p50 ms", ".2f"),
    Column("p90_ms", "p90 ms", ".2f"),
    Column("tflops", "TFLOP/s", ".3g"),
    Column("of_matmul", "% matmul", ".0f", 100),
    Column("of_datasheet", "% sheet", ".0f", 100),
    Column("speedup", "x torch", ".2f"),
    Column("max_error", "max error", ".1e"),
    Column("rms_error", "rel. L2", ".1e"),
    Column("one_less_cosine", "1 - cos", ".0e"),
    Column("extra_mib", "extra MiB", ".1f"),
)


@dataclass(frozen=True)
class Options:
    """What was asked for; cli/bench.py checks it."""

    device: torch.device
    shapes: tuple[Workload, ...]
    dtypes: tuple[torch.dtype, ...]
    qk_dtype: torch.dtype | None = None  # of query and key; None: as value
    wanted: list[str] | None = None
    seconds: float = 60.0
    rounds: int | None = None
    cpu_time: bool = False


def scaled(call: Workload, flop_max: float = CPU_FLOP_MAX) -> Workload:
    """The call with no more work than this; queries and keys keep their proportion."""
    heads = min(call.num_heads_q, CPU_HEADS_MAX)
    small = replace(call, num_heads_q=heads, num_heads_k=min(call.num_heads_k, heads))
    while small.flops > flop_max and max(small.seqlen_q, small.seqlen_k) > 128:
        if small.seqlen_k > 1024 or small.seqlen_q == small.seqlen_k:
            small = replace(small, seqlen_k=small.seqlen_k // 2)
        small = replace(small, seqlen_q=small.seqlen_q // 2)
    return small if small == call else replace(small, title=f"{call.title}, scaled down")


def default_shapes(device: torch.device) -> tuple[Workload, ...]:
    """What Wan2.2 asks for; scaled down on a CPU."""
    if device.type == "cuda":
        return tuple(WORKLOADS[name] for name in GPU_SHAPES)
    lengths = (parse_shape(f"1x{n}x{CPU_HEADS_MAX}x128") for n in CPU_LENGTHS)
    return (*(scaled(WORKLOADS[name]) for name in CPU_SHAPES), *lengths)


def operands(
    call: Workload, dtype: torch.dtype, qk_dtype: torch.dtype | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal query, key and value: scores as RMSNorm leaves them in Wan."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(seqlen: int, heads: int, kind: torch.dtype) -> Tensor:
        shape = (call.batch, seqlen, heads, call.head_dim)
        return torch.randn(shape, generator=generator, device=device).to(kind)

    qk = qk_dtype or dtype
    return (
        draw(call.seqlen_q, call.num_heads_q, qk),
        draw(call.seqlen_k, call.num_heads_k, qk),
        draw(call.seqlen_k, call.num_heads_k, dtype),
    )


def run(options: Options, bar: progress.Progress | None = None) -> Report:
    """Measures everything; a peer that fails is listed, and nothing is raised.

    Raises:
        RuntimeError: the device itself failed.
    """
    began = time.perf_counter()
    device = options.device
    report = Report("kernels", f"Attention kernels on {facts.device_name(device)}", COLUMNS)
    report.environment = facts.environment(device)
    before = facts.state(device)
    clock = clock_for(device, cpu_time=options.cpu_time)
    cases = [(call, dtype) for call in options.shapes for dtype in options.dtypes]
    bar = bar or progress.make(len(options.dtypes) + len(cases))
    matmul = {}
    for dtype in options.dtypes:
        bar.step(f"matmul {dtype_name(dtype)}")
        matmul[dtype] = facts.matmul_tflops(device, dtype, clock)
    for call, dtype in cases:
        bar.step(f"{call.name} {dtype_name(dtype)}")
        measure_case(
            report, peers.choose(peers.all_peers(device), options.wanted), call, dtype, device,
            clock, qk_dtype=options.qk_dtype, matmul=matmul[dtype],
            seconds=options.seconds / len(cases), rounds=options.rounds,
        )  # fmt: skip
    bar.close()
    after = facts.state(device)
    report.state = {
        "before": before.values,
        "after": after.values,
        "throttled": sorted({*before.throttled, *after.throttled}),
        "matmul_tflops": {dtype_name(d): round(v, 3) for d, v in matmul.items()},
        "datasheet_tflops": facts.datasheet_tflops(device, options.dtypes[0]),
    }
    report.note(_notes(options, report, matmul))
    report.note(facts.warnings_of(before, after, device))
    report.seconds = time.perf_counter() - began
    return report


def _notes(options: Options, report: Report, matmul: dict[torch.dtype, float]) -> list[str]:
    peaks = ", ".join(f"{dtype_name(d)} {v:.3g} TFLOP/s" for d, v in matmul.items())
    notes = [
        f"% matmul is of torch's own matrix product, measured here: {peaks}. x torch is against "
        "PyTorch's SDPA by its own choice (1.00). Errors are against float64 on "
        f"{accuracy.REFERENCE_ROWS} rows of every head."
    ]
    if any("scaled down" in call.title for call in options.shapes):
        notes.append("No GPU: Wan's shapes are scaled down here (--full for the real ones).")
    if options.device.type == "cuda":
        notes.append(
            "Device events; the L2 cache overwritten before each call; all kernels in turn."
        )
    else:
        notes.append("All kernels in turn; caches as the call before left them.")
        notes.append(CPU_TIME_NOTE if options.cpu_time else "Times are the wall clock's.")
    if any(row["lossy"] for row in report.rows):
        notes.append("* quantises: its error is larger by design. Quantising is in its time.")
    return notes


def measure_case(
    report: Report,
    candidates: Iterable[peers.Peer],
    call: Workload,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    *,
    qk_dtype: torch.dtype | None = None,
    matmul: float = 0.0,
    seconds: float = 10.0,
    rounds: int | None = None,
) -> None:
    """Adds to the report a row for each candidate that takes the call, and why the others do not.

    Args:
        qk_dtype: of query and key; None: as value.
        matmul: TFLOP/s of torch's matrix product, which the rows are a share of; 0: not known.
        seconds, rounds: see interleave().

    Raises:
        RuntimeError: the device itself failed.
    """
    where = f"{call.shape} {dtype_name(dtype)}"
    try:
        query, key, value = operands(call, dtype, qk_dtype, device)
        exact = accuracy.reference(query, key, value)
    except Exception as error:
        if is_fatal(error):
            raise
        report.skipped.append((where, "all kernels", describe_failure(error)))
        _free(device)
        return
    with torch.inference_mode():
        request = Request.from_tensors(query, key, value, needs_grad=False)
        usable = []
        for peer in candidates:
            reason = peer.why_not(request)
            if reason is None:
                usable.append(peer)
            else:
                reason = reason.removeprefix(f"{peer.name}: ")
                report.skipped.append((where, peer.name, reason))
        calls: dict[str, Callable[[], Tensor]] = {
            peer.name: partial(peer.run, query, key, value) for peer in usable
        }
        found = interleave(calls, clock, seconds=seconds, rounds=rounds)
        report.skipped += [(where, name, reason) for name, reason in found.skipped.items()]
        baseline = pct(found.times.get(peers.BASELINE, []), 50)
        for peer in usable:
            if peer.name in found.times:
                row = _row(call, dtype, peer, found.times[peer.name], matmul, device)
                row["speedup"] = baseline / row["p50_ms"]
                _add_quality(row, peer.name, calls[peer.name], exact, device)
                report.rows.append(row)
    del query, key, value, calls, exact
    _free(device)


def _row(
    call: Workload,
    dtype: torch.dtype,
    peer: peers.Peer,
    times: list[float],
    matmul: float,
    device: torch.device,
) -> dict[str, Any]:
    tflops = call.flops / pct(times, 50) / 1e9
    sheet = facts.datasheet_tflops(device, dtype)
    return {
        "workload": call.name,
        "shape": call.shape,
        "seqlen_q": call.seqlen_q,
        "seqlen_k": call.seqlen_k,
        "dtype": dtype_name(dtype),
        "kernel": peer.name + ("*" if peer.is_lossy else ""),
        "ours": peer.is_ours,
        "lossy": peer.is_lossy,
        "p10_ms": pct(times, 10),
        "p50_ms": pct(times, 50),
        "p90_ms": pct(times, 90),
        "iters": len(times),
        "tflops": tflops,
        "of_matmul": tflops / matmul if matmul else None,
        "of_datasheet": tflops / sheet if sheet else None,
        "samples_ms": list(times),
    }


def _add_quality(
    row: dict[str, Any],
    name: str,
    call: Callable[[], Tensor],
    exact: accuracy.Reference,
    device: torch.device,
) -> None:
    error = accuracy.error(call(), exact)
    extra = accuracy.extra_bytes(call, device)
    row["max_error"], row["rms_error"] = error.max, error.relative_rms
    row["one_less_cosine"] = error.one_less_cosine
    row["extra_mib"] = None if extra is None else extra / 2**20


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
