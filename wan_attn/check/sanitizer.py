# SPDX-License-Identifier: Apache-2.0
"""sanitizer.py - what NVIDIA's compute-sanitizer says of every row, where it is installed."""

from __future__ import annotations

import shutil
import subprocess

import torch

from wan_attn import config
from wan_attn.check.calls import Detail, WrongError, lens_tensor
from wan_attn.check.run import make_command
from wan_attn.check.target import Kernel, Target

TOOLS = ("memcheck", "racecheck")
SECONDS = 120.0
ERROR_CODE = 9  # which it ends with if it has found something


def find() -> str | None:
    """compute-sanitizer on the PATH, or in a toolkit's usual place."""
    homes = [*config.cuda_homes(), "/usr/local/cuda"]
    places = [f"{home}/{part}" for home in homes for part in ("bin", "compute-sanitizer")]
    for place in (None, *places):
        found = shutil.which("compute-sanitizer", path=place)
        if found:
            return found
    return None


def run_sanitizer(target: Target, kernel: None, tool: str) -> Detail:
    """Each row once on a small call, watched."""
    program = find()
    if program is None:
        return {"skipped": "compute-sanitizer is not installed"}
    words = [program, f"--tool={tool}", f"--error-exitcode={ERROR_CODE}"]
    chosen = [f"--rows={','.join(target.only)}", f"--without={','.join(target.without)}"]
    words += make_command(["--device", str(target.where), *chosen, "--touch"])
    try:
        answer = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"compute-sanitizer was not done within {SECONDS:.0f} s"}
    said = (answer.stdout + answer.stderr).strip().splitlines()
    tail = [line for line in said if line.startswith("=========")][-12:] or said[-6:]
    if answer.returncode != 0:
        raise WrongError(f"exit code {answer.returncode}: " + " / ".join(tail))
    return {"said": tail[-1] if tail else ""}


def touch(target: Target) -> None:
    """What the sanitizer watches: one call of every kernel."""
    for kernel in target.kernels():
        if kernel.name not in target.without:
            _touch(target, kernel)
    target.synchronize()


def _touch(target: Target, kernel: Kernel) -> None:
    head_dim = kernel.head_dim_near(128)
    query, key, value = (
        torch.randn(1, n, 1, head_dim, device=target.device).to(kernel.dtype)
        for n in (130, 197, 197)
    )
    target.run(kernel.row, (query, key, value), None, lens_tensor([150]))
