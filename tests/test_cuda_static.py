# SPDX-License-Identifier: Apache-2.0
"""test_cuda_static.py - what can be known of a CUDA kernel from its machine code, without a GPU.

Compiled with the toolkit's nvcc and with NVRTC from PyPI (12.8 makes the wheel's cubins, 13 is what
recent versions of torch bring): no spills, the right instructions in the right number, nothing else
of weight in the main loop.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emu import compile as compilers
from emu import sass
from emu.rows import Helper, Tile, gpus, half_rate, helpers, tiles, tiles_for
from nightly import unless

# The architectures that are looked at; the others of a class get the same code or nearly so.
ARCHS = (75, 80, 86, 89, 90, 120)
SMEM_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB a block
REGISTERS = 65536
SMEM_RESERVED = 1024  # for the system, a block, from sm_80 on
SMEM_OF_SM = {75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 120: 100}  # KiB

NVCC = "nvcc"
COMPILERS = [NVCC, *(f"nvrtc{major}.{minor}" for major, minor in sorted(compilers.nvrtcs()))]
ROWS = [(arch, tile) for arch in ARCHS for tile in tiles_for(arch)]
TILES = list(dict.fromkeys(tile for _, tile in ROWS))

needs_nvdisasm = pytest.mark.skipif(sass.nvdisasm() is None, reason="no nvdisasm")


def row_id(x: object) -> str:
    return x.name if isinstance(x, Tile) else str(x)


def compile_with(compiler: str, tile: compilers.Kernel, arch: int, output: Path) -> None:
    if compiler == NVCC:
        if compilers.nvcc() is None:
            pytest.skip("no nvcc on PATH")
        compilers.with_nvcc(tile, arch, output)
    else:
        major, minor = (int(n) for n in compiler.removeprefix("nvrtc").split("."))
        compilers.with_nvrtc(compilers.nvrtcs()[major, minor], tile, arch, output)


def expected(tile: Tile) -> dict[str, int]:
    """Instructions of one clean tile in one warp: fragments and elements, counted by hand."""
    m_tiles = tile.rows_per_warp // 16
    k_steps, v_steps = tile.head_dim // 16, tile.block_n // 16
    products = m_tiles * (k_steps * tile.block_n // 8 + v_steps * tile.head_dim // 8)
    weights = tile.rows_per_warp * tile.block_n // 32
    copies = 2 * tile.block_n * tile.head_dim * 2 // (16 * tile.num_threads)
    if tile.gpu_class == "TURING":
        own = {"HMMA.1688.F32": 2 * products, "LDG.E.128": copies, "STS.128": copies, "LDGSTS": 0}
        own["F2F"] = weights  # no instruction that rounds two at once
    else:
        own = {"HMMA.16816.F32": products // (2 if tile.pv_sum_f16 else 1)}
        own |= {"LDGSTS.E.BYPASS.128": copies, "LDGSTS": copies, "LDG": 0, "STS": 0, "F2F": 0}
    return own | {
        "HMMA.16816.F16": products // 2 if tile.pv_sum_f16 else 0,
        "HADD2.F32": v_steps // 2 * tile.rows_per_warp * tile.head_dim // 32
        if tile.pv_sum_f16
        else 0,
        "LDSM.16.M88.4": k_steps * tile.block_n // 16,
        "LDSM.16.MT88.4": v_steps * tile.head_dim // 16,
        "LDSM": k_steps * tile.block_n // 16 + v_steps * tile.head_dim // 16,
        "LDS.128": 0 if tile.q_in_regs else m_tiles * k_steps,
        "LDS": 0 if tile.q_in_regs else m_tiles * k_steps,
        "MUFU.EX2": weights + 2 * m_tiles,
        "MUFU": weights + 2 * m_tiles,
        "I2F": 0,
        "F2I": 0,
        "SHFL": 4 * m_tiles,
        "BAR": 2,
        "LDL": 0,
        "STL": 0,
    }


def parts(tile: Tile) -> int:
    """Sums of P V from zero in a tile; 0: O is the tensor cores' own sum (tile/multiply_pv.cuh)."""
    if tile.rows_per_warp > 16 or tile.head_dim + tile.block_n >= 288:
        return 0
    return tile.block_n // 32 if tile.pv_sum_f16 else 1


# Other instructions for each tensor core product. head_dim 128 is what Wan2.2 has and what these
# kernels are made for; the smaller head_dim, the fewer products share the same softmax.
MOST_OTHERS = {
    ("SLIM", 64): 4.4, ("SLIM", 80): 3.8, ("SLIM", 96): 3.3, ("SLIM", 128): 3.0, ("SLIM", 256): 2.8,
    ("TURING", 64): 3.0, ("TURING", 80): 2.5, ("TURING", 128): 2.0,
    ("WIDE", 64): 4.0, ("WIDE", 80): 3.2, ("WIDE", 96): 2.8, ("WIDE", 128): 2.4, ("WIDE", 256): 2.0,
}  # fmt: skip


