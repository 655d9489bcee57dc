# SPDX-License-Identifier: Apache-2.0
"""test_cuda_static_listed.py - the machine code of kernels that take lists of blocks: what their
main loop has beside that of the dense row, which is compiled beside it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emu import compile as compilers
from emu import sass
from emu.rows import Tile, TileListed, dense_of, helpers, tiles_listed, tiles_listed_for
from nightly import unless
from test_cuda_static import (
    ARCHS,
    COMPILERS,
    blocks_of_an_sm,
    compile_with,
    expected,
    needs_nvdisasm,
)

ROWS = [(arch, tile) for arch in ARCHS for tile in tiles_listed_for(arch)]
# Instructions that the walk adds to a tile: the next one's number, where its K and V are, and with
# two lists whether the warp's own has it. Turing has no redux: five shuffles, and what they order.
# A call without a skip_threshold tests that there is none.
MOST_MORE = {"SLIM": 40, "WIDE": 55, "TURING": 75}


def row_id(x: object) -> str:
    return x.name if isinstance(x, Tile) else str(x)


def is_short(compiler: str, arch: int, tile: TileListed) -> bool:
    return compiler.startswith("nvrtc12") and tile.dtype == "BF16" and arch != 89


@pytest.mark.parametrize(
    ("compiler", "arch", "tile"),
    unless(is_short, ((compiler, *row) for row in ROWS for compiler in COMPILERS)),
    ids=row_id,
)
@needs_nvdisasm
def test_the_main_loop_is_that_of_the_dense_row(
    compiler: str, arch: int, tile: TileListed, tmp_path: Path
) -> None:
    dense, loops, ways = dense_of(tile), [], []
    exponentials = tile.block_m // tile.num_warps * tile.block_n // 32
    for kernel in (tile, dense):
        cubin = tmp_path / f"{kernel.symbol}.cubin"
        compile_with(compiler, kernel, arch, cubin)
        read = sass.read(cubin)
        loops.append(read.main_loop())
        ways.append(read.usual_way(exponentials))
        assert not sass.count(read.instructions, "LDL", "STL"), "registers were spilled"
        assert blocks_of_an_sm(arch, kernel, sass.registers(cubin)) == kernel.min_ctas
    # What a skip_threshold leaves out is weighed in the same loop, on a way of its own.
    weighed = sass.count(loops[0], "MUFU") - sass.count(loops[1], "MUFU")
    assert weighed == exponentials
    for opcode in expected(dense).keys() - {"SHFL"}:
        assert sass.count(ways[0], opcode) == sass.count(ways[1], opcode), opcode
    # Turing's copies pass through registers: K's must not wait until V's are there.
    loads = [sass.loads_under_way(loop, "LDG.E.128") for loop in loops]
    assert loads[0] == loads[1]
    assert 0 < len(ways[0]) - len(ways[1]) <= MOST_MORE[tile.gpu_class]
    of_walk = {"REDUX": 0, "SHFL": 5} if tile.gpu_class == "TURING" else {"REDUX": 1, "SHFL": 0}
    for opcode, number in of_walk.items():
        assert sass.count(ways[0], opcode) == sass.count(ways[1], opcode) + number


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", ("wan_attn_pool", "wan_attn_find_nonfinite"))
@needs_nvdisasm
def test_a_pass_over_blocks(name: str, compiler: str, tmp_path: Path) -> None:
    """A warp has several loads under way, stores at one place and waits for no other warp."""
    for arch in (ARCHS[0], 80, ARCHS[-1]):
        cubin = tmp_path / f"{arch}.cubin"
        compile_with(compiler, helpers()[name], arch, cubin)
        read = sass.read(cubin)
        assert sass.count(read.instructions, "STG") == 1
        assert not sass.count(read.instructions, "ATOM", "ATOMG", "RED", "REDG", "BAR")
        assert max(sass.count(loop, "LDG") for loop in read.loops) >= 8


def test_every_row_has_a_tile_for_every_class() -> None:
    for row in {tile.row for tile in tiles_listed()}:
        wanted = {"SLIM"} if "_pv16_" in row else {"SLIM", "WIDE"}
        wanted = {"TURING"} if "_sm75_" in row else wanted
        assert {tile.gpu_class for tile in tiles_listed() if tile.row == row} == wanted
    assert compilers.nvrtcs()
