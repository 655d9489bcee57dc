# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (each bug is a line of a table)
"""test_emu_skip_bugs.py - plants a bug in what a skip_threshold leaves out, and demands that it is
found by the calls of test_emu_skip.py of which all is known.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from emu import cases_skip, checks_skip
from emu.build import compiler
from emu.cases import Case
from emu.cases_skip import Skip
from emu.planting import Bug, must_be_found, named
from emu.rows import TileListed, tiles_listed
from nightly import every

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

KERNEL, LOST, SOFTMAX, WALK, MEANS = (
    f"cuda/{name}.cuh"
    for name in ("sdpa_sm80", "tile/lost", "tile/softmax", "tile/walk_listed", "tile/means")
)
SLIM, WIDE = Bug.tile, "sdpa_sm80_listed_bf16_d64_wide"


# fmt: off
BUGS = (
    Bug("a row has no vote", LOST, "i < 2 * M_TILES; i++)\n        is_needed |=", "i < 2 * M_TILES - 1; i++)\n        is_needed |="),
    Bug("every lane decides for itself", LOST, "if (any_lane(is_needed))", "if (is_needed)"),
    Bug("the last column has no vote", LOST, "for (int j = 1; j < S_TILES; j++)\n        score = larger(", "for (int j = 1; j < S_TILES - 1; j++)\n        score = larger("),
    Bug("the maximum so far does not matter", LOST, "score, scale, -row_max) <", "score, scale, 0.0f) <"),
    Bug("the threshold is that of a score without its scale", LOST, "fused_multiply_add(score, scale, -row_max)", "fused_multiply_add(score, 1.0f, -row_max)"),
    Bug("what is above the threshold goes", LOST, "-row_max) < log2_threshold);", "-row_max) > log2_threshold);"),
    Bug("infinite values go as well", LOST, "bool is_needed = load_global_i32(listed_of(args).nonfinite + block) != 0;", "bool is_needed = false;"),
    Bug("the values of another head", LOST, "(u32)(place.head / args.heads_per_key_head);", "0;"),
    Bug("the values of a query head", LOST, "(u32)(place.head / args.heads_per_key_head);", "(u32)place.head;"),
    Bug("the values of another sample", LOST, "(u32)place.sample * heads +", ""),
    Bug("a ragged block is not counted", LOST, "head * (u32)blocks_of(args.seqlen_k);", "head * (u32)(args.seqlen_k / BLOCK_N);"),
    Bug("the values of the block before", KERNEL, "leave_out(args, n + (i64)", "leave_out(args, n - 1 + (i64)"),
    Bug("infinite scores go as well", LOST, "if (any_lane(!(all <", "if (any_lane(false && !(all <"),
    Bug("a score of minus infinity goes as well", LOST, " && all > minus_infinity())", ")"),
    Bug("what goes is multiplied all the same", KERNEL, "is_mine = !leave_out(args, n + (i64)load_bounds().first_block, q, s, rows.row_max);", "leave_out(args, n + (i64)load_bounds().first_block, q, s, rows.row_max);"),
    Bug("what goes is not counted", LOST, "lost[i / 2][i % 2] += weights", "weights"),
    Bug("what goes is counted once", LOST, "lost[i / 2][i % 2] += weights", "lost[i / 2][i % 2] = weights"),
    Bug("a lane counts its own keys", LOST, "weights[i / 2][i % 2] = quad_sum(sum);", "weights[i / 2][i % 2] = sum;"),
    Bug("weights without P_SHIFT", LOST, "float shift = P_SHIFT - row_max", "float shift = 0.0f - row_max"),
    Bug("weights of every second key", LOST, "j < 2 * S_TILES; j++", "j < 2 * S_TILES; j += 2"),
    Bug("what was lost stays as the maximum rises", LOST, "lost[m][r] * factor", "lost[m][r]"),
    Bug("it grows with the maximum", LOST, "lost[m][r] * factor", "lost[m][r] / factor"),
    Bug("the maximum rises in a mean, and nobody notices", KERNEL, "scale[m], m, skips(args));", "scale[m], m, skips(args) && kind != MEANS);"),
    Bug("it shrinks in the first 16 rows alone", SOFTMAX, "                shrink_lost(m, r, factor);", "                shrink_lost(0, r, factor);", WIDE),
    Bug("one of two rows shrinks", SOFTMAX, "if (has_lost)", "if (has_lost && r == 0)"),
    Bug("the share is of what is left", LOST, "quad_sum(row_sum[i / 2][i % 2]) + of_row", "quad_sum(row_sum[i / 2][i % 2])"),
    Bug("the share is of a lane's sum", LOST, "quad_sum(row_sum[i / 2][i % 2]) + of_row", "row_sum[i / 2][i % 2] + of_row"),
    Bug("the share is rounded down", LOST, "#define LOST_ROUNDING 1.001f", "#define LOST_ROUNDING 0.9999f"),
    Bug("a NaN is no share", LOST, "share = share < 1.0f ? share : 1.0f;", "share = share > 1.0f ? 1.0f : share;"),
    Bug("rows that are not there have lost all", LOST, "of_row > 0.0f && row_in_block(i / 2) + i % 2 * 8 < rows", "of_row > 0.0f"),
    Bug("a row's share counts if the next one is there", LOST, "row_in_block(i / 2) + i % 2 * 8 < rows", "row_in_block(i / 2) + i % 2 * 8 < rows - 1"),
    Bug("rows that are not there keep what they like", LOST, "row_in_block(i / 2) + i % 2 * 8 >= rows", "row_in_block(i / 2) + i % 2 * 8 >= 1 << 20", WIDE),
    Bug("the last row keeps nothing", LOST, "row_in_block(i / 2) + i % 2 * 8 >= rows", "row_in_block(i / 2) + i % 2 * 8 >= rows - 1"),
    Bug("lost begins as it lies there", LOST, "    store_lost(none);\n", "    (void)none;\n"),
    Bug("all lanes keep what is lost", LOST, "    if (keeps_lost())\n        store_shared", "    if (keeps_lost() || true)\n        store_shared"),
    Bug("all warps keep it in one place", LOST, "(u32)(thread_index_again() / 4) * 16", "(u32)(thread_index_again() % 32 / 4) * 16"),
    Bug("the guard gets the last share", LOST, "raise_global_u32(to, (u32)bits);", "store_global_b32(to, (u32)bits);"),
    Bug("the guard gets a lane's share", LOST, "largest_of_warp((int)bits_from_float(largest));", "(int)bits_from_float(largest);"),
    Bug("a tile that a mask cuts goes as well", KERNEL, "is_mine && kind == CLEAN && skips(args)", "is_mine && kind != MEANS && skips(args)"),
    Bug("no lists are empty ones", WALK, "named = bits_between(", "named = 0 & bits_between("),
    Bug("no lists are read", WALK, "        if (lists.counts) {", "        if (lists.counts || true) {"),
    Bug("no lists name what is in half of a lane's tiles", WALK, "smaller_int(range.end - from, PER_LANE)", "smaller_int(range.end - from, PER_LANE / 2)", WIDE),
    Bug("no lists name what is before the window", WALK, "bits_between(range.begin - from,", "bits_between(0,"),
    Bug("no lists are read for a row of -inf", MEANS, " || !lists.counts)", ")"),
)
# fmt: on


def check_all(tile: TileListed, **how: Any) -> None:
    for check in checks_skip.ALL:
        check(tile, **how)
    m = tile.block_m
    for case, skip in (
        (Case(m + 70, 1100, 1, 2, 1), Skip(sharpness=4.0, alike=0.95)),
        (Case(m + 9, 700, 2, 2, 2, window=(150, 90)), Skip(0.3, sharpness=4.0)),
        (Case(m, 590, 2, 2, 2, k_lens=(590, 70), is_causal=True), Skip(0.3, 0.8, sharpness=2.0)),
        (Case(m, 600, q_lens=(m - 5,)), Skip(0.3, 0.5, pools_others=True, sharpness=4.0)),
        (Case(20, 300), Skip(sharpness=4.0, bad="key -inf")),
    ):
        cases_skip.check(case, skip, tile, **how)


@pytest.mark.parametrize("bug", every(10, BUGS), ids=lambda bug: bug.name)
def test_the_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    must_be_found(bug, partial(check_all, named(tiles_listed(), bug.tile)), tmp_path)


def test_without_a_bug_nothing_is_found() -> None:
    for name in (SLIM, WIDE):
        check_all(named(tiles_listed(), name))
