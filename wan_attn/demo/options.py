# SPDX-License-Identifier: Apache-2.0
"""options.py - what the demo was asked for, completed and checked before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

PACKAGES = {"diffusers": "diffusers", "transformers": "transformers", "PIL": "pillow"}
INSTALL = 'pip install "diffusers>=0.35" transformers accelerate ftfy imageio-ffmpeg'

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED_END = 2**63 - 1  # torch's generators take no more, and the demo uses seed + 1 too
PROMPT = "A paper lantern drifts over a lake at dusk, soft light, gentle ripples"


class DemoError(ValueError):
    """The demo cannot do what was asked; the message says why and what to do, in one line."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much to compute."""

    frames: int
    height: int
    width: int
    steps: int


# 25 x 224 x 400 is 2,450 tokens: enough that attention is most of a step, little enough that the
# portable C kernel does its run in well under a minute on two cores.
STANDARD = Size(frames=25, height=224, width=400, steps=6)
QUICK = Size(frames=9, height=96, width=160, steps=3)
REAL = Size(frames=33, height=480, width=832, steps=20)


@dataclass(frozen=True, slots=True)
class Options:
    """One demo, fully decided."""

    size: Size
    output: Path
    model: Path | None
    prompt: str
    seed: int
    dtype: torch.dtype
    device: torch.device
    is_quick: bool

    @property
    def title(self) -> str:
        """The weights, as the report calls them."""
        return "small random weights" if self.model is None else self.model.resolve().name

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def resolve(
    *,
    model: str | None,
    output: str,
    prompt: str | None,
    seed: int,
    dtype: str,
    device: str,
    is_quick: bool,
    frames: int | None,
    height: int | None,
    width: int | None,
    steps: int | None,
) -> Options:
    """Fill in what was left open and check everything; the output folder exists afterwards.

    Raises:
        DemoError: see its message.
    """
    require_packages()
    folder = None if model is None else check_model(Path(model))
    default = QUICK if is_quick else STANDARD if folder is None else REAL
    asked = {"frames": frames, "height": height, "width": width, "steps": steps}
    size = replace(default, **{name: value for name, value in asked.items() if value is not None})
    check_size(size, *grid(folder))
    if not 0 <= seed < SEED_END:
        raise DemoError(f"--seed must be 0 or more and below 2**63, got {seed}")
    target = pick_device(device)
    return Options(
        size=size,
        output=writable_folder(Path(output)),
        model=folder,
        prompt=PROMPT if prompt is None else " ".join(prompt.split()),
        seed=seed,
        dtype=pick_dtype(dtype, target),
        device=target,
        is_quick=is_quick,
    )


def require_packages() -> None:
    """Refuses if one of the demo's own packages is missing, and names it."""
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise DemoError(f"{package} is not installed; install what the demo needs: {INSTALL}")


def check_model(folder: Path) -> Path:
    """Checks that a folder has a text-to-video Wan pipeline in diffusers' format."""
    if not folder.is_dir():
        raise DemoError(f"--model must be a folder, got {folder}, which is none")
    index = folder / "model_index.json"
    if not index.is_file():
        raise DemoError(
            f"--model must be weights in diffusers' format, but {folder} has no model_index.json; "
            "for Wan-AI's original files set WAN22_DIR and pass --ckpt-dir"
        )
    name = _read_json(index).get("_class_name")
    if name != "WanPipeline":
        raise DemoError(
            f"--model must hold a WanPipeline (text to video), got {name} in {folder}; "
            "take for example Wan2.2-TI2V-5B-Diffusers"
        )
    return folder


def grid(folder: Path | None) -> tuple[int, int]:
    """(frames per latent frame, pixels per token and side) of the model."""
    if folder is None:
        return 4, 16
    vae = _read_json(folder / "vae" / "config.json")
    transformer = _read_json(folder / "transformer" / "config.json")
    patch = transformer.get("patch_size", (1, 2, 2))
    return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8) * patch[1]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DemoError(f"--model: cannot read {path}: {error}; download it again") from error
    return content if isinstance(content, dict) else {}


def check_size(size: Size, stride_time: int, cell: int) -> None:
    """Refuse what the pipeline would round: the report must be about what was asked."""
    if size.frames < 1 or (size.frames - 1) % stride_time:
        below = max(0, size.frames - 1) // stride_time * stride_time + 1
        raise DemoError(
            f"--frames must be {stride_time}n + 1, got {size.frames}; "
            f"take {below} or {below + stride_time}"
        )
    for name, value in (("height", size.height), ("width", size.width)):
        if value < cell or value % cell:
            below = max(cell, value // cell * cell)
            raise DemoError(
                f"--{name} must be a multiple of {cell}, got {value}; "
                f"take {below} or {below + cell}"
            )
    if size.steps < 1:
        raise DemoError(f"--steps must be 1 or more, got {size.steps}")


def pick_device(name: str) -> torch.device:
    """auto: the GPU if torch can use one."""
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise DemoError(f"--device must be auto, cpu, cuda or cuda:N, got {name}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DemoError(
            f"--device {name} does not exist: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs; try --device cpu; `wan-attn doctor` says why"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: on a GPU what Wan runs in, or float16 where it has no bfloat16; float32 on a CPU."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        is_ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if is_ampere else torch.float16
    if name not in DTYPES:
        raise DemoError(f"--dtype must be one of auto, {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def writable_folder(folder: Path) -> Path:
    """Makes the folder, and tries now, not after the last step, whether it takes files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise DemoError(
            f"--output {folder} cannot be written ({reason}); pass another folder"
        ) from error
    return folder
