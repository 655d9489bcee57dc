# SPDX-License-Identifier: Apache-2.0
"""test_cuda_static_listed_qk8.py - the machine code of rows of 8-bit scores that take lists of
blocks: what their main loop has beside that of the dense row, which is compiled beside it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emu import compile as compilers
from emu import sass
from emu.rows import Tile, TileListedQk8, dense_of, tiles_listed_qk8, tiles_listed_qk8_for
from nightly import unless
from test_cuda_static import (
    ARCHS,
    COMPILERS,
    SMEM_OF_SM,
    SMEM_RESERVED,
    blocks_of_an_sm,
    compile_with,
    needs_nvdisasm,
)
from test_cuda_static_qk8 import expected

ROWS = [(arch, tile) for arch in ARCHS for tile in tiles_listed_qk8_for(arch)]
# Instructions that the walk adds to a tile, as in test_cuda_static_listed.py.
MOST_MORE = {"SLIM": 25, "WIDE": 40, "TURING": 60}


def row_id(x: object) -> str:
    return x.name if isinstance(x, Tile) else str(x)


def is_short(compiler: str, arch: int, tile: TileListedQk8) -> bool:
    return compiler.startswith("nvrtc12") and tile.dtype == "BF16" and arch != 89


@pytest.mark.parametrize(
    ("compiler", "arch", "tile"),
    unless(is_short, ((compiler, *row) for row in ROWS for compiler in COMPILERS)),
    ids=row_id,
)
@needs_nvdisasm
def test_the_main_loop_is_that_of_the_dense_row(
    compiler: str, arch: int, tile: TileListedQk8, tmp_path: Path
) -> None:
    dense, loops = dense_of(tile), []
    # Hopper runs no dense row of 8-bit scores, whose machine code would spill there.
    for kernel, target in ((tile, arch), (dense, 80 if arch == 90 else arch)):
        cubin = tmp_path / f"{kernel.symbol}.cubin"
        compile_with(compiler, kernel, target, cubin)
        read = sass.read(cubin)
        loops.append(read.main_loop())
        assert not sass.count(read.instructions, "LDL", "STL"), "registers were spilled"
        assert blocks_of_an_sm(target, kernel, sass.registers(cubin)) >= kernel.min_ctas
    # A warp that only keeps step has a way of its own, as in test_cuda_static_listed.py; not where
    # K has one buffer.
    ways = 1 if tile.gpu_class == "WIDE" and tile.stages == 2 else 0
    for opcode, number in expected(dense).items():
        if opcode != "SHFL":
            assert sass.count(loops[0], opcode) == number + ways * (opcode == "BAR"), opcode
    more = sum(sass.histogram(loops[0]).values()) - sum(sass.histogram(loops[1]).values())
    assert 0 < more <= MOST_MORE[tile.gpu_class], more
    of_walk = {"REDUX": 0, "SHFL": 5} if tile.gpu_class == "TURING" else {"REDUX": 1, "SHFL": 0}
    for opcode, number in of_walk.items():
        assert sass.count(loops[0], opcode) == sass.count(loops[1], opcode) + number


@pytest.mark.parametrize(("arch", "tile"), ROWS, ids=row_id)
def test_the_blocks_fit_the_sm(arch: int, tile: TileListedQk8) -> None:
    reserved = SMEM_RESERVED if arch >= 80 else 0
    assert tile.min_ctas * (tile.smem_bytes + reserved) <= SMEM_OF_SM[arch] * 1024


def test_every_row_has_a_tile_for_every_class() -> None:
    for row in {tile.row for tile in tiles_listed_qk8()}:
        wanted = {"TURING"} if "_sm75_" in row else {"SLIM", "WIDE"}
        assert {tile.gpu_class for tile in tiles_listed_qk8() if tile.row == row} == wanted
    assert compilers.nvrtcs()
