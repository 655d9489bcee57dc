# SPDX-License-Identifier: Apache-2.0
"""test_cuda_static_sm90.py - what can be known of the Hopper kernels from their machine code.

As test_cuda_static.py. What goes wrong silently here: products cut into narrow ones, or serialised
by a compiler that sees a register touched (remarks C75xx), registers that are not handed over, a
memory barrier in the main loop.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from emu import compile as compilers
from emu import sass
from emu.rows_sm90 import ARCH, TileSm90, tile_for, tiles_sm90
from nightly import unless

NVCC = "nvcc"
COMPILERS = [NVCC, *(f"nvrtc{major}.{minor}" for major, minor in sorted(compilers.nvrtcs()))]
SMEM_LIMIT = 227 * 1024
REGISTERS = 65536
# Instructions of a warp for a tile, by head_dim and keys. FlashAttention-3's kernel has 594 for
# (128, 176).
MOST = {(64, 128): 430, (128, 128): 460, (128, 176): 600, (256, 80): 480}

each_tile = pytest.mark.parametrize("tile", tiles_sm90(), ids=lambda tile: tile.name)


def compiled(compiler: str, tile: TileSm90, cubin: Path) -> str:
    if compiler == NVCC:
        if compilers.nvcc() is None:
            pytest.skip("no nvcc on PATH")
        return compilers.with_nvcc(tile, ARCH, cubin)
    major, minor = (int(n) for n in compiler.removeprefix("nvrtc").split("."))
    return compilers.with_nvrtc(compilers.nvrtcs()[major, minor], tile, ARCH, cubin)


def products(code: tuple[sass.Instruction, ...]) -> Counter[str]:
    """Shape and where A comes from -> how many. P's A is in registers, V is transposed."""
    found: Counter[str] = Counter()
    for i in code:
        if shape := re.match(r"HGMMA\.(\w+)", i.opcode):
            first_operands = i.text.split(i.opcode)[1].split(",")
            kind = "ss" if "gdesc" in first_operands[1] else "rs"
            found[f"{kind} {shape[1]}{' tnspB' if 'tnspB' in i.text else ''}"] += 1
    return found


def expected_products(tile: TileSm90) -> Counter[str]:
    return Counter(
        {
            f"ss 64x{tile.block_n}x16": tile.head_dim // 16,
            f"rs 64x{tile.head_dim}x16 tnspB": tile.block_n // 16,
        }
    )


def largest_register(code: tuple[sass.Instruction, ...]) -> int:
    return max(int(n) for i in code for n in re.findall(r"\bR(\d+)\b", i.text))


def code_of_the_producer(kernel: sass.Kernel) -> tuple[sass.Instruction, ...]:
    """From where it gives registers back to the end that all threads share."""
    begin = next(n for n, i in enumerate(kernel.instructions) if "USETMAXREG.DEALLOC" in i.text)
    return kernel.reachable(begin, "UCGABAR_ARV", "EXIT")


# In short one dtype: the other one differs in the names of two instructions.
BUILDS = unless(
    lambda _, tile: tile.dtype == "BF16", [(c, tile) for c in COMPILERS for tile in tiles_sm90()]
)


