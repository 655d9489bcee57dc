# SPDX-License-Identifier: Apache-2.0
"""test_cuda_static_qk8.py - the machine code of rows with 8-bit scores: no spills, the
products that they are named for, no conversion from integers, and a budget of instructions.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emu import compile as compilers
from emu import sass
from emu.rows import TileQk8, tiles_qk8, tiles_qk8_for
from nightly import unless
from test_cuda_static import COMPILERS, SMEM_OF_SM, SMEM_RESERVED, blocks_of_an_sm, compile_with

ARCHS = (75, 80, 86, 89, 120)
ROWS = [(arch, tile) for arch in ARCHS for tile in tiles_qk8_for(arch)]
STEPS_OF_INTEGERS = 32  # of head_dim, in one product

pytestmark = pytest.mark.skipif(sass.nvdisasm() is None, reason="no nvdisasm")


def expected(tile: TileQk8) -> dict[str, int]:
    """Instructions of one clean tile in one warp, counted by hand."""
    m_tiles, v_steps = tile.rows_per_warp // 16, tile.block_n // 16
    k_steps = tile.head_dim // STEPS_OF_INTEGERS
    integer = m_tiles * k_steps * tile.block_n // 8
    half = m_tiles * v_steps * tile.head_dim // 8
    weights = tile.rows_per_warp * tile.block_n // 32
    sums = tile.rows_per_warp * tile.head_dim // 32 if tile.pv_sum_f16 else 0
    of_v = tile.block_n * tile.head_dim * 2 // (16 * tile.num_threads)
    of_k = -(-tile.block_n * (tile.head_dim + 8) // 16 // tile.num_threads)
    is_turing = tile.gpu_class == "TURING"
    return {
        "IMMA.16832.S8.S8": 0 if is_turing else integer,
        "IMMA.8816.S8.S8": 4 * integer if is_turing else 0,
        "HMMA.1688.F32": 2 * half if is_turing else 0,
        "HMMA.16816.F16": half if tile.pv_sum_f16 else 0,
        "HMMA.16816.F32": 0 if is_turing or tile.pv_sum_f16 else half,
        "LDSM.16.M88.4": k_steps * tile.block_n // 16,
        "LDSM.16.MT88.4": v_steps * tile.head_dim // 16,
        "LDGSTS.E.BYPASS.128": 0 if is_turing else of_v + of_k,
        "LDG.E.128": of_v + of_k if is_turing else 0,
        "STS.128": of_v + of_k if is_turing else 0,
        "MUFU.EX2": weights + 2 * m_tiles,
        "FFMA": weights,
        "HADD2.F32": sums,
        "SHFL": 4 * m_tiles,
        "BAR": 2,
        **dict.fromkeys(("I2F", "I2FP", "F2I", "LDL", "STL"), 0),
    }


# Of one warp for 64 keys: some per cent above what the compilers make of it now.
MOST = {
    ("SLIM", 64): 480,
    ("SLIM", 128): 665,
    ("WIDE", 64): 735,
    ("WIDE", 128): 930,
    ("TURING", 64): 565,
    ("TURING", 128): 785,
}


def row_id(x: object) -> str:
    return x.name if isinstance(x, TileQk8) else str(x)


def is_short(compiler: str, arch: int, tile: TileQk8) -> bool:
    return compiler.startswith("nvrtc12") and tile.dtype == "BF16" and arch != 89


@pytest.mark.parametrize(
    ("compiler", "arch", "tile"),
    unless(is_short, ((compiler, *row) for row in ROWS for compiler in COMPILERS)),
    ids=row_id,
)
def test_the_machine_code_is_as_designed(
    compiler: str, arch: int, tile: TileQk8, tmp_path: Path
) -> None:
    cubin = tmp_path / "kernel.cubin"
    compile_with(compiler, tile, arch, cubin)
    kernel = sass.read(cubin)
    assert not sass.count(kernel.instructions, "LDL", "STL"), "registers were spilled"
    assert blocks_of_an_sm(arch, tile, sass.registers(cubin)) >= tile.min_ctas
    loop = kernel.main_loop()
    assert {opcode: sass.count(loop, opcode) for opcode in expected(tile)} == expected(tile)
    # Steps of keys, and Q where it waits in shared memory.
    of_q = 0 if tile.q_in_regs else tile.rows_per_warp // 16 * tile.head_dim // STEPS_OF_INTEGERS
    steps = sass.count(loop, "LDS.128", "LDS.U.128")
    assert steps == tile.block_n // 16 + of_q == sass.count(loop, "LDS")
    assert sum(sass.histogram(loop).values()) <= MOST[tile.gpu_class, tile.head_dim]
    assert sass.count(loop, "IMAD.WIDE", "IADD3.X", "IMAD.X", "LEA.HI.X", "IADD.64") <= 16


@pytest.mark.parametrize(("arch", "tile"), ROWS, ids=row_id)
def test_the_blocks_fit_the_sm(arch: int, tile: TileQk8) -> None:
    reserved = SMEM_RESERVED if arch >= 80 else 0
    assert tile.min_ctas * (tile.smem_bytes + reserved) <= SMEM_OF_SM[arch] * 1024


def test_every_row_has_a_tile_for_every_class_but_hopper() -> None:
    for row in {tile.row for tile in tiles_qk8()}:
        wanted = {"TURING"} if "_sm75_" in row else {"SLIM", "WIDE"}
        assert {tile.gpu_class for tile in tiles_qk8() if tile.row == row} == wanted
    assert tiles_qk8_for(90) == () and compilers.nvrtcs()
