# SPDX-License-Identifier: Apache-2.0
"""test_emu_rope.py - the CUDA kernels of rms_norm_rope, run on the CPU and held against float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rope_oracle
from emu import cases_rope
from emu.build import compiler
from emu.cases_rope import FLOATS, Case
from emu.run import EmulatorError
from emu.run_rope import run
from nightly import every

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

CHANCES, PARTS = 120, 3  # cases by chance for each body, in so many tests
each_body = pytest.mark.parametrize("vectors", (True, False), ids=("vectors", "any"))


def body(vectors: bool, **options: Any) -> Any:
    return partial(run, by_vectors=vectors, **options)


@each_body
def test_cases_by_hand(vectors: bool) -> None:
    for number, case in enumerate(cases_rope.by_hand()):
        if number % 3 == 0 or vectors:
            cases_rope.check(case, body(vectors))


def test_cases_that_vectors_do_not_take() -> None:
    for case in cases_rope.for_any_alone():
        cases_rope.check(case, run)


@pytest.mark.parametrize("part", every(PARTS, range(PARTS)))
@each_body
def test_cases_by_chance(vectors: bool, part: int) -> None:
    for case in cases_rope.by_chance(CHANCES // PARTS, part, vectors):
        cases_rope.check(case, body(vectors))


def test_there_are_enough_cases() -> None:
    by_hand = len(list(cases_rope.by_hand()))
    assert by_hand + CHANCES >= 150
    assert by_hand // 3 + len(list(cases_rope.for_any_alone())) + CHANCES >= 150


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_turings_own_roundings(dtype: torch.dtype) -> None:
    """It has no instruction for bfloat16, and none that rounds two at once."""
    for out_dtype in FLOATS:
        case = Case(dtype=dtype, out_dtype=out_dtype, weight=dtype, table="token")
        cases_rope.check(case, body(True, arch=75))
        cases_rope.check(case, body(False, arch=75))


@each_body
@pytest.mark.parametrize("heads,head_dim", ((12, 128), (24, 64)))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_is_at_most_stocks_and_half_an_ulp(
    dtype: torch.dtype, heads: int, head_dim: int, vectors: bool
) -> None:
    """Without the allowance for few tokens."""
    grids = [[4, 3, 3]]
    table, where = rope_oracle.table(64, head_dim), torch.tensor(grids)
    x = (3 * torch.randn(1, 38, heads, head_dim)).to(dtype)
    for weight_dtype in (torch.float32, dtype):
        weight = (torch.rand(heads * head_dim) + 0.5).to(weight_dtype)
        exact = rope_oracle.exact(x, weight, grids, eps=1e-6)
        for out_dtype in FLOATS:
            stock = rope_oracle.stock(x, weight, grids, eps=1e-6).to(out_dtype)
            allowed = cases_rope.half_ulp(out_dtype, exact.abs().max().item())
            allowed += (stock.double() - exact).abs().max().item()
            out = run(x, weight, table, where, eps=1e-6, dtype=out_dtype, by_vectors=vectors)
            assert (out.double() - exact).abs().max().item() <= allowed, out_dtype


@each_body
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rotation_alone_has_stocks_bits(dtype: torch.dtype, vectors: bool) -> None:
    """Nearly: where float64 lies that close to the middle of two floats, either may come out."""
    grids, table = [[2, 2, 2]], rope_oracle.table(64, 128)
    x = torch.randn(1, 8, 8, 128).to(dtype)
    for out_dtype in FLOATS:
        expected = rope_oracle.stock(x, grids=grids).to(out_dtype)
        out = run(x, None, table, torch.tensor(grids), dtype=out_dtype, by_vectors=vectors)
        assert (out == expected).double().mean() >= 0.999
        unit = torch.finfo(out_dtype).eps * expected.double().abs()
        largest = torch.finfo(torch.float32).eps * expected.double().abs().max()
        assert ((out.double() - expected.double()).abs() <= unit + largest).all()


@each_body
def test_results_that_errors_do_not_tell(vectors: bool) -> None:
    cases_rope.check_rounded_once(body(vectors))
    cases_rope.check_as_stock(body(vectors))
    cases_rope.check_infinities(body(vectors))
    cases_rope.check_clamped(body(vectors))
    for case in cases_rope.suspicious():
        cases_rope.check(case, body(vectors))


@each_body
def test_without_rounding_the_norm_the_error_is_smaller(vectors: bool) -> None:
    x = torch.randn(1, 4, 12, 128).bfloat16()
    weight, grids = (torch.rand(12 * 128) + 0.5).bfloat16(), [[1, 2, 2]]
    table, where = rope_oracle.table(4, 128), torch.tensor(grids)
    exact = rope_oracle.exact(x, weight, grids, eps=1e-6)
    stock = rope_oracle.stock(x, weight, grids, eps=1e-6)
    options: dict[str, Any] = {"eps": 1e-6, "dtype": torch.float32, "by_vectors": vectors}
    once = run(x, weight, table, where, round_norm=False, **options)
    assert (once.double() - exact).abs().mean() < 0.01 * (stock.double() - exact).abs().mean()


@each_body
def test_the_factor_of_the_norm_is_float64s(vectors: bool) -> None:
    """1 / sqrt(mean + eps) itself: x is 1 but for one element that makes the mean what it is."""
    for large, eps in ((3.0, 1e-6), (1e4, 0.0), (1e-3, 1e-12), (1e17, 1e-6)):
        x = torch.full((1, 1, 2, 64), large)
        x[0, 0, 1, 5] = 2 * large
        out = run(x, eps=eps, by_vectors=vectors)
        mean = x.double().pow(2).mean()
        expected = x * (1 / torch.sqrt(mean + eps)).float()
        assert torch.equal(out, expected), (large, eps)


@each_body
def test_norms_without_a_number(vectors: bool) -> None:
    """Zeros without eps are NaN, squares beyond float32 give zeros, as in torch."""
    zeros, huge = torch.zeros(1, 1, 1, 64), torch.full((1, 1, 1, 64), 1e30)
    assert run(zeros, eps=0.0, by_vectors=vectors).isnan().all()
    assert torch.equal(run(zeros, eps=1e-6, by_vectors=vectors), zeros)
    assert not run(huge, eps=1e-6, by_vectors=vectors).any()
    assert run(-huge * huge, eps=1e-6, by_vectors=vectors).isnan().all()


@each_body
def test_special_values_stay_in_their_rows(vectors: bool) -> None:
    x = torch.randn(1, 12, 3, 40)
    clean = x.clone()
    x[0, 3], x[0, 10, 1, 5], x[0, 11, 2, 7] = math.nan, math.inf, math.nan
    x[0, 5, 0, 0] = math.inf
    table, where = rope_oracle.table(16, 40), torch.tensor([[2, 2, 2]])
    out = run(x, None, table, where, by_vectors=vectors)
    assert out[0, 3].isnan().all()
    assert torch.equal(out[0, 8:].nan_to_num(7.0), x[0, 8:].nan_to_num(7.0)), "the tail is copied"
    assert out[0, 5, 0, 0].isinf() and out[0, 5, 0, 1].isinf(), "an infinity is not NaN"
    expected = run(clean, None, table, where, by_vectors=vectors)
    others = [s for s in range(8) if s not in (3, 5)]
    assert torch.equal(out[0, others], expected[0, others])
    normed = run(x, None, table, where, eps=1e-6, by_vectors=vectors)
    assert normed[0, 3].isnan().all() and normed[0, others].isfinite().all()


@each_body
def test_a_part_is_the_same_as_the_part_of_the_whole(vectors: bool) -> None:
    x, grids = torch.randn(2, 16, 4, 24), torch.tensor([[2, 2, 3], [3, 5, 1]], dtype=torch.int32)
    table, weight = rope_oracle.table(8, 24), torch.rand(96)
    options: dict[str, Any] = {"eps": 1e-6, "by_vectors": vectors}
    whole = run(x, weight, table, grids, **options)
    for first in (0, 5, 8, 15):
        part = run(x[:, first:], weight, table, grids, seqlen_offset=first, **options)
        assert torch.equal(part, whole[:, first:])


def test_sizes_on_the_device_are_clamped() -> None:
    x, table = torch.randn(1, 6, 2, 16), rope_oracle.table(3, 16)
    beyond = torch.tensor([[9, 1 << 40, 2]])
    out = run(x, None, table, beyond, grid_on_device=True)
    assert torch.equal(out, run(x, None, table, torch.tensor([[3, 3, 2]])))
    for axis in range(3):
        nothing = torch.full((1, 3), 2)
        nothing[0, axis] = -5
        assert torch.equal(run(x, None, table, nothing, grid_on_device=True), x)


def test_planes_beyond_two_to_the_31() -> None:
    """No table has so many positions in a test; a launch's own sizes are not held against it."""
    x, table = torch.randn(1, 5, 1, 16), rope_oracle.table(8, 16)
    huge = torch.tensor([[1, 1 << 20, 1 << 20]])
    one = torch.tensor([[1, 1, 5]])
    assert torch.equal(run(x, None, table, huge), run(x, None, table, one))


@each_body
def test_offsets_beyond_two_to_the_31(vectors: bool) -> None:
    from emu.cases import reserved

    memory = reserved(2**32 + 2**16, torch.float16)
    if memory is None:
        pytest.skip("this system does not lend address space without memory behind it")
    for dim in range(3):
        shape, stride = [2, 3, 2, 64], [6 * 64, 2 * 64, 64, 1]
        stride[dim] = 2**31 // (shape[dim] - 1) + 64
        x = memory.as_strided(shape, stride, 2**31).copy_(torch.randn(shape))
        out = run(x, eps=1e-6, by_vectors=vectors)
        assert torch.equal(out, run(x.contiguous(), eps=1e-6, by_vectors=vectors))


def test_slots_are_told_apart_without_a_division() -> None:
    for slots in range(1, 33):
        factor = -(-65536 // slots)
        assert all(t * factor >> 16 == t // slots for t in range(512)), slots


def test_a_launch_with_the_wrong_size_is_found() -> None:
    x: Tensor = torch.randn(1, 2, 1, 64)
    with pytest.raises(EmulatorError, match="global store outside the outputs"):
        run(x, eps=1e-6, out=torch.zeros(1, 1, 1, 64))
