# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (each bug is a line of a table)
"""test_emu_backward_bugs.py - plants a bug in the sources of gradients and demands that it is found
by calls such as test_emu_backward.py makes, whatever the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import oracle
import planted
from emu import cases_backward
from emu.build import compiler
from emu.cases import Case
from emu.rows import CSRC
from emu.run import Schedule
from emu.run_backward import Pair, pairs, row_numbers, run
from nightly import every

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

KERNEL, WORK, ROWS, SCALE, KEYS, SWIZZLE, MULTIPLY_PV = (
    f"cuda/{name}.cuh"
    for name in (
        *("sdpa_backward", "tile/backward_work", "backward_rows", "backward_scale"),
        *("tile/row_keys", "tile/swizzle", "tile/multiply_pv"),
    )
)
SLIM, F16, WIDE, TURING = "sm80_bf16_d64_slim", "sm80_f16_d64_slim", "sm80_bf16_d64_wide", "sm75_f16_d64_turing"  # fmt: skip


@dataclass(frozen=True)
class Bug(planted.Bug):
    """row: the kernels that show it."""

    row: str = SLIM


# fmt: off
BUGS = (
    Bug("a tile is not waited for", KERNEL, "    cp_async_wait<0>();\n    block_barrier();\n    if (STAGES", "    block_barrier();\n    if (STAGES"),
    Bug("no barrier before a tile", KERNEL, "    cp_async_wait<0>();\n    block_barrier();\n    if (STAGES", "    cp_async_wait<0>();\n    if (STAGES"),
    Bug("Turing: no barrier behind a tile", KERNEL, "    if (STAGES == 1)\n        block_barrier();", "", TURING),
    Bug("no barrier between heads", KERNEL, "        block_barrier(); /* what", "        if (i == 0) block_barrier(); /* what"),
    Bug("one stage for all tiles", KERNEL, "return (u32)(n % STAGES);", "return (u32)(0 * n);"),
    Bug("the first head alone", KERNEL, "i < (OF_KEYS ? args.heads_per_key_head : 1)", "i < 1"),
    Bug("heads of another key", KERNEL, "OF_KEYS ? place.head * share + i : place.head / share", "OF_KEYS ? place.head + i : place.head / share"),
    Bug("numbers of another head's rows", KERNEL, "i64 row = ((i64)place.sample * args.num_heads_q + head)", "i64 row = ((i64)place.sample * args.num_heads_q + place.head)"),
    Bug("numbers of tile 0 for all", KERNEL, "tiles.numbers + (i64)n * (4 * BLOCK_N)", "tiles.numbers + (i64)n * 0"),
    Bug("numbers of the other column", KERNEL, "float_from_bits(words[i % 2 * 2]),", "float_from_bits(words[2 - i % 2 * 2]),"),
    Bug("dq: numbers of the other row", KERNEL, "own.of_rows[OF_KEYS ? 0 : m][i / 2]", "own.of_rows[OF_KEYS ? 0 : m][1 - i / 2]"),
    Bug("V and dout are left out of dP", KERNEL, "multiply_own(dp, x_read, X2_SMEM, y_read_b, TILE_BYTES);", "multiply_own(dp, x_read, X1_SMEM, y_read_b, TILE_BYTES);"),
    Bug("P for dS", KERNEL, "multiply_pv(sums.g1, dp, y_read, 0);", "multiply_pv(sums.g1, s, y_read, 0);"),
    Bug("delta is not subtracted", KERNEL, "-delta * delta_scale};", "0.0f * delta * delta_scale};"),
    Bug("dS without its weight", KERNEL, "weight * slope;", "slope;"),
    Bug("no mask", KERNEL, "return {column < met.begin || column >= met.end,", "return {false && met.begin,"),
    Bug("hidden weights in dv alone", KERNEL, "s[m][j][i] = mask.is_hidden ? 0.0f : weight;", "s[m][j][i] = weight;"),
    Bug("a single key's noise", KERNEL, "slope -= slope; /* NaN stays */", "slope += 0.0f;"),
    Bug("clean tiles with a single key", WORK, "        clean_end = 0;", "        clean_end += 0;"),
    Bug("left and right do not change places", WORK, "return OF_KEYS ? args.window_size_right : args.window_size_left;", "return OF_KEYS ? args.window_size_left : args.window_size_left;"),
    Bug("one clean tile too many at the end", WORK, "larger_int(clean_end, 0) / BLOCK_N;", "(larger_int(clean_end, 0) + BLOCK_N - 1) / BLOCK_N;"),
    Bug("one clean tile too many at the front", WORK, "work.clean_begin = (clean_begin + BLOCK_N - 1) / BLOCK_N;", "work.clean_begin = clean_begin / BLOCK_N;"),
    Bug("rows that nobody meets are read", WORK, "int first = larger_int(top - back, 0)", "int first = larger_int(top - back, 0) / BLOCK_N * BLOCK_N"),
    Bug("a tile too few", WORK, "work.num_tiles = (end - first + BLOCK_N - 1) / BLOCK_N;", "work.num_tiles = (end - first) / BLOCK_N;"),
    Bug("the tail is not cut off", KERNEL, "copy_others(tiles, n, true, work.num_others - n * BLOCK_N);", "copy_others(tiles, n, true, BLOCK_N);"),
    Bug("own padding is read", KERNEL, "int rows = used - place.begin - tile * BLOCK_N;", "int rows = BLOCK_N + 0 * used;"),
    Bug("padding is not zero", KERNEL, "meets_any ? sums[i / 2][j / 2][i % 2 * 2 + j % 2] * factor : 0.0f;", "sums[i / 2][j / 2][i % 2 * 2 + j % 2] * factor + (meets_any ? 0.0f : 1.0f);"),
    Bug("a seen NaN reaches what meets nobody", WORK, "return row < used && count_keys(row, used, others, reach_back(args), reach_ahead(args)) > 0;", "return row < used && others + args.batch > 0;"),
    Bug("no softmax_scale", KERNEL, "float factor = args.softmax_scale * load_scale", "float factor = load_scale"),
    Bug("m tiles of one warp's rows", KERNEL, "(thread_index() / 32 * M_TILES + m_tile) * 16", "(thread_index() / 32 + m_tile) * 16", WIDE),
    Bug("no swizzle", SWIZZLE, "(chunk ^ row / (8 / GROUP) % GROUP) * 16", "chunk * 16"),
    Bug("the other tile of the stage", MULTIPLY_PV, "ldmatrix_x4_trans(b, advanced(v_read, j / 2) + tile + (u32)(step * 16 * ROW_BYTES));\n#pragma unroll\n            for (int i = 0", "ldmatrix_x4_trans(b, advanced(v_read, j / 2) + 0 * tile + (u32)(step * 16 * ROW_BYTES));\n#pragma unroll\n            for (int i = 0"),
    Bug("a single key counts like others", ROWS, "delta = keys == 1 ? 0.0f : whole;", "delta = whole;"),
    Bug("delta in float32 alone", ROWS, "sum.rest == sum.rest ? sum.high + sum.rest : sum.high;", "sum.high;"),
    Bug("lse to base e", ROWS, "row * args.lse_row_stride) * 1.44269504f;", "row * args.lse_row_stride);"),
    Bug("rows without keys are read", ROWS, "    if (keys > 0) {", "    if (row < used_q) {"),
    Bug("grad_lse is added", ROWS, "delta -= load_global_f32", "delta += load_global_f32"),
    Bug("the row behind is forgotten", ROWS, "        if (row > 0)\n", "        if (row > 1)\n"),
    Bug("grad_out is not rounded", ROWS, "args.sizes ? 13 : 16", "1"),
    Bug("keys behind the diagonal", KEYS, "diagonal + window_size_right + 1", "diagonal + window_size_right"),
    Bug("f16: dP is not scaled", SCALE, "power_of_two(divides_dout - divides_ds)", "power_of_two(divides_dout + 0 * divides_ds)", F16),
    Bug("f16: delta's scale is dP's", SCALE, "power_of_two(-divides_ds)", "power_of_two(divides_dout - divides_ds)", F16),
    Bug("f16: grad_out is not scaled", SCALE, "args.dout_scale ? clamped(of_dout - 15, LOWEST, HIGHEST) : 0;", "0;", F16),
    Bug("f16: nobody asks how large V is", SCALE, "larger_int(of_dout + of_v, of_delta)", "larger_int(of_dout, of_delta)", F16),
    Bug("f16: a bound that is head_dim times too large", SCALE, "larger_int(of_dout + of_v, of_delta)", "larger_int(of_dout + of_v + 7, of_delta)", F16),
    Bug("f16: an infinite size", ROWS, "size < 3.4e38f ? size : 3.4e38f;", "size + 0.0f;", F16),
    Bug("f16: the first query head's size", SCALE, "h < (head + 1) * share; h++)", "h < head * share + 1; h++)", F16),
    Bug("f16: dv keeps P's shift", KERNEL, "load_scale(args, place, 3) * unshifted, sums.g2);", "load_scale(args, place, 3), sums.g2);", F16),
)
# fmt: on


def suspicious(pair: Pair) -> Iterator[Case]:
    """A few calls that between them meet every bug of the list."""
    m, n = pair.of_keys.block_m, pair.of_keys.block_n
    yield Case(2 * n + 5, m + 9, 2, 4, 2, q_lens=(2 * n, n - 3), k_lens=(m + 7, 20))
    yield Case(3 * n + 1, m - 5, 1, 2, 1, is_causal=True, q_is_f32=True)
    yield Case(m + 3, 3 * n + 5, window=(n, 3), scale=0.2)
    yield Case(n + 7, m + 1, layout="surrounded", values="rising")
    yield Case(n + 9, 1, 2, q_is_f32=True, values="peaky")
    yield Case(4 * n, m, window=(n, n), values="outliers")
    yield Case(n, 3 * n, q_is_f32=True, values="one hot")


def check_sizes(pair: Pair, csrc: Path, schedule: Schedule) -> None:
    """Large and small gradients of large values, of which float16 holds none unscaled. Values come
    in pairs that cancel, so that out and delta do not tell how large dP is."""
    call = cases_backward.call_of(Case(33, 40, 1, 2, 1, q_is_f32=True), pair)
    key, value = call.key.clone(), call.value * 4096.0
    key[:, 1::2], value[:, 1::2] = key[:, ::2], -value[:, ::2]
    rounded = call.query.to(value.dtype)
    out, lse = (torch.from_numpy(x).float() for x in oracle.attention(rounded, key, value))
    heads = torch.tensor([1.0, 2.0**9]).view(1, 1, 2, 1)
    grad_out = (call.grad_out.float() / call.grad_out.float().abs().max()) * heads
    call = replace(
        call, key=key.float(), value=value, out=out, lse=lse, grad_out=grad_out, grad_lse=None
    )
    want = cases_backward.exact(call)[1]
    for power in (-30, 0, 30):
        large = replace(call, grad_out=grad_out * 2.0**power)
        got = run(pair, large, schedule=schedule, csrc=csrc).grads[1] * 2.0**-power
        error = (got.double() - want).norm() / want.norm()
        assert error < 0.02, f"2^{power}: {error}"


def check_blind_rows(pair: Pair, csrc: Path) -> None:
    """What stands in a row without keys is not even looked at."""
    call = cases_backward.call_of(Case(20, 9, is_causal=True), pair)
    rows, _ = row_numbers(call, False, csrc)
    assert (rows[:, :, :11, 0] == math.inf).all() and not rows[:, :, :11, 1].any()


def check_all(pair: Pair, csrc: Path, how: Schedule) -> None:
    for case in suspicious(pair):
        cases_backward.check(case, pair, csrc=csrc, schedule=how)
    check_sizes(pair, csrc, how)
    check_blind_rows(pair, csrc)
    cases_backward.check_finite_sizes(pair, csrc=csrc)
    cases_backward.check_delta(pair, csrc=csrc)
    cases_backward.check_zeros(pair, schedule=how, csrc=csrc)
    if pair.dtype == "F16":
        cases_backward.check_outliers(pair, schedule=how, csrc=csrc)


def pair_of(row: str) -> Pair:
    return next(pair for pair in pairs() if pair.name == f"sdpa_backward_{row}")


@pytest.mark.parametrize("bug", every(9, BUGS), ids=lambda bug: bug.name)
def test_the_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    csrc = bug.plant(CSRC, tmp_path)
    for landing in range(3):
        with pytest.raises(AssertionError):
            check_all(pair_of(bug.row), csrc, Schedule(landing, landing))


@pytest.mark.parametrize("row", (SLIM, F16, WIDE, TURING))
def test_without_a_bug_nothing_is_found(row: str) -> None:
    check_all(pair_of(row), CSRC, Schedule())
