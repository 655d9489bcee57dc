# SPDX-License-Identifier: Apache-2.0
"""tf32.py - allow TF32 for matmul and cuDNN on Ampere and newer, and put back what was there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

AMPERE = 8
"""Major compute capability of the first GPUs that have TF32."""


@dataclass(frozen=True, slots=True)
class Change:
    """One flag that was switched on, and what else its setter writes."""

    title: str
    backend: Any
    precision: str | None
    """``backend.fp32_precision`` before, where torch has it: the old flag cannot express "none"."""


def why_not() -> str | None:
    """Why TF32 stays as it is here; None where it may be allowed.

    Starts no CUDA context: where none exists yet the capability is not asked for. GPUs older than
    Ampere have no TF32 units and ignore the flags.
    """
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not torch.cuda.device_count():
        return "no CUDA device"
    if torch.cuda.is_initialized():
        majors = [torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count())]
        if max(majors) < AMPERE:
            return "no GPU here is Ampere or newer"
    return None


def allow() -> tuple[Change, ...]:
    """Switch on the flags that are off; return what ``restore`` needs."""
    done = []
    backends: tuple[tuple[str, Any], ...] = (
        ("matmul", torch.backends.cuda.matmul),
        ("cuDNN", torch.backends.cudnn),
    )
    for title, backend in backends:
        try:
            if backend.allow_tf32:
                continue
        except RuntimeError:
            continue  # set through torch's newer fp32_precision: the user has already chosen
        precision = getattr(backend, "fp32_precision", None)
        backend.allow_tf32 = True
        done.append(Change(title, backend, precision))
    return tuple(done)


def restore(changes: tuple[Change, ...]) -> None:
    """Undo ``allow``; a flag that was switched off since is left off."""
    for change in changes:
        try:
            if not change.backend.allow_tf32:
                continue
        except RuntimeError:
            continue  # changed since through fp32_precision: no longer ours
        change.backend.allow_tf32 = False
        if change.precision is not None:
            change.backend.fp32_precision = change.precision