def blocks_of_an_sm(arch: int, tile: Tile, registers: int) -> int:
    """That run together: registers are given out in eights, shared memory with what the system
    keeps. One more than planned would be a tile too small, one fewer leaves latency unhidden."""
    reserved = SMEM_RESERVED if arch >= 80 else 0
    by_registers = REGISTERS // (-(-registers // 8) * 8 * tile.num_threads)
    return min(by_registers, SMEM_OF_SM[arch] * 1024 // (tile.smem_bytes + reserved))


def is_short(compiler: str, arch: int, tile: Tile) -> bool:
    """NVRTC 12 makes the wheel's cubins; the others see each tile once, and each architecture."""
    archs = [one for one, other in ROWS if other == tile]
    return compiler.startswith("nvrtc12") or arch == archs[TILES.index(tile) % len(archs)]


@pytest.mark.parametrize(
    ("compiler", "arch", "tile"),
    unless(is_short, ((compiler, *row) for row in ROWS for compiler in COMPILERS)),
    ids=row_id,
)
@needs_nvdisasm
def test_the_machine_code_is_as_designed(
    compiler: str, arch: int, tile: Tile, tmp_path: Path
) -> None:
    cubin = tmp_path / "kernel.cubin"
    compile_with(compiler, tile, arch, cubin)
    kernel = sass.read(cubin)
    assert not sass.count(kernel.instructions, "LDL", "STL"), "registers were spilled"
    assert blocks_of_an_sm(arch, tile, sass.registers(cubin)) == tile.min_ctas
    loop = kernel.main_loop()
    found = {opcode: sass.count(loop, opcode) for opcode in expected(tile)}
    assert found == expected(tile)
    products = sass.count(loop, "HMMA")
    others = sum(sass.histogram(loop).values()) - products
    # Q comes in few trips to memory: all of it, or a quarter of a 16-row tile where it would not
    # fit the registers.
    k_steps, m_tiles = tile.head_dim // 16, tile.rows_per_warp // 16
    at_once = k_steps * m_tiles if tile.q_in_regs else 4 if k_steps % 4 == 0 else k_steps
    pairs = sass.loads_under_way(kernel.instructions, "LDG.E.CONSTANT")
    assert pairs >= 4 * at_once
    # Each sum of a part has to be added to O, element by element; those in f16 are converted, too.
    sums = parts(tile) * tile.rows_per_warp * tile.head_dim // 32
    weights = tile.rows_per_warp * tile.block_n // 32
    assert sums <= sass.count(loop, "FADD") - weights <= sums + 8 * m_tiles
    promotion = sums + sass.count(loop, "HADD2.F32")
    most = MOST_OTHERS[tile.gpu_class, tile.head_dim] * products + promotion
    assert others <= most, sass.histogram(loop)
    assert sass.count(loop, "IMAD.WIDE", "IADD3.X", "IMAD.X", "LEA.HI.X", "IADD.64") <= 16
    assert sass.count(loop, "FSETP") <= 2 * (tile.rows_per_warp // 16)


@pytest.mark.parametrize(("arch", "tile"), ROWS, ids=row_id)
def test_the_blocks_fit_the_sm(arch: int, tile: Tile) -> None:
    assert tile.smem_bytes <= SMEM_LIMIT[arch] * 1024
    reserved = SMEM_RESERVED if arch >= 80 else 0
    assert tile.min_ctas * (tile.smem_bytes + reserved) <= SMEM_OF_SM[arch] * 1024
    assert tile.min_ctas * tile.num_threads * tile.max_registers <= REGISTERS


def test_every_row_has_a_tile_for_every_class() -> None:
    rows = {tile.row for tile in tiles()}
    for row in rows:
        # f16 sums pay only where f32 ones run at half rate, and those cards are SLIM.
        wanted = {"SLIM"} if "_pv16_" in row else {"SLIM", "WIDE"}
        wanted = {"TURING"} if "_sm75_" in row else wanted
        assert {tile.gpu_class for tile in tiles() if tile.row == row} == wanted
    assert len({tile.name for tile in tiles()}) == len(tiles())


def test_cards_of_half_rate_have_rows_for_it() -> None:
    assert half_rate()
    for arch, words in half_rate():
        assert arch in gpus() and words
        assert any(tile.pv_sum_f16 for tile in tiles_for(arch)), arch


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("helper", helpers().values(), ids=lambda helper: helper.name)
@needs_nvdisasm
def test_the_helpers_compile_everywhere(helper: Helper, compiler: str, tmp_path: Path) -> None:
    for arch in (ARCHS[0], ARCHS[-1]):
        cubin = tmp_path / f"{arch}.cubin"
        compile_with(compiler, helper, arch, cubin)
        assert not sass.count(sass.read(cubin).instructions, "LDL", "STL")
