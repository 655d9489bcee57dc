# SPDX-License-Identifier: Apache-2.0
"""test_emu_bugs.py - plants a bug in a kernel's source and demands that the emulator finds it.

A test of the tests: each bug is one that was made, or could be made tomorrow, and must be
found whatever the schedule. Those that leave every result right (a missing swizzle, a race that
happens to go well) are found by what the emulator watches besides results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import planted
from emu import cases
from emu.build import compiler
from emu.rows import CSRC, Tile, tiles
from emu.run import Schedule
from nightly import every

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

KERNEL, WORK, SOFTMAX, SWIZZLE, OUTPUT, MULTIPLY_PV, SCORES = (
    f"cuda/{name}.cuh"
    for name in (
        "sdpa_sm80",
        *("tile/work", "tile/softmax", "tile/swizzle", "tile/output", "tile/multiply_pv"),
        "tile/scores_16bit",
    )
)


@dataclass(frozen=True)
class Bug(planted.Bug):
    """The first failure must contain `finding`."""

    finding: str
    tile: str = "sdpa_sm80_f16_d64_slim"


BUGS = (
    Bug("K is not waited for", KERNEL, "cp_async_wait<0>();", "", "asynchronous copy is under way"),
    Bug(
        *(
            "K(n) and K(n - 1) may be under way",
            KERNEL,
            "cp_async_wait<0>();",
            "cp_async_wait<1>();",
        ),
        "asynchronous copy is under way",
    ),
    Bug(
        *(
            "V is not waited for",
            KERNEL,
            "cp_async_wait<STAGES - 1>();",
            "cp_async_wait<STAGES>();",
        ),
        "asynchronous copy is under way",
    ),
    Bug(
        *(
            "no barrier 1",
            KERNEL,
            "cp_async_wait<0>();\n    block_barrier();",
            "cp_async_wait<0>();",
        ),
        "line",
    ),
    Bug(
        *("no barrier 2", KERNEL, "<STAGES - 1>();\n    block_barrier();", "<STAGES - 1>();"),
        "line",
    ),
    Bug(
        *("one warp skips a barrier", KERNEL, "<STAGES - 1>();\n    block_barrier();"),
        "<STAGES - 1>();\n    if (thread_index() >= 32)\n        block_barrier();",
        "",
    ),
    Bug(
        *("one K buffer for two tiles", KERNEL, "(u32)turn % STAGES * K_TILE_BYTES", "0u"),
        "",
    ),
    Bug(
        *("K(n - 1) too early for one buffer", KERNEL, "if (STAGES == 2 && next >= 0)"),
        *("if (next >= 0)", ""),
        tile="sdpa_sm80_f16_d256_wide",
    ),
    Bug(
        *("a copy before the first tile", KERNEL, "if (STAGES == 2 && next >= 0)"),
        *("if (STAGES == 2)", ""),
    ),
    Bug("no swizzle", SWIZZLE, "(chunk ^ row / (8 / GROUP) % GROUP)", "chunk", "bank conflicts"),
    Bug(
        *("no swizzle, 80", SWIZZLE, "(chunk ^ row / (8 / GROUP) % GROUP)", "chunk"),
        *("bank conflicts", "sdpa_sm80_f16_d80_slim"),
    ),
    Bug(
        *("wrong swizzle on reading K", SCORES, "swizzled(i / 2 * 8 + r, i % 2)"),
        *("(i / 2 * 8 + r) * ROW_BYTES + i % 2 * 16", ""),
    ),
    Bug(
        "K and V halves swapped",
        KERNEL,
        "swizzled(i % 2 * 8 + r, i / 2)",
        "swizzled(i / 2 * 8 + r, i % 2)",
        "out is wrong",
    ),
    Bug(
        "the last key is masked",
        WORK,
        "args.window_size_right + 1, num_keys)",
        "args.window_size_right, num_keys)",
        "is wrong",
    ),
    Bug("a key too many", SOFTMAX, "8 * j + e >= end", "8 * j + e > end", ""),
    Bug(
        "wrong column in the mask",
        KERNEL,
        "BLOCK_N + thread_index() % 4 * 2",
        "BLOCK_N + thread_index() % 4",
        "",
    ),
    Bug(
        "a masked tile counts as clean",
        WORK,
        "larger_int(top.end, 0) / block_n;",
        "(larger_int(top.end, 0) + block_n - 1) / block_n;",
        "",
    ),
    Bug(
        "the window's first tile counts as clean",
        WORK,
        "(larger_int(bottom.begin, 0) + block_n - 1) / block_n;",
        "larger_int(bottom.begin, 0) / block_n;",
        "is wrong",
    ),
    Bug(
        "f16 sums are not added up",
        MULTIPLY_PV,
        "o[2 * r + 1] += high;",
        "o[2 * r + 1] = high;",
        "out is wrong",
        "sdpa_sm80_pv16_bf16_d128_slim",
    ),
    Bug(
        "V's scale is forgotten",
        KERNEL,
        "scale = load_global_f32(args.v_scale",
        "load_global_f32(args.v_scale",
        "out is wrong",
        "sdpa_sm80_pv16_bf16_d128_slim",
    ),
    Bug(
        *("K's scale is forgotten", SCORES, "scale_q_row(q.in_regs[m], r) * k_scale"),
        *("scale_q_row(q.in_regs[m], r)", "is wrong", "sdpa_sm75_bf16_d64_turing"),
    ),
    Bug(
        *("a row has the scale of the one beside it", SCORES, "q.scale[m][r] = larger"),
        *("q.scale[m][1 - r] = larger", "is wrong", "sdpa_sm75_bf16_d64_turing"),
    ),
    Bug(
        "a row is scaled by a quarter of it",
        SCORES,
        "lane_mask = 1; lane_mask < 4; lane_mask *= 2",
        "lane_mask = 1; lane_mask < 1; lane_mask *= 2",
        "is wrong",
        "sdpa_sm75_bf16_d64_turing",
    ),
    Bug("maximum of half a row", SOFTMAX, "return larger(x, shfl_xor(x, 2));", "return x;", ""),
    Bug(
        "maximum without the last column",
        SOFTMAX,
        "for (int j = 1; j < S_TILES; j++)\n        score",
        "for (int j = 1; j < S_TILES - 1; j++)\n        score",
        "",
    ),
    Bug("sum of half a row", SOFTMAX, "return x + shfl_xor(x, 2);", "return x;", "is wrong"),
    Bug("only one row's maximum rescales", SOFTMAX, " || new_max[1] > row_max[1]", "", ""),
    Bug("row_sum is not rescaled", SOFTMAX, "row_sum[r] *= factor;", "", "is wrong"),
    Bug("half of O is not rescaled", SOFTMAX, "o[j][2 * r + 1] *= factor;", "", "out is wrong"),
    Bug(
        "the bounds of the mask are not waited for",
        KERNEL,
        "store_bounds(work, first_block_of(args, place));\n",
        "\n",
        "",
    ),
    Bug(
        "rows without a key",
        KERNEL,
        "row_max[m][r] = lowest();",
        "row_max[m][r] = minus_infinity();",
        "",
    ),
    Bug("tails are not zeroed", SWIZZLE, "at >= rows ||", "false ||", ""),
    Bug("tails are cut a row early", SWIZZLE, "at >= rows ||", "at >= rows - 1 ||", "is wrong"),
    Bug(
        "padding rows of Q are read",
        SCORES,
        "(row < used_q ? row : place.row_begin)",
        "row",
        "global load outside the inputs",
    ),
    Bug(
        "padding rows of out keep garbage",
        WORK,
        "return row < used_q && larger_int(",
        "return larger_int(",
        "",
    ),
    Bug(
        *("rows beyond out are written", OUTPUT, "row < args.seqlen_q", "true"),
        "global store outside the outputs",
    ),
    Bug(
        "lanes do not swap",
        OUTPUT,
        "shfl_xor_bits(is_odd ? left : right, 1)",
        "shfl_xor_bits(is_odd ? right : left, 1)",
        "out is wrong",
    ),
    Bug(
        "wrong key head",
        KERNEL,
        "int head = place.head / args.heads_per_key_head;\n    i64",
        "int head = place.head % args.heads_per_key_head;\n    i64",
        "",
    ),
    Bug("lse in base 2", OUTPUT, "0.69314718f", "1.0f", "lse is wrong"),
    Bug(
        "a part too many",
        WORK,
        "end = first + args.split_tiles",
        "end = first + args.split_tiles + 1",
        "is wrong",
    ),
    Bug("an array too short", SOFTMAX, "O_TILES = HEAD_DIM / 8", "O_TILES = HEAD_DIM / 8 - 2", ""),
    Bug("P forgets a step", MULTIPLY_PV, "&p[2 * step + i / 2]", "&p[2 * step]", "out is wrong"),
    Bug(
        "Q fragments in the wrong place",
        "cuda/tile/q_fragments.cuh",
        "(u32)(thread_index() / 32) * (M_TILES * K_STEPS",
        "(u32)(thread_index() / 32) * (K_STEPS",
        "",
        tile="sdpa_sm80_f16_d80_wide",
    ),
)


def tile_of(name: str) -> Tile:
    return next(tile for tile in tiles() if tile.name == name)


def suspicious(tile: Tile) -> Iterator[cases.Case]:
    """A few cases that between them meet every bug of the list."""
    m, n = tile.block_m, tile.block_n
    yield cases.Case(m + 9, 2 * n + 5, 1, 4, 2)
    yield cases.Case(m, 3 * n + 5, window=(n, 3))
    yield cases.Case(m, 4 * n + 9, window=(n + 20, 40))
    yield cases.Case(m, n - 1, 2, q_lens=(m - 5, 3), k_lens=(n - 9, 0), is_causal=True)
    yield cases.Case(40, 3 * n - 1, values="rising", layout="surrounded", k_lens=(3 * n - 5,))
    yield cases.Case(9, 3 * n, split_tiles=2)
    yield cases.Case(1, n, batch=n, values="one hot each")


@pytest.mark.parametrize("bug", every(3, BUGS), ids=lambda bug: bug.name)
def test_the_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    csrc = bug.plant(CSRC, tmp_path)
    tile = tile_of(bug.tile)
    for landing in range(3):
        for seed in range(3):
            found = ""
            for case in suspicious(tile):
                try:
                    cases.check(replace(case, schedule=Schedule(landing, seed)), tile, csrc=csrc)
                except AssertionError as error:
                    found = str(error)
                    break
            assert found, f"not found with copies landing {landing}, seed {seed}"
            assert bug.finding in found
            print(found.partition("): ")[2])
