# SPDX-License-Identifier: Apache-2.0
"""wan22.py - the demo on Wan-AI's own files: Wan2.2's generate.py through `wan_attn run`."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_attn.demo.options import DemoError

# task -> (what the name of its weights' folder contains, the size if none is asked for)
TASKS = {"ti2v-5B": ("ti2v", "1280*704"), "t2v-A14B": ("t2v", "1280*720")}


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked of generate.py; None leaves its own default."""

    weights: Path
    task: str | None
    output: Path
    prompt: str | None
    seed: int
    frames: int | None
    height: int | None
    width: int | None
    steps: int | None


def command(asked: Asked, checkout: str | None) -> list[str]:
    """The command line to run.

    Raises:
        DemoError: something that generate.py would stumble over later, with a worse message.
    """
    if checkout is None:
        raise DemoError(
            "--ckpt-dir needs Wan2.2's own code: set WAN22_DIR to a checkout of "
            "https://github.com/Wan-Video/Wan2.2"
        )
    script = Path(checkout) / "generate.py"
    if not script.is_file():
        raise DemoError(
            f"WAN22_DIR must be a checkout of Wan2.2, but {checkout} has no generate.py"
        )
    if not asked.weights.is_dir():
        raise DemoError(f"--ckpt-dir must be a folder, got {asked.weights}, which is none")
    task = asked.task or _guess_task(asked.weights)
    if (asked.height is None) != (asked.width is None):
        raise DemoError("--height and --width must be given together, or neither")
    if asked.frames is not None and (asked.frames < 1 or asked.frames % 4 != 1):
        raise DemoError(f"--frames must be 4n + 1, got {asked.frames}")
    if not torch.cuda.is_available():
        raise DemoError(
            "stock Wan2.2 needs a GPU that torch can use, and there is none here (`wan-attn doctor`"
            " says why); without --ckpt-dir the demo runs anywhere"
        )
    size = TASKS[task][1] if asked.width is None else f"{asked.width}*{asked.height}"
    words = [sys.executable, "-m", "wan_attn", "run", str(script), "--task", task]
    words += ["--ckpt_dir", str(asked.weights), "--size", size, "--base_seed", str(asked.seed)]
    words += ["--save_file", str(asked.output / "video.mp4")]
    for option, value in (
        ("--prompt", asked.prompt),
        ("--frame_num", asked.frames),
        ("--sample_steps", asked.steps),
    ):
        if value is not None:
            words += [option, str(value)]
    return words


def _guess_task(weights: Path) -> str:
    name = weights.resolve().name.lower()
    for task, (part, _) in TASKS.items():
        if part in name:
            return task
    raise DemoError(
        f"the folder's name, {weights.name}, does not say which model it holds: pass --task"
        f" {' or '.join(TASKS)} (other tasks: python -m wan_attn run generate.py ...)"
    )


def run(words: list[str]) -> int:
    """Runs the command in this terminal; returns its exit code."""
    return subprocess.run(words, check=False).returncode


def report(words: list[str], exit_code: int, seconds: float) -> dict[str, object]:
    """The content of report.json; which attention ran is in the output, in wan_attn's log lines."""
    # Without the folders they lie in: people paste this into issues.
    shown = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return {
        "result": "done" if exit_code == 0 else "failed",
        "exit_code": exit_code,
        "command": shlex.join(shown),
        "seconds": round(seconds, 1),
    }
