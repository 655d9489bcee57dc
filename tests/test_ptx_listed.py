# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (each bug is a line of a table)
"""test_ptx_listed.py - every kernel that takes lists of blocks, run from the PTX that compilers make
of it: as test_ptx_rows.py does it with those without lists. The passes before are emulated here;
test_ptx_helpers.py runs theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from emu import cases_listed, cases_listed_qk8, cases_skip, run_listed, run_qk8
from emu.cases import Case
from emu.cases_skip import Skip
from emu.rows import CSRC, TileListed, TileListedQk8, tiles_listed, tiles_listed_qk8
from emu.run import Schedule
from nightly import every, unless
from planted import Bug
from ptx import collect, machine, matrix
from ptx.calls import kernel
from ptx.machine import Knobs
from ptx.parse import Refused
from test_emu_listed import is_short

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]

ARCH = {"TURING": 75, "WIDE": 80, "SLIM": 86}  # the first of each class
Listed = tuple[Case, float, str, bool]


COMPILERS = {one.name: one for one in collect.all_compilers()}
FIRST = next(iter(COMPILERS), "")  # NVRTC 12 is what ships


@dataclass(frozen=True)
class Made:
    """What kernels are made of, and by whom."""

    compiler: str = FIRST
    csrc: Path = CSRC


def program_of(tile: TileListed, made: Made) -> machine.Program:
    arch = ARCH[tile.gpu_class]
    job = next(job for job in collect.shipped() if job.kernel == tile and job.arch == arch)
    return kernel(job, COMPILERS[made.compiler], made.csrc)


def runner_of(tile: TileListed, knobs: Knobs, made: Made, of: Any = run_listed.run) -> Any:
    """As run_listed.run or run_qk8.run, on the machine."""

    def launcher(args: Any, grid: int, tensors: list[Any]) -> int:
        how: dict[str, Any] = {
            "shared_bytes": tile.smem_bytes,
            "threads": tile.num_threads,
            "knobs": knobs,
        }
        machine.launch(program_of(tile, made), args, grid, tensors, **how)
        return 0

    return partial(of, launcher=launcher)


def short(tile: TileListed) -> Iterator[Listed]:
    """Ragged, causal, windows, grouped heads, lengths, f32 queries; lists that name nothing, all
    or some, in each form, the broken ones too; with means and without."""
    m = tile.block_m
    yield Case(m + 1, 197), 0.5, "plain", False
    yield Case(m + 5, 261, is_causal=True), 0.4, "garbage", True
    yield Case(m + 3, 256, 1, 2, 1, window=(100, 70)), 0.6, "shuffled", True
    yield (
        Case(20, 68, 2, 4, 2, layout="surrounded", q_lens=(20, 7), k_lens=(65, 3)),
        0.9,
        "counts",
        False,
    )
    lens: dict[str, Any] = {"q_lens": (0, 9, m), "k_lens": (5, 0, 130), "lens_dtype": "int32"}
    yield Case(m, 139, 3, **lens, is_causal=True), 0.5, "roomy", True
    yield Case(17, 129, scale=-0.3, layout="fused"), 1.1, "strided", False
    yield Case(m, 64, values="one hot", return_lse=False), 0.0, "plain", False
    yield Case(18, 135, heads_q=2, heads_k=2, q_is_f32=True), 0.0, "plain", True
    yield Case(9, 2200), 0.8, "plain", False
    yield Case(m, 190, values="rising", k_lens=(0,)), 0.5, "counts", True


def check(tile: TileListed, number: int, listed: Listed, made: Made) -> None:
    """As matrix.check, which says why lse is not judged in some settings."""
    case, density, form, pools = listed
    knobs = replace(matrix.SETTINGS[number % len(matrix.SETTINGS)], seed=number)
    judged = case.return_lse and not knobs.sum_block and not knobs.ex2_error
    case = replace(case, schedule=Schedule(knobs.landing, number), return_lse=judged)
    runner = runner_of(tile, knobs, made)
    cases_listed.check(case, tile, density, form, pools, runner=runner)


def check_all(tile: TileListed, made: Made) -> None:
    for number, listed in enumerate(short(tile)):
        check(tile, number, listed, made)


def exact(number: int) -> Knobs:
    return replace(matrix.SETTINGS[number % 8], seed=number, sum_block=0, ex2_error=0)


def skipping(tile: TileListed) -> Iterator[tuple[Case, Skip]]:
    """A threshold alone, with lists, with means, where nothing and where all may be left out."""
    m = tile.block_m
    yield Case(m + 9, 450, values="normal"), Skip(0.05, sharpness=4.0)
    yield Case(m, 397, 2, 2, 1, k_lens=(397, 70), is_causal=True), Skip(0.01, 0.8, sharpness=8.0)
    yield Case(70, 333, window=(190, 90)), Skip(0.3, 0.5, "garbage", True, sharpness=8.0)
    yield Case(30, 333), Skip(1e-6)
    yield Case(30, 333, q_is_f32=True), Skip(1.0, sharpness=8.0, bad="value inf")


def check_skips(tile: TileListed, made: Made) -> int:
    """How many blocks of rows were left out."""
    found = 0
    for number, (case, skip) in enumerate(skipping(tile)):
        knobs = exact(number)
        case = replace(case, schedule=Schedule(knobs.landing, number))
        told = cases_skip.check(case, skip, tile, runner=runner_of(tile, knobs, made))
        found += told.left_out
    return found


def row_id(x: Any) -> str:
    return str(getattr(x, "name", x)).removeprefix("sdpa_")


@pytest.mark.parametrize(
    ("compiler", "tile"),
    unless(
        lambda compiler, tile: compiler == FIRST and is_short(tile),
        ((compiler, tile) for compiler in COMPILERS for tile in tiles_listed()),
    ),
    ids=row_id,
)
def test_calls_and_that_they_run_every_opcode(compiler: str, tile: TileListed) -> None:
    made = Made(compiler)
    check_all(tile, made)
    assert check_skips(tile, made) > 0
    assert not [name for name, times in program_of(tile, made).counts().items() if not times]


@pytest.mark.parametrize(
    ("compiler", "tile"),
    unless(
        lambda compiler, tile: compiler == FIRST and "bf16_d64_wide" in tile.name,
        ((compiler, tile) for compiler in COMPILERS for tile in tiles_listed_qk8()),
    ),
    ids=row_id,
)
def test_calls_with_scores_of_8_bits(compiler: str, tile: TileListedQk8) -> None:
    for number, (case, density, form, pools) in enumerate(short(tile)):
        if pools:  # these rows have no means
            continue
        knobs = exact(number)
        case = replace(case, schedule=Schedule(knobs.landing, number))
        runner = runner_of(tile, knobs, Made(compiler), of=run_qk8.run)
        cases_listed_qk8.check(case, tile, density, form, runner=runner)


@dataclass(frozen=True)
class PtxBug(Bug):
    """tile: the one that shows it."""

    tile: str = "sm80_listed_f16_d64_slim"


THREAD, MATH, MEMORY = (f"cuda/ptx/{name}.cuh" for name in ("thread", "math", "memory"))
# fmt: off
BUGS = (
    PtxBug("all lanes' tiles in one", THREAD, "redux.sync.max.s32", "redux.sync.or.b32"),
    PtxBug("a lane is not asked", THREAD, "redux.sync.max.s32 %0, %0, 0xffffffff", "redux.sync.max.s32 %0, %0, 0x7fffffff"),
    PtxBug("half of the lanes are asked", THREAD, "for (int lane_mask = 1; lane_mask < 32;", "for (int lane_mask = 1; lane_mask < 16;", "sm75_listed_bf16_d128_turing"),
    PtxBug("the second tile of a lane", MATH, 'asm("bfind.u32 %0, %1;"', 'asm("shr.u32 %0, %1, 1; bfind.u32 %0, %0;"'),
    PtxBug("all lanes must agree", THREAD, "vote.sync.any.pred", "vote.sync.all.pred"),
    PtxBug("pairs of lanes are those of quads", THREAD, '%2, 0x1f, 0xffffffff;"\n                 : "=r"(y)', '%2, 0x1c03, 0xffffffff;"\n                 : "=r"(y)'),
    PtxBug("rows behind the last are read", MEMORY, '"r"(is_zero ? 0 : 16)', '"r"(16)'),
)
# fmt: on


@pytest.mark.parametrize("bug", every(2, BUGS), ids=lambda bug: bug.name)
def test_a_planted_change_is_caught(bug: PtxBug, tmp_path: Path) -> None:
    csrc = bug.plant(CSRC, tmp_path)
    tile = next(tile for tile in tiles_listed() if tile.name == f"sdpa_{bug.tile}")
    with pytest.raises((AssertionError, Refused)):
        check_all(tile, Made(csrc=csrc))
