# SPDX-License-Identifier: Apache-2.0
"""suite.py - `bench suite`: one named setting over several lengths of video, for compare.py.

Everything is measured in blocks: all lengths and routes once through, model and inputs made anew,
then again. What differs between blocks of one file (memory that lies elsewhere, a machine that got
warm or busy) is what may differ between two files without any change of the code.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from wan_attn.bench import facts, progress, step
from wan_attn.bench.model import CPU_FRAMES, Video
from wan_attn.bench.report import Column, Report
from wan_attn.bench.timing import summary

BLOCKS = 3
DEFAULT_ROUNDS = 5  # of each block

COLUMNS = (
    Column("settings", "settings"),
    *(c for c in step.COLUMNS if c.key not in ("full_step_s", "video_min")),
)


@dataclass(frozen=True)
class Setting:
    """What `--settings NAME` stands for."""

    title: str
    model: str
    sizes: tuple[tuple[int, int], ...]
    layers: int = 2
    is_reduced: bool = False


SETTINGS = {
    "ti2v-5b-720p": Setting("TI2V-5B at its own size", "ti2v-5b", ((1280, 704),)),
    "ti2v-5b-published": Setting("TI2V-5B, the sizes people publish", "ti2v-5b", step.PUBLISHED),
    "a14b-480p": Setting("A14B, 832x480", "a14b", ((832, 480),)),
    "a14b-720p": Setting("A14B, 1280x720", "a14b", ((1280, 720),)),
    "cpu-small": Setting(
        "TI2V-5B's blocks with 4 heads, for a CPU", "ti2v-5b", ((448, 256),), is_reduced=True
    ),
}


def default_setting(device: torch.device) -> str:
    """Returns the name of the settings that suit this device."""
    return "ti2v-5b-720p" if device.type == "cuda" else "cpu-small"


def default_frames(device: torch.device) -> tuple[int, ...]:
    """Returns the lengths of video to take if none are named."""
    return (25, 49, 81) if device.type == "cuda" else (CPU_FRAMES, 13, 25)


def step_options(name: str, frames: tuple[int, ...], device: torch.device) -> step.Options:
    """Returns the step benchmark for a setting and its lengths.

    Raises:
        ValueError: no setting has this name, or no video of the model has so many frames.
    """
    setting = SETTINGS.get(name)
    if setting is None:
        raise ValueError(f"--settings must be one of {', '.join(SETTINGS)}; got {name!r}")
    arch, is_reduced = step.default_arch(setting.model, device, full=not setting.is_reduced)
    if setting.is_reduced and not is_reduced:
        raise ValueError(f"--settings {name} is for a CPU, got the device {device}")
    videos = tuple(Video(w, h, f) for f in frames for w, h in setting.sizes)
    for video in videos:
        arch.call.tokens(video.width, video.height, video.frames)
    return step.Options(
        device=device,
        arch=arch,
        layers=setting.layers,
        videos=videos,
        dtypes=(torch.bfloat16,),
        is_reduced=is_reduced,
        yardstick=True,
    )


def run(
    name: str,
    options: step.Options,
    blocks: int = BLOCKS,
    bar: progress.Progress | None = None,
) -> Report:
    """Measure `blocks` times; rows with the times of all blocks in order, and their lengths.

    Raises:
        ModelError: there is no model to run. RuntimeError: the device itself failed.
    """
    began, device = time.perf_counter(), options.device
    report = Report("suite", "", COLUMNS, environment=facts.environment(device))
    report.title = f"{SETTINGS[name].title}, on {facts.device_name(device)}"
    before = facts.state(device)
    rounds = options.rounds or DEFAULT_ROUNDS
    cases = [(v, d) for d in options.dtypes for v in options.videos]
    bar = bar or progress.make(blocks * len(cases))
    clock = options.clock()
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    title = ""
    for block in range(blocks):
        part = Report("suite", "", COLUMNS)
        for video, dtype in cases:
            bar.step(f"block {block + 1} of {blocks}, {video}")
            stack = step.make_stack(options, dtype)
            title = stack.title
            try:
                one = replace(options, rounds=rounds)
                step.measure_case(part, one, stack, video, dtype, clock, 0)
            finally:
                stack.close()
        for row in part.rows:
            _merge(rows, {"settings": name, **row})
        report.skipped += [entry for entry in part.skipped if entry not in report.skipped]
    bar.close()
    report.rows = [_finished(row) for row in rows.values()]
    _add_speedups(report.rows)
    after = facts.state(device)
    report.state = {"before": before.values, "after": after.values}
    report.note(step.notes(options, title))
    report.note([f"{blocks} blocks of {rounds} rounds; bench compare judges two such files."])
    report.note(facts.warnings_of(before, after, device))
    report.seconds = time.perf_counter() - began
    return report


KEYS = ("settings", "model", "video", "batch", "layers", "dtype", "backend", "yardstick")
"""The key that makes two rows the same measurement."""


def _merge(rows: dict[tuple[Any, ...], dict[str, Any]], row: dict[str, Any]) -> None:
    key = tuple(row[k] for k in KEYS)
    mine = rows.get(key)
    if mine is None:
        rows[key] = {**row, "block_rounds": [len(row["samples_ms"])]}
        return
    mine["samples_ms"] = mine["samples_ms"] + row["samples_ms"]
    mine["yardstick_ms"] = mine["yardstick_ms"] + row["yardstick_ms"]
    mine["block_rounds"] = [*mine["block_rounds"], len(row["samples_ms"])]


def _finished(row: dict[str, Any]) -> dict[str, Any]:
    timing = summary(row["samples_ms"])
    numbers = {"iters": timing.iters, "avg_ms": timing.avg_ms, "p50_ms": timing.p50_ms}
    return {**row, **numbers, "p90_ms": timing.p90_ms, "it_per_s": 1e3 / timing.avg_ms}


def _add_speedups(rows: list[dict[str, Any]]) -> None:
    base: dict[tuple[Any, ...], float] = {}
    for row in rows:
        case = tuple(row[k] for k in KEYS if k not in ("backend", "yardstick"))
        row["speedup"] = base.setdefault(case, row["p50_ms"]) / row["p50_ms"]