@pytest.mark.parametrize(("compiler", "tile"), BUILDS, ids=lambda x: getattr(x, "name", x))
@pytest.mark.skipif(sass.nvdisasm() is None, reason="no nvdisasm")
def test_the_machine_code_is_as_designed(compiler: str, tile: TileSm90, tmp_path: Path) -> None:
    cubin = tmp_path / "kernel.cubin"
    remarks = compiled(compiler, tile, cubin)
    assert "Compiling entry function" in remarks, "ptxas must have said something"
    assert "(C75" not in remarks, remarks
    kernel = sass.read(cubin)
    whole, loop = kernel.instructions, kernel.main_loop()
    assert not sass.count(whole, "LDL", "STL"), "registers were spilled"
    launched = REGISTERS // tile.num_threads // 8 * 8
    # With fewer, the consumers would wait for registers that nobody gives back.
    assert sass.registers(cubin) == launched

    assert products(loop) == expected_products(tile)
    # First tile, masked tiles, clean tiles, last V: three of each.
    assert products(whole) == Counter({k: 3 * n for k, n in expected_products(tile).items()})
    weights, panels = tile.block_n // 2, tile.head_dim // 64
    found = {
        opcode: sass.count(loop, opcode)
        for opcode in ("MUFU.EX2", "MUFU", "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR", "SHFL")
    }
    assert found == {
        **{"MUFU.EX2": weights + 2, "MUFU": weights + 2, "SHFL": 4},
        **{"WARPGROUP.ARRIVE": 2, "WARPGROUP.DEPBAR": 2},
    }
    # The loop keeps the block's rank in the cluster out of V's descriptor (tile/ring.cuh).
    assert sum(bool(re.search(r"ULOP3.*\b0x3fff0?\b", i.text)) for i in loop) >= 1
    # One wait and one release for K and V, one turn; nothing that waits for all of memory.
    assert sass.count(loop, "SYNCS.PHASECHK") == 2
    assert sass.count(loop, "SYNCS.ARRIVE") == 2
    assert sass.count(loop, "BAR.SYNC") == sass.count(loop, "BAR.ARV") == 1
    assert not sass.count(loop, "MEMBAR", "CCTL", "LDS", "LDG", "STG", "LDSM")
    # All of the softmax runs beside P V: it lies between the waits for S and for O, where the store
    # that never happens holds it (ptx/wgmma.cuh: computed).
    waits = [at for at, i in enumerate(loop) if i.opcode.startswith("WARPGROUP.DEPBAR")]
    assert sass.count(loop[waits[0] : waits[1]], "MUFU.EX2") == weights + 2
    (store,) = (i for i in loop if sass.count((i,), "STS"))
    assert store.text.startswith("@") and store in loop[waits[0] : waits[1]]
    executed = sum(sass.histogram(loop).values())
    assert executed <= MOST[tile.head_dim, tile.block_n], sass.histogram(loop)

    # A relaxed meeting of the cluster at the start, none at the end.
    assert not sass.count(whole, "MEMBAR.ALL.GPU", "ERRBAR")
    assert sass.count(whole, "UCGABAR_ARV") == (tile.cluster > 1)
    multicast = sass.count(whole, "UTMALDG.4D.MULTICAST")
    assert sass.count(whole, "UTMALDG") - multicast >= panels if tile.cluster > 1 else not multicast
    assert (multicast > 0) == (tile.cluster > 1)
    assert sass.count(whole, "UTMASTG") >= 1
    text = "\n".join(i.text for i in whole)
    registers = [int(n, 16) for n in re.findall(r"USETMAXREG\S*\s.*?(0x[0-9a-f]+)", text)]
    assert sorted(registers) == [tile.regs_producer, tile.regs_consumer]

    assert largest_register(whole) < tile.regs_consumer
    assert largest_register(code_of_the_producer(kernel)) < tile.regs_producer


@each_tile
def test_the_block_fits_the_sm(tile: TileSm90) -> None:
    assert tile.smem_bytes <= SMEM_LIMIT
    assert 128 * (tile.regs_producer + tile.consumers * tile.regs_consumer) <= REGISTERS


def test_every_call_gets_an_instance() -> None:
    for dtype in ("bf16", "f16"):
        for head_dim in (64, 128, 256):
            row = f"sdpa_sm90_{dtype}_d{head_dim}"
            for seqlen_q in (1, 128, 129, 75600):
                for is_masked in (False, True):
                    tile = tile_for(row, is_masked=is_masked, seqlen_q=seqlen_q)
                    assert (tile.head_dim, tile.dtype) == (head_dim, dtype.upper())


def test_both_dtypes_have_the_same_instances() -> None:
    shapes = {
        dtype: [t.name.replace(f"_{dtype.lower()}_", "_") for t in tiles_sm90() if t.dtype == dtype]
        for dtype in ("BF16", "F16")
    }
    assert shapes["BF16"] == shapes["F16"]
    assert len({tile.name for tile in tiles_sm90()}) == len(tiles_sm90())
