# SPDX-License-Identifier: Apache-2.0
"""step.py - `bench step`: one denoising step of a stack of Wan blocks, on every route in turn.

A step is two forwards, with and without the prompt, as Wan2.2 makes them. Its time is measured
whole and undisturbed; where it went is asked afterwards, in a step of its own with a mark around
every block and every attention call.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wan_attn.backends import REGISTRY, torch_sdpa
from wan_attn.backends._torch_kernels import SDPA
from wan_attn.bench import facts, progress
from wan_attn.bench.model import (
    ARCHS,
    Arch,
    Attend,
    DiffusersStack,
    Video,
    Wan22Stack,
    reduced,
)
from wan_attn.bench.report import Column, Report
from wan_attn.bench.timing import (
    CPU_TIME_NOTE,
    Clock,
    clock_for,
    describe_failure,
    interleave,
    summary,
)
from wan_attn.log import dtype_name
from wan_attn.native import rope
from wan_attn.request import Call, Request
from wan_attn.workloads import Workload

FORWARDS = 2
STOCK = "stock"
ROPE = "sdpa+rope"
YARDSTICK = "matmul"
PUBLISHED = ((896, 512), (1152, 640), (1344, 768))

COLUMNS = (
    Column("video", "video WxHxF"),
    Column("tokens", "tokens", "d"),
    Column("dtype", "dtype"),
    Column("backend", "backend"),
    Column("iters", "steps", "d"),
    Column("avg_ms", "avg ms", ".1f"),
    Column("p50_ms", "p50 ms", ".1f"),
    Column("p90_ms", "p90 ms", ".1f"),
    Column("it_per_s", "it/s", ".3g"),
    Column("peak_gb", "peak GB", ".2f"),
    Column("speedup", "x base", ".2f"),
    Column("attention", "attention", ".0%"),
    Column("full_step_s", "all layers s", ".3g"),
    Column("video_min", "min/video", ".1f"),
)


@dataclass(frozen=True)
class Route:
    """One way to compute the attention of a step. `attend` is None for the model's own; `rope`:
    rms_norm_rope norms and rotates query and key, where otherwise the model does."""

    name: str
    title: str
    attend: Attend | None
    why_not: Callable[[Request], str | None]
    rope: bool = False


def routes(device: torch.device) -> list[Route]:
    """Every route; the first that can be measured is 1.0."""
    found = [
        Route(STOCK, "the model's own attention", None, lambda request: None),
        Route(
            "torch-batched",
            "PyTorch's SDPA over the padded batch",
            _by(torch_sdpa.run_unread),
            torch_sdpa.why_not,
        ),
    ]
    for name, title in (
        ("torch", "PyTorch's SDPA, each sample at its real length"),
        ("chunked", "the memory-bounded wrapper"),
        ("sdpa", "wan_attn's kernels"),
        ("fa2", "FlashAttention 2"),
        ("fa3", "FlashAttention 3"),
    ):
        found.append(Route(name, title, _by(REGISTRY[name].run), REGISTRY[name].why_not))
    title = "wan_attn's kernels, norm and rotation in one pass"
    found.append(Route(ROPE, title, _by(REGISTRY["sdpa"].run), _why_no_rope, rope=True))
    return found


def _why_no_rope(request: Request) -> str | None:
    why = rope.why_not(request.device)
    return REGISTRY["sdpa"].why_not(request) if why is None else f"norm and rotation: {why}"


def _by(run: Callable[..., tuple[Tensor, Tensor | None]]) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, k_lens: Tensor | None) -> Tensor:
        return run(query, key, value, Call(k_lens=k_lens))[0]

    return attend


@dataclass(frozen=True)
class Options:
    """What was asked for; cli/bench.py checks it.

    Attributes:
        arch: with the real dimensions or reduced ones; is_reduced says which.
        fill: how much of each sample is real, over the batch.
        yardstick: time a fixed matrix product in every round too, for compare.py.
    """

    device: torch.device
    arch: Arch
    layers: int
    videos: tuple[Video, ...]
    dtypes: tuple[torch.dtype, ...]
    wanted: list[str] | None = None
    batch: int = 1
    fill: tuple[float, ...] = (1.0,)
    wan22: Path | None = None
    seconds: float = 60.0
    rounds: int | None = None
    is_reduced: bool = False
    yardstick: bool = False
    cpu_time: bool = False

    def clock(self) -> Clock:
        """Flushes nothing: a step does not fit a cache, and a buffer would count in its memory."""
        return clock_for(self.device, flush_bytes=0, cpu_time=self.cpu_time)


def default_arch(name: str, device: torch.device, full: bool) -> tuple[Arch, bool]:
    """Returns the model, and whether its dimensions are reduced."""
    arch = ARCHS[name]
    return (arch, False) if full or device.type == "cuda" else (reduced(arch), True)


Stack = DiffusersStack | Wan22Stack


def make_stack(options: Options, dtype: torch.dtype) -> Stack:
    """The blocks.

    Raises:
        ModelError: neither package nor checkout is there.
    """
    arguments = (options.arch, options.layers, dtype, options.device)
    if options.wan22 is None:
        return DiffusersStack(*arguments)
    return Wan22Stack(*arguments, options.wan22)


def run(options: Options, bar: progress.Progress | None = None) -> Report:
    """Measure every video, dtype and route.

    Raises:
        ModelError: there is no model to run. RuntimeError: the device itself failed.
    """
    began = time.perf_counter()
    device, clock = options.device, options.clock()
    report = Report("step", "", COLUMNS, environment=facts.environment(device))
    before = facts.state(device)
    cases = len(options.dtypes) * len(options.videos)
    bar = bar or progress.make(cases)
    title = ""
    for dtype in options.dtypes:
        stack = None
        try:
            stack = make_stack(options, dtype)
            title = stack.title
            for video in options.videos:
                bar.step(f"step {video} {dtype_name(dtype)}")
                measure_case(report, options, stack, video, dtype, clock, options.seconds / cases)
        except torch.OutOfMemoryError as error:
            reason = describe_failure(error)
            report.skipped.append((dtype_name(dtype), "the model's weights", reason))
        finally:
            if stack is not None:
                stack.close()
            del stack
            if device.type == "cuda":
                torch.cuda.empty_cache()
    bar.close()
    report.title = f"One denoising step of {options.arch.call.title} on {facts.device_name(device)}"
    after = facts.state(device)
    report.state = {"before": before.values, "after": after.values}
    report.note(notes(options, title))
    report.note(facts.warnings_of(before, after, device))
    report.seconds = time.perf_counter() - began
    return report


def notes(options: Options, title: str) -> list[str]:
    """What a reader must know about the figures."""
    arch = options.arch
    blocks = (
        f"{title}, random weights, {options.layers} of {arch.call.layers} blocks; a step is "
        f"{FORWARDS} forwards of batch {options.batch}; no text encoder, no VAE, no offloading."
    )
    said = [blocks]
    if options.is_reduced:
        said.append(
            f"Reduced for a CPU: {arch.call.num_heads} heads instead of "
            f"{ARCHS[arch.call.name].call.num_heads}, {arch.ffn} in the feed-forward layer; "
            "nothing is extrapolated from that (--full for the real dimensions)."
        )
    else:
        said.append(
            f"`all layers s` and `min/video` are extrapolated, not measured: the blocks' part "
            f"times {arch.call.layers}/{options.layers}, then {arch.steps} steps."
        )
    if options.cpu_time:
        said.append(CPU_TIME_NOTE)
    if options.fill != (1.0,):
        said.append(f"Real lengths of the samples: {', '.join(f'{x:.0%}' for x in options.fill)}.")
    return said


def measure_case(
    report: Report,
    options: Options,
    stack: Stack,
    video: Video,
    dtype: torch.dtype,
    clock: Clock,
    seconds: float,
) -> None:
    """One video at one dtype: all routes in rounds, then where the time went."""
    where = f"{video} {dtype_name(dtype)}"
    stack.show(video, options.batch, options.fill)
    tokens = options.arch.call.tokens(video.width, video.height, video.frames)
    usable = _usable(report, options, tokens, dtype, where)
    calls: dict[str, Callable[[], object]] = {r.name: _step(stack, r) for r in usable}
    if options.yardstick:
        calls[YARDSTICK] = yardstick(options.device)
    with torch.inference_mode():
        found = interleave(calls, clock, seconds=seconds, rounds=options.rounds)
        report.skipped += [(where, name, reason) for name, reason in found.skipped.items()]
        calls.clear()  # the yardstick's memory counts for no backend
        base = 0.0
        for route in usable:
            times = found.times.get(route.name)
            if times is None:
                continue
            row = _row(options, video, tokens, dtype, route, times)
            base = base or row["p50_ms"]
            row["speedup"] = base / row["p50_ms"]
            _add_split(row, options, stack, route, clock)
            row["samples_ms"] = list(times)
            if options.yardstick:
                row["yardstick"], row["yardstick_ms"] = _yardstick_of(route, found.times)
            report.rows.append(row)


def yardstick(device: torch.device) -> Callable[[], object]:
    """A fixed piece of work that no build of ours changes: what the machine can do just now."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _yardstick_of(route: Route, times: dict[str, list[float]]) -> tuple[str, list[float]]:
    """What no build of ours changes: the model's own step of the same round, which feels the
    machine's weather as this route's step does; the matrix product for that step itself."""
    name = STOCK if route.name != STOCK and STOCK in times else YARDSTICK
    return name, list(times.get(name, []))


