# SPDX-License-Identifier: Apache-2.0
"""flags.py - prints the macros with which kernel.cpp compiles: a line for each body of a kernel.

For clang-tidy, which reads csrc/cuda through kernel.cpp; of the tiles of a body, the first serves.
"""

from __future__ import annotations

from emu.build import definitions
from wan_attn.cuda.rows import (
    Helper,
    RopeKernel,
    Tile,
    TileBackward,
    TileSm90,
    helpers,
    rope_kernels,
    tiles,
    tiles_backward,
    tiles_sm90,
)

if __name__ == "__main__":
    kernels: list[Tile | TileBackward | TileSm90 | Helper | RopeKernel] = [
        *tiles(),
        *tiles_sm90(),
        *tiles_backward(),
        *helpers().values(),
        *rope_kernels().values(),
    ]
    for source in dict.fromkeys(kernel.source for kernel in kernels):
        first = next(kernel for kernel in kernels if kernel.source == source)
        print(*(f"-D{name}={value}" for name, value in definitions(first).items()))
