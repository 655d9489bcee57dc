# SPDX-License-Identifier: Apache-2.0
"""test_cuda_static_backward.py - the machine code of gradients: no spills, the products that they
are named for, no atomics, and a budget of instructions.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import backward_model, static_model
from emu import compile as compilers
from emu import sass
from emu.rows import CSRC, Helper, TileBackward, helpers, tiles_backward, tiles_backward_for
from nightly import unless
from test_cuda_static import (
    ARCHS,
    COMPILERS,
    REGISTERS,
    SMEM_LIMIT,
    SMEM_OF_SM,
    SMEM_RESERVED,
    compile_with,
)

ROWS = [(arch, tile) for arch in ARCHS for tile in tiles_backward_for(arch)]

needs_nvdisasm = pytest.mark.skipif(sass.nvdisasm() is None, reason="no nvdisasm")


def expected(tile: TileBackward) -> dict[str, int]:
    """Instructions of one clean tile in one warp, counted by hand."""
    m_tiles = tile.rows_per_warp // 16
    k_steps, n_steps = tile.head_dim // 16, tile.block_n // 16
    sums = 2 if tile.of_keys else 1  # G1, G2
    products = m_tiles * (2 * k_steps * tile.block_n // 8 + sums * n_steps * tile.head_dim // 8)
    weights = tile.rows_per_warp * tile.block_n // 32
    # One more, for the numbers of query rows, which the first warp alone makes.
    copies = 2 * tile.block_n * tile.head_dim * 2 // (16 * tile.num_threads) + tile.of_keys
    is_turing = tile.gpu_class == "TURING"
    own_loads = 2 * m_tiles * k_steps
    others = 2 * k_steps * tile.block_n // 16
    return {
        "HMMA.1688.F32": 2 * products if is_turing else 0,
        "HMMA.16816.F32": 0 if is_turing else products,
        "LDSM.16.M88.4": own_loads + others,
        "LDSM.16.MT88.4": sums * n_steps * tile.head_dim // 16,
        "LDGSTS.E.BYPASS.128": 0 if is_turing else copies,
        "LDG.E.128": copies if is_turing else 0,
        "STS.128": copies if is_turing else 0,
        "LDS": tile.of_keys * tile.block_n // 8,
        "MUFU.EX2": weights,
        "MUFU": weights,
        "BAR": 3 - tile.stages,
        **dict.fromkeys(("I2F", "F2I", "SHFL", "LDL", "STL", "ATOM", "ATOMG", "RED"), 0),
    }


# Other instructions for each tensor core product of 16x8x16: some per cent above what the compilers
# make of it now.
MOST_OTHERS = {
    ("SLIM", 64): 4.4,
    ("SLIM", 80): 2.9,
    ("SLIM", 128): 2.8,
    ("WIDE", 64): 3.4,
    ("WIDE", 80): 2.9,
    ("WIDE", 128): 2.2,
    ("TURING", 64): 4.0,
    ("TURING", 80): 3.0,
    ("TURING", 128): 3.2,
}


def row_id(x: object) -> str:
    return x.name if isinstance(x, TileBackward) else str(x)


def is_short(compiler: str, arch: int, tile: TileBackward) -> bool:
    return compiler.startswith("nvrtc12") and tile.head_dim == 128 and arch in (75, 80, 120)


@pytest.mark.parametrize(
    ("compiler", "arch", "tile"),
    unless(is_short, ((compiler, *row) for row in ROWS for compiler in COMPILERS)),
    ids=row_id,
)
@needs_nvdisasm
def test_the_machine_code_is_as_designed(
    compiler: str, arch: int, tile: TileBackward, tmp_path: Path
) -> None:
    cubin = tmp_path / "kernel.cubin"
    compile_with(compiler, tile, arch, cubin)
    kernel = sass.read(cubin)
    assert not sass.count(kernel.instructions, "LDL", "STL"), "registers were spilled"
    assert not sass.count(kernel.instructions, "ATOM", "ATOMG", "ATOMS", "RED"), "not deterministic"
    loop = kernel.main_loop()
    assert {opcode: sass.count(loop, opcode) for opcode in expected(tile)} == expected(tile)
    products = sass.count(loop, "HMMA") // (2 if tile.gpu_class == "TURING" else 1)
    others = sum(sass.histogram(loop).values()) - sass.count(loop, "HMMA")
    assert others / products <= MOST_OTHERS[tile.gpu_class, tile.head_dim]
    registers = -(-sass.registers(cubin) // 8) * 8 * tile.num_threads
    assert tile.min_ctas * registers <= REGISTERS


@pytest.mark.parametrize(("arch", "tile"), ROWS, ids=row_id)
def test_the_blocks_fit_the_sm(arch: int, tile: TileBackward) -> None:
    reserved = SMEM_RESERVED if arch >= 80 else 0
    assert tile.smem_bytes <= SMEM_LIMIT[arch] * 1024
    assert tile.min_ctas * (tile.smem_bytes + reserved) <= SMEM_OF_SM[arch] * 1024


def test_every_row_has_both_kernels_for_every_class() -> None:
    for row in {tile.row for tile in tiles_backward()}:
        classes = {"TURING"} if "_sm75_" in row else {"SLIM", "WIDE"}
        mine = {(t.gpu_class, t.of_keys) for t in tiles_backward() if t.row == row}
        assert mine == {(name, of_keys) for name in classes for of_keys in (0, 1)}


@pytest.mark.skipif(compilers.nvcc() is None, reason="no nvcc")
def test_no_sum_of_floats_depends_on_an_order(tmp_path: Path) -> None:
    """No atomic, of any kind, in what compilers make of the sources: gradients have the same bits
    every time."""
    tiles = {tile.of_keys: tile for tile in tiles_backward() if tile.gpu_class == "SLIM"}
    kernels: list[TileBackward | Helper] = [*tiles.values(), helpers()["wan_attn_backward_rows"]]
    for kernel in kernels:
        ptx = tmp_path / "kernel.ptx"
        defines = [f"-D{name}={value}" for name, value in kernel.defines().items()]
        compilers.to_ptx(CSRC / kernel.source, 86, ptx, *defines)
        text = ptx.read_text()
        assert "mma.sync" in text or "rows" in kernel.source
        assert "atom." not in text and "red." not in text.replace("shared.", "")


@pytest.mark.parametrize(
    ("gpu", "head_dim"),
    unless(
        lambda gpu, head_dim: (gpu.arch, head_dim) == (86, 128),
        ((gpu, n) for gpu in static_model.GPUS for n in backward_model.HEAD_DIMS),
    ),
    ids=lambda x: getattr(x, "name", str(x)),
)
@pytest.mark.skipif(bool(static_model.what_is_missing()), reason="no compiler or no nvdisasm")
def test_the_models_table_is_what_it_says_now(gpu: static_model.Gpu, head_dim: int) -> None:
    """What one compiler makes of a kernel is not quite what another makes of it."""
    if compilers.nvcc() is None:
        pytest.skip("the table is nvcc's")
    both = backward_model.kernels(gpu, head_dim)
    assert backward_model.line(gpu, head_dim, both) in (CSRC / "cuda/README.md").read_text()
    for kernel in both:
        assert kernel.clocks("tensor") >= backward_model.LEAST_TENSOR * kernel.slowest
