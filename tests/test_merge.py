# SPDX-License-Identifier: Apache-2.0
"""test_merge.py - merge_states against one softmax over all keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from calls import BF16, F16, F32, operands
from tolerances import assert_close_to_oracle
from wan_attn.merge import merge_states


def state(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out, lse = oracle.attention(q, k, v)
    return torch.from_numpy(out).to(dtype), torch.from_numpy(lse).float()


@pytest.mark.parametrize("cut", [0, 1, 16, 32, 33])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_two_parts_are_the_whole(cut: int, dtype: torch.dtype) -> None:
    q, k, v = operands(batch=2, dtype=dtype)
    out, lse = merge_states(
        *state(q, k[:, :cut], v[:, :cut], dtype), *state(q, k[:, cut:], v[:, cut:], dtype)
    )
    assert_close_to_oracle(out, q, k, v, lse=lse)


def test_many_parts_in_any_order() -> None:
    q, k, v = operands(seqlen_k=40, dtype=F32)
    parts = [state(q, k[:, i : i + 8], v[:, i : i + 8], F32) for i in range(0, 40, 8)]
    left, right = parts[0], parts[-1]
    for part in parts[1:]:
        left = merge_states(*left, *part)
    for part in reversed(parts[:-1]):
        right = merge_states(*part, *right)
    for out, lse in (left, right):
        assert_close_to_oracle(out, q, k, v, lse=lse)


def test_scores_far_apart_do_not_overflow() -> None:
    out1, out2 = torch.ones(1, 1, 1, 4), torch.full((1, 1, 1, 4), 3.0)
    for lse1, lse2 in ((1000.0, -1000.0), (1000.0, 1000.0), (-1000.0, -1000.0)):
        out, lse = merge_states(
            out1, torch.full((1, 1, 1), lse1), out2, torch.full((1, 1, 1), lse2)
        )
        if lse1 == lse2:
            assert out.eq(2).all() and lse.item() == pytest.approx(lse1 + math.log(2))
        else:
            assert out.eq(1).all() and lse.item() == lse1


@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf])
def test_a_side_that_saw_nothing_is_ignored_whatever_it_holds(garbage: float) -> None:
    q, k, v = operands(dtype=F32)
    out1, lse1 = state(q, k, v, F32)
    out2, lse2 = torch.full_like(out1, garbage), torch.full_like(lse1, -math.inf)
    for got in (merge_states(out1, lse1, out2, lse2), merge_states(out2, lse2, out1, lse1)):
        assert torch.equal(got[0], out1) and torch.equal(got[1], lse1)
    out, lse = merge_states(out2, lse2, out2, lse2)
    assert out.eq(0).all() and lse.eq(-math.inf).all()


def test_a_nan_stays_visible() -> None:
    q, k, v = operands(dtype=F32)
    out1, lse1 = state(q, k, v, F32)
    bad = lse1.clone()
    bad[0, 1, 2] = math.nan
    out, lse = merge_states(out1, bad, out1, lse1)
    assert out[0, 2, 1].isnan().all() and lse[0, 1, 2].isnan()
    assert out[0, 3].isfinite().all()


def test_a_merge_has_the_wider_of_both_dtypes() -> None:
    q, k, v = operands(dtype=F32)
    half, full = state(q, k, v, BF16), state(q, k, v, F32)
    assert merge_states(*half, *half)[0].dtype == BF16
    assert merge_states(*half, *full)[0].dtype == F32
    assert merge_states(*half, *half)[1].dtype == F32


def test_half_precision_is_rounded_once() -> None:
    """The weights, near a half each here, are not rounded to out's dtype before they are used."""
    one, lse = torch.ones(1, 1, 1, 1, dtype=BF16), torch.zeros(1, 1, 1)
    out, _ = merge_states(one, lse + 0.01, -one, lse)
    assert out.item() == torch.tensor(math.tanh(0.005)).to(BF16).item()


def test_gradients_flow_through_a_merge() -> None:
    q, k, v = (x.double() for x in operands(seqlen_q=3, heads_q=2, head_dim=2))
    out1, lse1 = (torch.from_numpy(x) for x in oracle.attention(q, k[:, :9], v[:, :9]))
    out2, lse2 = (torch.from_numpy(x) for x in oracle.attention(q, k[:, 9:], v[:, 9:]))
    inputs = [x.clone().requires_grad_() for x in (out1, lse1, out2, lse2)]
    assert torch.autograd.gradcheck(merge_states, inputs)
    with torch.no_grad():
        inputs[1][0, 0, 0] = inputs[3][0, 0, 0] = inputs[1][0, 1, 1] = -math.inf
    out, lse = merge_states(*inputs)
    (out.sum() + lse.nan_to_num(neginf=0.0).sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(1, 3, 2)}, r"out1 must be \[batch, .* got \[1, 3, 2\]"),
        ({2: torch.zeros(1, 4, 2, 8)}, r"out2 must be .* like out1, got \[1, 4, 2, 8\]"),
        ({1: torch.zeros(1, 3, 2)}, r"lse1 must be .* of out1, got \[1, 3, 2\]"),
        ({3: torch.zeros(2, 3)}, r"lse2 must be .* of out2, got \[2, 3\]"),
        ({1: None}, "lse1 must be a tensor, got None"),
        ({0: torch.zeros(1, 3, 2, 8).int()}, r"out1 must be .* or float64, got torch.int32"),
        ({3: torch.zeros(1, 2, 3).half()}, "lse2 must be float32 or float64, got torch.float16"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[int, Any], message: str) -> None:
    arguments: list[Any] = [torch.zeros(1, 3, 2, 8), torch.zeros(1, 2, 3)] * 2
    for index, tensor in change.items():
        arguments[index] = tensor
    with pytest.raises(RuntimeError, match=message):
        merge_states(*arguments)
