# SPDX-License-Identifier: Apache-2.0
"""rows.py - the kernels of sdpa_rows.def as the package reads them, and what the emulator adds."""

from __future__ import annotations

from wan_attn.cuda import sources
from wan_attn.cuda.rows import Helper, Job, Tile, gpus, half_rate, helpers, tiles, tiles_for

__all__ = [
    "CSRC",
    "Helper",
    "Job",
    "Tile",
    "emulated_arch",
    "gpus",
    "half_rate",
    "helpers",
    "tiles",
    "tiles_for",
]

CSRC = sources.root()


def emulated_arch(kernel: Tile | Helper) -> int:
    """Whose instructions the emulator offers; all from sm_80 on are alike to these kernels."""
    return 75 if isinstance(kernel, Tile) and kernel.gpu_class == "TURING" else 80
