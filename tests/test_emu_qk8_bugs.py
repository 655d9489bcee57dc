# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (each bug is a line of a table)
"""test_emu_qk8_bugs.py - plants a bug in the sources of 8-bit scores and demands that it is found:
by the bits of the passes, or by the calls that test_emu_qk8_rows.py makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
from emu import cases, cases_qk8, qk8
from emu.build import compiler, library
from emu.rows import CSRC, helpers, tiles_qk8
from emu.run import Schedule, launch
from nightly import every

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

KERNEL, PASSES, SCORES, OUTPUT, ARGS_QK8 = (
    f"cuda/{name}"
    for name in (
        *("sdpa_sm80.cuh", "qk8.cuh", "tile/scores_int8.cuh", "tile/output.cuh"),
        "args_qk8.h",
    )
)
SLIM, WIDE, TURING = (
    f"sdpa_{name}" for name in ("sm80_qk8_f16_d64_slim", "sm80_qk8_bf16_d128_wide",
    "sm75_qk8_bf16_d64_turing")
)  # fmt: skip


@dataclass(frozen=True)
class Bug(planted.Bug):
    """row: the tile that shows it; "": the passes do."""

    row: str = ""


# fmt: off
BUGS = (
    Bug("a sum forgets its last key", PASSES, "row < end; row++", "row < end - 1; row++"),
    Bug("infinities count in the mean", PASSES, "is_finite(x[i]) ? x[i] : 0.0f", "x[i]"),
    Bug("the mean is over all keys", PASSES, "(double)place.used)", "(double)args.seqlen)"),
    Bug("a sum in float32", PASSES, "double sum = 0.0;", "float sum = 0.0f;"),
    Bug("tiles of another head", PASSES, "(i64)head * args.tiles * args.head_dim + channel", "channel"),
    Bug("signs of the next channel", PASSES, "signs >> i & 1u", "signs >> i >> 1 & 1u"),
    Bug("no signs beyond channel 32", PASSES, ": first < 64 ? 0x0648dfecu", ": first < 64 ? 0u"),
    Bug("the rotation's last step is missing", PASSES, "        for (int i = 0; i < PER_LANE; i++) {\n            float other", "        for (int i = 0; i < PER_LANE && lane_mask < 16; i++) {\n            float other"),
    Bug("a difference the wrong way", PASSES, "other - x[i] : x[i] + other", "x[i] - other : x[i] + other"),
    Bug("the largest of a lane alone", PASSES, "u32 other = shfl_xor_bits(top, lane_mask);", "u32 other = top + 0 * (u32)lane_mask;"),
    Bug("cut off, not rounded", PASSES, "rounded_sum(rounded_product(x[i], inverse), round)", "rounded_sum((float)(int)rounded_product(x[i], inverse), round)"),
    Bug("fused, rounded once", PASSES, "rounded_sum(rounded_product(x[i], inverse), round)", "fused_multiply_add(x[i], inverse, round)"),
    Bug("a step of 128", PASSES, "return rounded_quotient(largest, 127.0f);", "return rounded_quotient(largest, 128.0f);"),
    Bug("NaN becomes zeros with step 0", PASSES, "return float_from_bits(0x7fffffffu); /* NaN */", "return 0.0f;"),
    Bug("small rows are not zeros", PASSES, "if (largest < smallest_largest())", "if (largest < 0.0f)"),
    Bug("the mean stays in K", PASSES, "x[i] -= load_global_f32(mean + i);", "x[i] -= 0.0f * load_global_f32(mean + i);"),
    Bug("padding keys are read", PASSES, "if (row < place.used) {\n        const", "if (row < args.seqlen) {\n        const"),
    Bug("a negative scale is forgotten", PASSES, "args.is_negated ? -x[i] : x[i]", "x[i]"),
    Bug("the mean of another key head", PASSES, "place.head / args.heads_per_key_head;\n    const", "place.head % heads_k;\n    const"),
    Bug("the factor of a hidden row is 0", PASSES, "        factor = WAN_ATTN_CUDA_SMALLEST_SCALE;", "        factor = 0.0f;"),
    Bug("a step in another place", ARGS_QK8, "(n) % 8 / 2 * 4 + (n) / 8 % 2 * 2", "(n) % 8 / 2 * 2 + (n) / 8 % 2 * 8"),
    Bug("integers begin at 0", SCORES, "sum[m][j / 4][j % 4] = NO_SCORE;", "sum[m][j / 4][j % 4] = 0;", SLIM),
    Bug("a step of the wrong key", SCORES, "bits[i / 4 * 2 + i % 2]", "bits[i / 4 + i % 2 * 2]", SLIM),
    Bug("steps of the wrong tiles", SCORES, "j / 2 * 64 + thread", "j / 4 * 64 + thread", SLIM),
    Bug("steps of another lane", SCORES, "thread_index() % 4 * 16));", "thread_index() / 8 % 4 * 16));", SLIM),
    Bug("half of head_dim", SCORES, "step < K_STEPS; step++) {\n        u32 a[M_TILES][4];", "step < K_STEPS / 2; step++) {\n        u32 a[M_TILES][4];", SLIM),
    Bug("K's halves swapped", SCORES, "WAN_ATTN_CUDA_QK8_CHUNK(HEAD_DIM, key, i % 2)", "WAN_ATTN_CUDA_QK8_CHUNK(HEAD_DIM, key, 1 - i % 2)", SLIM),
    Bug("keys of a product swapped", SCORES, "u32 key = i / 2 * 8 + r;", "u32 key = (1 - i / 2) * 8 + r;", SLIM),
    Bug("no swizzle", ARGS_QK8, "((chunk) ^ (n) / (128 / (head_dim)) % ((head_dim) / 16))", "((chunk) + 0 * (n))", SLIM),
    Bug("a warp's copy is missing", SCORES, "chunk + NUM_THREADS <= K_CHUNKS ||", "chunk + NUM_THREADS <= K_CHUNKS &&", SLIM),
    Bug("the tile before the tile before", SCORES, "stepped_back(source, K_TILE_BYTES)", "stepped_back(source, 2 * K_TILE_BYTES)", SLIM),
    Bug("keys of another head", SCORES, "i64 head = place.sample * (args.num_heads_q / args.heads_per_key_head) + head_k;", "i64 head = place.sample * args.num_heads_q + head_k;", SLIM),
    Bug("rows of Q eight too far", SCORES, "row_in_block(m) + 8 * r;", "row_in_block(m) + 4 * r;", SLIM),
    Bug("Q's halves swapped", SCORES, "a[i / 2][i % 2 * 2 + r]", "a[i / 2][(1 - i % 2) * 2 + r]", SLIM),
    Bug("one factor for two rows", SCORES, "q.scale[m][r] = load_global_f32(args.q_rows + 2 * at);", "q.scale[m][1 - r] = q.scale[m][r] = load_global_f32(args.q_rows + 2 * at);", SLIM),
    Bug("the lse's part for a factor", SCORES, "load_global_f32(args.q_rows + 2 * at);", "load_global_f32(args.q_rows + 2 * at + 1);", SLIM),
    Bug("lse without K's mean", OUTPUT, "lse += load_global_f32(args.q_rows + 2 * at + 1);", "lse += 0 * at;", SLIM),
    Bug("lse of another head's mean", OUTPUT, "(place.sample * args.num_heads_q + place.head) * args.seqlen_q + row;\n        lse", "(place.sample * args.num_heads_q) * args.seqlen_q + row;\n        lse", SLIM),
    Bug("sums that overflow", KERNEL, "QK_INT8 ? 7 : 9", "QK_INT8 ? 12 : 9", SLIM),
    Bug("Q of another warp", "cuda/tile/q_fragments.cuh", "(u32)(thread_index() / 32) * (M_TILES * K_STEPS * 512)", "(u32)(thread_index() / 32) * (K_STEPS * 512)", WIDE),
    Bug("factors of one m tile", SCORES, "scale[i / 2][i % 2] = q.scale[i / 2][i % 2];", "scale[i / 2][i % 2] = q.scale[0][i % 2];", WIDE),
    Bug("Turing: V's scale is forgotten", KERNEL, "scale = load_global_f32(args.v_scale", "scale = 1.0f + 0.0f * load_global_f32(args.v_scale", TURING),
)
# fmt: on


def _pass(csrc: Path, name: str, args: object, grid: int, tensors: list[object]) -> None:
    launch(library(helpers()[name], csrc), args, grid, tensors)  # type: ignore[arg-type]


def check_passes(csrc: Path) -> None:
    """Calls that between them meet every bug of the passes."""
    made = torch.Generator().manual_seed(0)
    for head_dim in (64, 128):
        query = torch.randn(2, 9, 4, head_dim, generator=made)
        key = torch.randn(2, 700, 2, head_dim, generator=made) * 3 + 1
        key[:, 200:] = key[:, 200:201]
        query[0, 2, 0, 5], key[0, 9, 0, 7], query[1, 1] = float("inf"), float("nan"), 0.0
        query[0, 4], key[1, 6, 1] = 2.0**-110, 0.0
        runner = partial(_pass, csrc)
        short = key[:, :150].contiguous()
        lens = {"q_lens": torch.tensor([9, 4]), "k_lens": torch.tensor([150, 70])}
        qk8.check_integers(query, short, scale=-0.3, runner=runner, **lens)
        qk8.check_integers(query, key, runner=runner)
        half = torch.full((1, 8, 1, head_dim), 0.5)
        half[..., 0] = 127.0
        qk8.check_integers(qk8.false_ties(head_dim), half, runner=runner)


def suspicious(row: str) -> Iterator[cases.Case]:
    """A few cases that between them meet every bug of the list."""
    tile = next(tile for tile in tiles_qk8() if tile.name == row)
    m, n = tile.block_m, tile.block_n
    yield cases.Case(m + 9, 3 * n + 5, 2, 4, 2, values="biased")
    yield cases.Case(m, 3 * n + 5, window=(n, 3))
    yield cases.Case(m, n - 1, 2, q_lens=(m - 5, 3), k_lens=(n - 9, 0), is_causal=True)
    yield cases.Case(40, 4 * n, values="rising", layout="surrounded")
    yield cases.Case(1, n, batch=n, values="one hot each")
    yield cases.Case(17, 2 * n, values="outliers")


@pytest.mark.parametrize("bug", every(6, BUGS), ids=lambda bug: bug.name)
def test_the_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    csrc = bug.plant(CSRC, tmp_path)
    if not bug.row:
        with pytest.raises(AssertionError):
            check_passes(csrc)
        return
    tile = next(tile for tile in tiles_qk8() if tile.name == bug.row)
    for landing in range(3):
        found = ""
        how: dict[str, Any] = {"csrc": csrc, "schedule": Schedule(landing, landing)}
        calls = [partial(cases_qk8.check_largest_sums, tile, **how)]
        calls += [partial(cases_qk8.check, case, tile, **how) for case in suspicious(bug.row)]
        for call in calls:
            try:
                call()
            except AssertionError as error:
                found = str(error)
                break
        assert found, f"not found with copies landing {landing}"


def test_without_a_bug_nothing_is_found() -> None:
    check_passes(CSRC)
    for row in (SLIM, WIDE, TURING):
        tile = next(tile for tile in tiles_qk8() if tile.name == row)
        for case in suspicious(row):
            cases_qk8.check(case, tile)
