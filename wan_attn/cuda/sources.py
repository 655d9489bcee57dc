# SPDX-License-Identifier: Apache-2.0
"""sources.py - the text of the CUDA kernels, which the package carries: csrc/cuda or a copy."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_INCLUDE = re.compile(rb'^\s*#\s*include\s+"(cuda/[^"]+)"', re.MULTILINE)


@cache
def root() -> Path:
    """The folder that holds cuda/: the package's own copy, or csrc/ of a checkout."""
    packaged = Path(__file__).with_name("src")
    return packaged if packaged.exists() else Path(__file__).parents[2] / "csrc"


@cache
def closure(source: str, folder: Path | None = None) -> dict[str, bytes]:
    """{name: text} of `source` ("cuda/x.cuh"), which comes first, and of all that it includes.

    What the emulator of tests/ puts behind the same door ("emu/...") is not part of a kernel.
    """
    where = root() if folder is None else folder
    found: dict[str, bytes] = {}
    names = [source]
    for name in names:  # grows as it is walked
        if name not in found:
            # As git has it: a checkout with other line ends is the same kernel.
            found[name] = (where / name).read_bytes().replace(b"\r\n", b"\n")
            names += [include.decode() for include in _INCLUDE.findall(found[name])]
    return found