def _usable(
    report: Report, options: Options, tokens: int, dtype: torch.dtype, where: str
) -> list[Route]:
    call = options.arch.call
    heads = (call.num_heads, call.num_heads)
    sizes = (options.batch, tokens, tokens, *heads, call.head_dim)
    has_k_lens = options.fill != (1.0,)
    request = Request.of(Workload("", "", *sizes), dtype, options.device, has_k_lens=has_k_lens)
    usable = []
    for route in routes(options.device):
        if options.wanted is not None and route.name not in options.wanted:
            continue
        reason = _why_no_stock(options) if route.name == STOCK else route.why_not(request)
        if reason is None:
            usable.append(route)
        else:
            report.skipped.append((where, route.name, " ".join(reason.split())))
    return usable


def _why_no_stock(options: Options) -> str | None:
    if options.wan22 is None:
        return None if options.fill == (1.0,) else "diffusers' own attention knows no real lengths"
    packages = ("flash_attn", "flash_attn_interface")
    if not any(map(importlib.util.find_spec, packages)):
        return "Wan2.2's own attention needs flash_attn, which is not installed"
    return None


def _step(stack: Stack, route: Route) -> Callable[[], None]:
    def step() -> None:
        stack.use(route.attend, rope=route.rope)
        for _ in range(FORWARDS):
            stack.forward()

    return step


