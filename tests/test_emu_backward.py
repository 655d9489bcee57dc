# SPDX-License-Identifier: Apache-2.0
"""test_emu_backward.py - every CUDA row of gradients, run on the CPU and held against float64.

As test_emu_kernels.py: the sources are those that GPUs get, and shapes are small.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import backward_oracle
import oracle
from emu import cases, cases_backward
from emu.build import compiler
from emu.cases import Case
from emu.run import DTYPES, Schedule
from emu.run_backward import Call, Pair, pairs, row_numbers, run
from nightly import unless

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")

CHANCES, PARTS = 90, 3  # cases by chance for each row, in so many tests
SHORT = ("sm80_bf16_d128_slim", "sm80_f16_d64_wide", "sm75_f16_d80_turing")


def is_short(pair: Pair) -> bool:
    """A row of each class."""
    return pair.name.removeprefix("sdpa_backward_") in SHORT


def is_first(pair: Pair, part: int) -> bool:
    return part == 0 and is_short(pair)


each_pair = pytest.mark.parametrize("pair", unless(is_short, pairs()), ids=lambda pair: pair.name)


def f16_pairs() -> list[Pair]:
    return [pair for pair in pairs() if pair.dtype == "F16"]


each_part = pytest.mark.parametrize(
    ("pair", "part"),
    unless(is_first, ((pair, part) for pair in pairs() for part in range(PARTS))),
    ids=lambda x: getattr(x, "name", str(x)),
)


@each_part
def test_cases_by_hand(pair: Pair, part: int) -> None:
    for number, case in enumerate(cases_backward.by_hand(pair)):
        if number % PARTS == part:
            how = Schedule(number // PARTS % 3, number)  # which copies land early takes turns
            cases_backward.check(replace(case, schedule=how), pair)


@each_part
def test_cases_by_chance(pair: Pair, part: int) -> None:
    for case in cases_backward.by_chance(pair, CHANCES // PARTS, seed=part):
        cases_backward.check(case, pair)


def test_there_are_enough_cases() -> None:
    assert len(pairs()) == 15
    for pair in pairs():
        assert len(list(cases_backward.by_hand(pair))) + CHANCES >= 170, pair.name


@each_pair
def test_no_schedule_changes_a_bit(pair: Pair) -> None:
    cases_backward.check_schedules(pair)


@each_pair
def test_what_meets_nobody_stays_zero(pair: Pair) -> None:
    cases_backward.check_zeros(pair)


@pytest.mark.parametrize("pair", unless(is_short, f16_pairs()), ids=lambda pair: pair.name)
def test_outliers_leave_the_bits_of_other_rows(pair: Pair) -> None:
    cases_backward.check_outliers(pair)


def test_delta_is_rounded_once() -> None:
    cases_backward.check_delta(pairs()[0])


def test_sizes_are_finite() -> None:
    cases_backward.check_finite_sizes(pairs()[0])


@each_pair
def test_a_head_alone_has_the_same_bits(pair: Pair) -> None:
    """Whatever other samples and heads there are, and wherever its blocks stand in the grid."""
    call = cases_backward.call_of(Case(70, 45, 2, 2, 2, is_causal=True), pair)
    call = replace(call, grad_out=call.grad_out.contiguous(), grad_lse=None)
    whole = run(pair, call).grads
    one = [x[1:, :, 1:] for x in (call.query, call.key, call.value, call.out, call.grad_out)]
    query, key, value, out, grad_out = one
    alone = Call(query, key, value, out, call.lse[1:, 1:], grad_out, is_causal=True)
    for got, want in zip(run(pair, alone).grads, whole, strict=True):
        assert torch.equal(got, want[1:, :, 1:])


@each_pair
def test_one_key_gives_its_gradient_to_the_bit(pair: Pair) -> None:
    """Its weight is 1 whatever its score: dq is 0, and so is dk; dv is the sum of grad_out."""
    call = cases_backward.call_of(Case(1, 1, values="peaky"), pair)
    call = replace(call, grad_lse=None)
    got = run(pair, call).grads
    assert not got[0].any() and not got[1].any()
    assert torch.equal(got[2], call.grad_out)


@each_pair
def test_gradients_of_every_size(pair: Pair) -> None:
    """grad_out times a power of two: dq and dk, in float32, are that times as large to the bit. In
    float16 dS would be infinite, or 0, if it were not scaled; a float32 grad_out may be far beyond
    what float16 holds."""
    call = cases_backward.call_of(Case(33, 130, 1, 2, 1, q_is_f32=True), pair)
    made = torch.Generator().manual_seed(1)
    fractions = 0.5 + torch.rand(call.query.shape, generator=made) / 2
    signs = torch.randn(call.query.shape, generator=made).sign()
    grad_out = (fractions * signs).to(DTYPES[pair.dtype])
    call = replace(call, key=call.key.float(), grad_out=grad_out, grad_lse=None)
    want = run(pair, call).grads
    largest = [want[n].abs().max() for n in (0, 1)]
    for power in (-60, -12, -5, 4, 12, 60):
        dtype = torch.float32 if abs(power) == 60 else grad_out.dtype
        other = replace(call, grad_out=grad_out.to(dtype) * 2.0**power)
        got = run(pair, other).grads
        for n in (0, 1):
            assert largest[n] > 0.01
            assert torch.equal(got[n] * 2.0**-power, want[n]), f"2^{power}"


@each_pair
def test_small_weights_of_many_keys_keep_their_bits(pair: Pair) -> None:
    """P is about 2^-10 and grad_out 2^-10, so that dS is subnormal in float16, or 0: there torch's
    own has an error of some per cent."""
    call = cases_backward.call_of(Case(17, 1000, q_is_f32=True), pair)
    made = torch.Generator().manual_seed(2)
    dout = torch.randn(call.query.shape, generator=made) * 2.0**-10
    call = replace(call, grad_out=dout.to(DTYPES[pair.dtype]), grad_lse=None)
    want = backward_oracle.gradients(call.grad_out, None, call.query, call.key, call.value)[0]
    error = run(pair, call).grads[0].double().numpy() - want
    assert np.linalg.norm(error) <= (0.006 if pair.dtype == "BF16" else 0.001) * np.linalg.norm(
        want
    )


@each_pair
def test_offsets_beyond_two_to_the_31(pair: Pair) -> None:
    """The last element of each operand lies over 2^31 elements behind its first one, as in
    test_emu_kernels.py."""
    if not is_short(pair):
        return
    dtype, head_dim = DTYPES[pair.dtype], pair.head_dim
    memory = cases.reserved(2**32 + 2**16, dtype)
    if memory is None:
        pytest.skip("this system does not lend address space without memory behind it")
    for dim in (0, 1, 2):
        shape, stride = [2, 3, 2, head_dim], [6 * head_dim, 2 * head_dim, head_dim, 1]
        stride[dim] = 2**31 // (shape[dim] - 1) + head_dim
        near = cases_backward.call_of(Case(3, 3, 2, 2, 2), pair)
        near = replace(near, grad_lse=None, grad_out=near.grad_out.contiguous())
        far = near
        for n, name in enumerate(("query", "key", "value", "out", "grad_out")):
            view = memory.as_strided(shape, stride, 2**31 + 4096 * n).copy_(getattr(near, name))
            given: dict[str, Any] = {name: view}
            far = replace(far, **given)
        got = run(pair, far)
        for a, b in zip(got.grads, run(pair, near).grads, strict=True):
            assert torch.equal(a, b)


def test_what_is_known_of_each_row() -> None:
    """lse in base 2, delta, the sum of |dout|: numpy says the same; and each row's numbers stand a
    second time with the row before it."""
    pair = pairs()[0]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        call = cases_backward.call_of(Case(40, 25, 2, 4, 2, q_lens=(40, 31), k_lens=(25, 9)), pair)
        made = torch.Generator().manual_seed(3)
        dout = torch.randn(call.query.shape, generator=made).to(dtype)
        dlse = torch.randn(2, 40, 4, generator=made).transpose(1, 2)
        call = replace(call, grad_out=dout, grad_lse=dlse, is_causal=True)
        rows, sizes = row_numbers(call, with_sizes=True)
        assert sizes is not None
        rounded = dout.to(torch.float16) if dtype == torch.float32 else dout
        for b, (len_q, len_k) in enumerate(((40, 25), (31, 9))):
            seen = oracle.visible(len_q, len_k, True, (-1, -1))
            for i in range(40):
                keys = int(seen[i].sum()) if i < len_q else 0
                lse, delta = rows[b, :, i, 0], rows[b, :, i, 1].double()
                if keys == 0:
                    assert (
                        (lse == math.inf).all() and (delta == 0).all() and not sizes[b, :, i].any()
                    )
                    continue
                torch.testing.assert_close(
                    lse, call.lse[b, :, i] / math.log(2.0), rtol=2e-7, atol=0
                )
                want = -dlse[b, :, i].double()
                if keys > 1:
                    want += (rounded[b, i].double() * call.out[b, i].double()).sum(-1)
                # Of a sum that is rounded once, and its difference from dlse.
                error = (delta - want).abs() - 2.0**-24 * (
                    want.abs() + (want + dlse[b, :, i]).abs()
                )
                assert error.max() < 1e-10
                torch.testing.assert_close(sizes[b, :, i], rounded[b, i].float().abs().sum(-1))
        assert torch.equal(rows[:, :, 1:, :2], rows[:, :, :-1, 2:])
        assert (rows[:, :, -1, 2] == math.inf).all() and not rows[:, :, -1, 3].any()


def test_dtypes_are_those_of_the_list() -> None:
    assert {pair.dtype for pair in pairs()} <= set(DTYPES)
