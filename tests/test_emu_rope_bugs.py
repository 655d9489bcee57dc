# SPDX-License-Identifier: Apache-2.0
"""test_emu_rope_bugs.py - plants a bug in the kernels of rms_norm_rope, which must be found; see
test_emu_bugs.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import planted
from emu import cases_rope
from emu.build import compiler
from emu.rows import CSRC
from emu.run import Schedule
from emu.run_rope import run
from nightly import every

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

TOKEN, PAIR, VECTORS, ANY = (
    f"cuda/{name}.cuh" for name in ("tile/rope_token", "tile/float_pair", "rope", "rope_any")
)


@dataclass(frozen=True)
class Bug(planted.Bug):
    """The first failure must contain `finding`."""

    finding: str = ""


BUGS = (
    Bug("lines are as long as columns", TOKEN, "line = rest / width", "line = rest / height"),
    Bug("the first token behind is turned", TOKEN, "t < frames * plane", "t <= frames * plane"),
    Bug("the offset is forgotten", TOKEN, "(u32)args.seqlen_offset + ", ""),
    Bug("every sample has the first's grid", TOKEN, "args.grids[sample]", "args.grids[0]"),
    Bug("sizes of the wrong width", TOKEN, "args.grid_is_i64 ? load", "!args.grid_is_i64 ? load"),
    Bug("sizes are not clamped", TOKEN, "size < args.positions ? (int)size", "true ? (int)size"),
    Bug("axes share pairs out wrongly", TOKEN, "(u32)args.head_dim / 6", "(u32)args.head_dim / 5"),
    Bug("the line's angles from the column", TOKEN, "line_pairs ? token.line", "0 ? token.line"),
    Bug("angles without a gap", TOKEN, "(pair + pair / 8)", "(pair)", "bank conflicts"),
    Bug("half of the angles are missing", TOKEN, "pair += (u32)", "pair += 2 * (u32)", "nobody"),
    Bug(
        "rests of cos and sin swapped",
        TOKEN,
        "float_from_bits(words[2])",
        "float_from_bits(words[3])",
    ),
    Bug("turned the other way", TOKEN, "-(y[1] * by.sine.high)", "y[1] * by.sine.high"),
    Bug("a rest with the wrong sign", TOKEN, "-by.cosine.rest}", "by.cosine.rest}"),
    Bug(
        "eps is forgotten",
        TOKEN,
        "pair_sum(pair_product(sum, inverse_size), eps)",
        "pair_product(sum, inverse_size)",
    ),
    Bug("the first warp's sum alone", TOKEN, "thread < (u32)args.num_threads;", "thread < 32;"),
    Bug("half of the lanes", TOKEN, "lane_mask < lanes;", "lane_mask < lanes / 2;"),
    Bug(
        "sums of warps in one place",
        TOKEN,
        "SUMS_AT + thread / 2, words); /*",
        "SUMS_AT, words); /*",
        "shared",
    ),
    Bug("float32's row of a float64 table", TOKEN, "at * 8", "at * 4"),
    Bug("Newton steps too far", PAIR, "0.5f * y", "y"),
    Bug("angles are floats", PAIR, "(float)(x - (double)pair.high)", "0.0f", "not rounded once"),
    Bug(
        "what products lose is forgotten",
        PAIR,
        "rounded_sum(xc.rest, -ys.rest)",
        "0.0f",
        "not rounded once",
    ),
    Bug(
        "infinities become NaN",
        PAIR,
        "rest == rest ? rounded_sum(sum.high, rest) : sum.high",
        "rounded_sum(sum.high, rest)",
        "infinity",
    ),
    Bug(
        "threads without a head have one",
        VECTORS,
        "group < args.num_groups ? group : args.num_heads",
        "group",
    ),
    Bug(
        "a head too many",
        VECTORS,
        "args.num_groups < args.num_heads;",
        "args.num_groups <= args.num_heads;",
    ),
    Bug("slots of the wrong thread", VECTORS, "slot_factor >> 16", "slot_factor >> 17"),
    Bug("half a vector twice", VECTORS, "words[k] + 4, at + 16", "words[k] + 4, at"),
    Bug("a neighbour's bits", VECTORS, "words[n] & 0xffff0000u", "words[n]"),
    Bug("n is not rounded", VECTORS, "if (args.rounds_n)", "if (0)", "not rounded as stock"),
    Bug("y is not rounded", VECTORS, "if (args.rounds_y)", "if (0)", "not rounded as stock"),
    Bug(
        "the next head's weight",
        VECTORS,
        "args.num_groups * args.weight_head_stride",
        "args.weight_head_stride",
    ),
    Bug("no barrier", VECTORS, "block_barrier();", "", "shared"),
    Bug(
        "a norm of a head over the warp",
        VECTORS,
        "lanes_sum(sum[k], args.slots)",
        "lanes_sum(sum[k], 32)",
    ),
    Bug("half a vector is stored twice", VECTORS, "at + 16, words + 4", "at + 16, words"),
    Bug("any: a column too many", ANY, "2 * pair + 1 < args.head_dim ? 2 : 1", "2"),
    Bug("any: every second row of pairs", ANY, "first += 32", "first += 64"),
    Bug(
        "any: one head's squares",
        ANY,
        "from + head * args.x.head_stride);\n        stage",
        "from);\n        stage",
    ),
    Bug("any: no barrier", ANY, "block_barrier();", "", "shared"),
    Bug(
        "any: one table for all heads",
        TOKEN,
        "row + head * args.table.head_stride",
        "row + 0 * head",
    ),
    Bug(
        "any: float16 for bfloat16", ANY, "dtype == IS_F16 ? pack_f16", "dtype != IS_F16 ? pack_f16"
    ),
)


def check_all(**options: Any) -> None:
    """Everything that meets one of the bugs."""
    for by_vectors in (True, False):
        one = partial(run, by_vectors=by_vectors, **options)
        for case in cases_rope.suspicious():
            cases_rope.check(case, one)
        checks: tuple[Callable[..., None], ...] = (
            *(cases_rope.check_rounded_once, cases_rope.check_as_stock),
            *(cases_rope.check_infinities, cases_rope.check_clamped),
        )
        for check in checks:
            check(one)
    for case in cases_rope.suspicious_for_any():
        cases_rope.check(case, partial(run, **options))


def test_without_a_bug_all_is_well() -> None:
    check_all()


@pytest.mark.parametrize("bug", every(6, BUGS), ids=lambda bug: bug.name)
def test_the_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    csrc = bug.plant(CSRC, tmp_path)
    for seed in range(3):
        with pytest.raises(AssertionError) as found:
            check_all(csrc=csrc, schedule=Schedule(seed, seed))
        assert bug.finding in str(found.value)
