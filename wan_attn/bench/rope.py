# SPDX-License-Identifier: Apache-2.0
"""rope.py - `bench rope`: norm and rotation of one query or key on every route, timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan_attn.bench import accuracy, facts, progress, rope_routes
from wan_attn.bench.model import Arch, Video
from wan_attn.bench.report import Column, Report
from wan_attn.bench.rope_routes import COMPILED, COPY, STOCK, Operands, Route
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

COLUMNS = (
    Column("shape", "shape BxLxHxD"),
    Column("dtype", "dtype"),
    Column("route", "route"),
    Column("p10_ms", "p10 ms", ".2f"),
    Column("p50_ms", "p50 ms", ".2f"),
    Column("p90_ms", "p90 ms", ".2f"),
    Column("speedup", "x wan22", ".2f"),
    Column("gb_per_s", "GB/s", ".1f"),
    Column("of_copy", "% copy", ".0f", 100),
    Column("max_error", "max error", ".1e"),
    Column("rms_error", "rel. rms", ".1e"),
    Column("extra_mib", "extra MiB", ".1f"),
)


@dataclass(frozen=True)
class Options:
    """What was asked for; cli/bench_rope.py checks it."""

    device: torch.device
    arch: Arch
    videos: tuple[Video, ...]
    dtypes: tuple[torch.dtype, ...]
    wanted: list[str] | None = None
    seconds: float = 60.0
    rounds: int | None = None
    cpu_time: bool = False


def chosen(wanted: list[str] | None) -> list[Route]:
    """The routes of these names, stock always with them; without names all but the one that needs
    a compiler.

    Raises:
        ValueError: no route has that name.
    """
    every = rope_routes.routes()
    names = [route.name for route in every]
    for word in wanted or ():
        if word not in names:
            raise ValueError(f"--routes must name some of {', '.join(names)}; got {word!r}")
    if wanted is None:
        return [route for route in every if route.name != COMPILED]
    return [route for route in every if route.name in (STOCK, *wanted)]


def run(options: Options, bar: progress.Progress | None = None) -> Report:
    """Measures every video, dtype and route; a route that fails is listed, and nothing is raised.

    Raises:
        RuntimeError: the device itself failed.
    """
    began, device = time.perf_counter(), options.device
    report = Report("rope", f"RMS norm and RoPE on {facts.device_name(device)}", COLUMNS)
    report.environment = facts.environment(device)
    before = facts.state(device)
    clock = clock_for(device, cpu_time=options.cpu_time)
    cases = [(video, dtype) for video in options.videos for dtype in options.dtypes]
    bar = bar or progress.make(len(cases))
    for video, dtype in cases:
        bar.step(f"rope {video} {dtype_name(dtype)}")
        _measure_case(report, options, video, dtype, clock, options.seconds / len(cases))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    bar.close()
    after = facts.state(device)
    report.state = {"before": before.values, "after": after.values}
    report.note(_notes(options))
    report.note(facts.warnings_of(before, after, device))
    report.seconds = time.perf_counter() - began
    return report


def _notes(options: Options) -> list[str]:
    notes = [
        "One query or key of one layer: RMS norm over all heads, rotation, and the result in the "
        "dtype that attention computes in. GB/s counts x read once and the result written once, "
        "whatever a route really moves; % copy is torch's copy of the same bytes over the route.",
        "Errors are against float64. extra MiB is held beside operands and result.",
    ]
    if options.cpu_time:
        notes.append(CPU_TIME_NOTE)
    return notes


def grid_of(arch: Arch, video: Video) -> rope_routes.Grid:
    """Frames, height and width in tokens."""
    _, frames, rows, columns = video.latent(arch)
    return frames, rows // arch.call.patch, columns // arch.call.patch


def _measure_case(
    report: Report,
    options: Options,
    video: Video,
    dtype: torch.dtype,
    clock: Clock,
    seconds: float,
) -> None:
    call, device = options.arch.call, options.device
    where = f"{video} {dtype_name(dtype)}"
    try:
        grid = grid_of(options.arch, video)
        given = rope_routes.operands(grid, call.num_heads, call.head_dim, dtype, device)
        exact = rope_routes.exact(given)
    except Exception as error:
        if is_fatal(error):
            raise
        report.skipped.append((where, "all routes", describe_failure(error)))
        return
    with torch.inference_mode():
        every = [route for route in chosen(options.wanted) if route.runs_on(given.x.device)]
        calls = {route.name: route.make(given) for route in every}
        found = interleave(calls, clock, seconds=seconds, rounds=options.rounds)
        for name, reason in found.skipped.items():
            said = reason.removeprefix("RuntimeError: wan_attn: ").removeprefix(f"{name}: ")
            report.skipped.append((where, name, said))
        medians = {name: pct(times, 50) for name, times in found.times.items()}
        for name, times in found.times.items():
            row = _row(given, name, times, medians)
            row["video"], row["model"] = str(video), options.arch.call.name
            _add_quality(row, calls[name], exact, device, is_copy=name == COPY)
            report.rows.append(row)


def _row(
    given: Operands, name: str, times: list[float], medians: dict[str, float]
) -> dict[str, Any]:
    x = given.x
    p50 = medians[name]
    bytes_moved = 2 * x.numel() * x.element_size()
    return {
        "shape": "x".join(map(str, x.shape)),
        "grid": "x".join(map(str, given.grid)),
        "dtype": dtype_name(x.dtype),
        "route": name,
        "ours": name.startswith("rms_norm_rope"),
        "p10_ms": pct(times, 10),
        "p50_ms": p50,
        "p90_ms": pct(times, 90),
        "iters": len(times),
        "speedup": medians[STOCK] / p50 if STOCK in medians else None,
        "gb_per_s": bytes_moved / p50 / 1e6,
        "of_copy": medians[COPY] / p50 if COPY in medians else None,
        "samples_ms": list(times),
    }


def _add_quality(
    row: dict[str, Any],
    call: Callable[[], Tensor],
    exact: Tensor,
    device: torch.device,
    *,
    is_copy: bool,
) -> None:
    extra = accuracy.extra_bytes(call, device)
    row["extra_mib"] = None if extra is None else extra / 2**20
    row["max_error"] = row["rms_error"] = None
    if is_copy:
        row["extra_mib"] = None  # it writes where it has written before
        return
    gap = call().double() - exact
    row["max_error"] = float(gap.abs().amax())
    row["rms_error"] = float(gap.square().mean().sqrt() / exact.square().mean().sqrt())