def _row(
    options: Options,
    video: Video,
    tokens: int,
    dtype: torch.dtype,
    route: Route,
    times: list[float],
) -> dict[str, Any]:
    timing = summary(times)
    return {
        "model": options.arch.call.name + ("-reduced" if options.is_reduced else ""),
        "video": str(video),
        "width": video.width,
        "height": video.height,
        "frames": video.frames,
        "tokens": tokens,
        "batch": options.batch,
        "layers": options.layers,
        "dtype": dtype_name(dtype),
        "backend": route.name,
        "iters": timing.iters,
        "avg_ms": timing.avg_ms,
        "p50_ms": timing.p50_ms,
        "p90_ms": timing.p90_ms,
        "it_per_s": 1e3 / timing.avg_ms,
    }


def _add_split(
    row: dict[str, Any], options: Options, stack: Stack, route: Route, clock: Clock
) -> None:
    device = options.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parts = split(stack, route, clock)
    is_cuda = device.type == "cuda"
    row["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if is_cuda else None
    row["attention"] = parts["attention"] / parts["step"]
    row["blocks"] = parts["blocks"] / parts["step"]
    row["full_step_s"] = row["video_min"] = None
    if not options.is_reduced:
        more = options.arch.call.layers / options.layers - 1
        row["full_step_s"] = row["p50_ms"] * (1 + row["blocks"] * more) / 1e3
        row["video_min"] = row["full_step_s"] * options.arch.steps / 60


class _MarkSdpa(TorchFunctionMode):
    """Marks around PyTorch's SDPA, for the model's own attention."""

    def __init__(self, clock: Clock, marks: list[Any]) -> None:
        super().__init__()
        self.clock, self.marks = clock, marks

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not SDPA:
            return func(*args, **(kwargs or {}))
        begun = self.clock.begin()
        out = func(*args, **(kwargs or {}))
        self.marks.append(self.clock.end(begun))
        return out


def split(stack: Stack, route: Route, clock: Clock) -> dict[str, float]:
    """Milliseconds of one step: in all, in the blocks, and in attention."""
    blocks: list[Any] = []
    calls: list[Any] = []
    open_blocks: list[Any] = []
    attend = route.attend

    def marked(query: Tensor, key: Tensor, value: Tensor, k_lens: Tensor | None) -> Tensor:
        assert attend is not None
        begun = clock.begin()
        out = attend(query, key, value, k_lens)
        calls.append(clock.end(begun))
        return out

    def block_begins(*_: Any) -> None:
        open_blocks.append(clock.begin())

    def block_ends(*_: Any) -> None:
        blocks.append(clock.end(open_blocks.pop()))

    with ExitStack() as cleanup:
        for block in stack.blocks:
            for handle in (
                block.register_forward_pre_hook(block_begins),
                block.register_forward_hook(block_ends),
            ):
                cleanup.callback(handle.remove)
        if attend is None:
            cleanup.enter_context(_MarkSdpa(clock, calls))
        stack.use(None if attend is None else marked, rope=route.rope)
        begun = clock.begin()
        for _ in range(FORWARDS):
            stack.forward()
        whole = clock.end(begun)
        clock.wait()
    return {
        "step": clock.read(whole),
        "blocks": sum(map(clock.read, blocks)),
        "attention": sum(map(clock.read, calls)),
    }
