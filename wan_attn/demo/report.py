# SPDX-License-Identifier: Apache-2.0
"""report.py - what the demo found, as a dictionary (report.json); machine facts and the verdict."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wan_attn.demo.compare import Comparison, Difference
from wan_attn.demo.options import Options
from wan_attn.demo.probe import Probe, Recorder
from wan_attn.demo.runs import Run
from wan_attn.doctor.facts import cpu_name
from wan_attn.version import __version__

PACKAGES = ("diffusers", "transformers", "numpy", "pillow", "imageio-ffmpeg")


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that the demo reports."""

    options: Options
    stock: Run
    ours: Run
    layers: int
    recorder: Recorder
    probe: Probe
    comparisons: tuple[Comparison, ...]
    log: tuple[str, ...]  # what logger wan_attn said while its attention ran
    warnings: tuple[str, ...]  # those of them that a user should see
    seconds: float
    video: Path
    picture: Path
    amplification: float  # of the difference in the picture; 0: there is none

    @property
    def is_same(self) -> bool:
        """The verdict: rounding explains every difference."""
        return self.probe.is_ok and all(row.is_ok for row in self.comparisons)

    @property
    def speed_ratio(self) -> float:
        """Time of stock over time of wan_attn: above 1, wan_attn is faster."""
        return self.stock.median_step_seconds / self.ours.median_step_seconds

    @property
    def tokens(self) -> int:
        """The length of self-attention in tokens."""
        return self.recorder.largest[0].seqlen_q


def machine(device: torch.device) -> dict[str, Any]:
    """Names and versions; no paths, no user names: people paste this into issues."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "wan_attn": __version__,
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def as_dict(found: Findings) -> dict[str, Any]:
    """The content of report.json."""
    options = found.options
    return {
        "result": "same" if found.is_same else "different",
        "machine": machine(options.device),
        "model": {
            "pipeline": "diffusers WanPipeline",
            "weights": options.title,
            "seed": options.seed,
            "prompt": options.prompt,
            "attention_layers": found.layers,
        },
        "shape": {**asdict(options.size), "tokens": found.tokens},
        "dtype": options.dtype_name,
        "device": str(options.device),
        "attention_by": found.recorder.titles,
        "seconds": round(found.seconds, 1),
        "steps": {
            name: {"median_seconds": run.median_step_seconds, "seconds": list(run.step_seconds)}
            for name, run in (("stock", found.stock), ("wan_attn", found.ours))
        },
        "speed_ratio": found.speed_ratio,
        "attention_calls": _calls(found.recorder),
        "one_attention_call": _probe(found.probe),
        "differences": [
            {
                "name": row.name,
                "wan_attn": _pair(row.ours),
                "rounding_alone": _pair(row.rounding),
                "allowed": _pair(row.allowed),
                "ok": row.is_ok,
            }
            for row in found.comparisons
        ],
        "log": list(found.log),
        "files": {
            "video": found.video.name,
            "picture": found.picture.name,
            "picture_amplification": found.amplification,
        },
    }


def _calls(recorder: Recorder) -> list[dict[str, Any]]:
    return [
        {
            "shape": str(shape),
            "calls": count,
            "backend": recorder.chosen[shape].backend,
            "kernel": recorder.chosen[shape].kernel_name,
        }
        for shape, count in recorder.calls.items()
    ]


def _probe(probe: Probe) -> dict[str, Any]:
    return {
        "shape": str(probe.shape),
        "stock_seconds": probe.stock_seconds,
        "wan_attn_seconds": probe.our_seconds,
        "speed_ratio": probe.stock_seconds / probe.our_seconds,
        "stock_max_error": _number(probe.stock_error),
        "wan_attn_max_error": _number(probe.our_error),
        "allowed_max_error": _number(probe.allowed_error),
        "ok": probe.is_ok,
    }


def _pair(difference: Difference) -> dict[str, float | str]:
    return {"max": _number(difference.max), "rms": _number(difference.rms)}


def _number(value: float) -> float | str:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else str(value)
