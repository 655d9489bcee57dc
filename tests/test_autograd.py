# SPDX-License-Identifier: Apache-2.0
"""test_autograd.py - gradients of the op and of wan_attn.sdpa, against float64 autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import backward_oracle
import calls
import oracle
import wan_attn
from calls import BF16, F16, F32, operands, poisoned
from tolerances import FACTOR, FLOOR_ULP, ORDERS, ulp


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q_lens: list[int] | None = None,
    k_lens: list[int] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
) -> tuple[Tensor, Tensor]:
    """(out, lse) in the operands' dtype by torch's differentiable operators, sample by sample."""
    groups = query.shape[2] // key.shape[2]
    batch, seqlen_q, heads_q, head_dim = query.shape
    out = query.new_zeros(query.shape).to(value.dtype)
    lse = query.new_full((batch, heads_q, seqlen_q), -math.inf)
    lens_q = oracle.as_lengths(q_lens, batch, seqlen_q)
    lens_k = oracle.as_lengths(k_lens, batch, key.shape[1])
    outs, lses = [], []
    for b, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        seen = torch.from_numpy(oracle.visible(len_q, len_k, is_causal, window))
        rows = seen.any(1).nonzero()[:, 0]
        q = query[b, rows].transpose(0, 1)
        k = key[b, :len_k].repeat_interleave(groups, dim=1).transpose(0, 1)
        v = value[b, :len_k].repeat_interleave(groups, dim=1).transpose(0, 1)
        factor = head_dim**-0.5 if scale is None else scale
        scores = ((q @ k.transpose(1, 2)) * factor).masked_fill(~seen[rows], -math.inf)
        of_sample = scores.softmax(-1) @ v
        of_sample = of_sample.transpose(0, 1)
        outs.append(out[b].index_copy(0, rows, of_sample))
        lses.append(lse[b].index_copy(1, rows, scores.logsumexp(-1)))
    return torch.stack(outs), torch.stack(lses)


def gradients(
    function: Any,
    inputs: tuple[Tensor, ...],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    **call: Any,
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*leaves, **call)
    loss = (out.double() * grad_out).sum()
    if grad_lse is not None:
        loss = loss + torch.where(lse.isfinite(), lse.double() * grad_lse, 0.0).sum()
    return list(torch.autograd.grad(loss, leaves))


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_gradients_close(
    function: Any, inputs: tuple[Tensor, ...], grad_lse: bool = False, **call: Any
) -> None:
    """Each gradient is at most twice as far from float64's as torch's own in value's dtype."""
    grad_out = torch.randn(inputs[0].shape).double()
    for_lse = torch.randn(inputs[0].transpose(1, 2).shape[:3]).double() if grad_lse else None
    doubles = tuple(x.double() for x in inputs)
    want = gradients(reference, doubles, grad_out, for_lse, **call)
    lse_of_torch = None if for_lse is None else for_lse.float()
    torchs = [
        backward_oracle.of_torch(grad_out, lse_of_torch, *inputs, **call, order=order)
        for order in range(ORDERS)
    ]
    got = gradients(function, inputs, grad_out, for_lse, **call)
    names = ("query", "key", "value")
    for name, x, w, g, *ts in zip(names, inputs, want, got, *torchs, strict=True):
        assert g.dtype == x.dtype and g.shape == x.shape
        floor = FLOOR_ULP * ulp(inputs[2].dtype, largest(w))
        allowed = FACTOR * max(largest(torch.from_numpy(t) - w) for t in ts) + floor
        error = largest(g.double() - w)
        assert error <= allowed, f"gradient of {name}: {error:.2e}, allowed {allowed:.2e}"


def raw_op(query: Tensor, key: Tensor, value: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    return calls.sdpa(query, key, value, return_lse=True, **call)


def raw_op_without_lse(
    query: Tensor, key: Tensor, value: Tensor, **call: Any
) -> tuple[Tensor, Tensor]:
    return calls.sdpa(query, key, value, **call)


def public(query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Any:
    for name in ("q_lens", "k_lens"):
        call[name] = calls.as_lens(call.get(name))
    return wan_attn.sdpa(query, key, value, return_lse=True, **call)


def public_without_lse(
    query: Tensor, key: Tensor, value: Tensor, **call: Any
) -> tuple[Tensor, Tensor]:
    for name in ("q_lens", "k_lens"):
        call[name] = calls.as_lens(call.get(name))
    out: Any = wan_attn.sdpa(query, key, value, **call)
    return out, torch.empty(0)


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({"seqlen_q": 40, "seqlen_k": 40}, {"is_causal": True}),
    "rows_without_a_key": ({"seqlen_q": 40, "seqlen_k": 25}, {"is_causal": True}),
    "window": ({"seqlen_q": 40, "seqlen_k": 45}, {"window": (6, 2)}),
    "grouped_heads": ({"heads_q": 6, "heads_k": 2}, {}),
    "lengths": ({"batch": 3}, {"q_lens": [17, 4, 9], "k_lens": [20, 33, 0]}),
    "lengths_causal": ({"batch": 2}, {"q_lens": [17, 4], "k_lens": [20, 33], "is_causal": True}),
    "k_lens": ({"batch": 2}, {"k_lens": [20, 33]}),
    "scale": ({}, {"scale": -0.7}),
    "scale_zero": ({}, {"scale": 0.0}),
    "one_key": ({"seqlen_k": 1}, {}),
    "no_key": ({"seqlen_k": 0}, {}),
    "no_query": ({"seqlen_q": 0}, {}),
}
ROUTES = (raw_op, raw_op_without_lse, public, public_without_lse)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES, ids=lambda f: f.__name__)
def test_gradients(route: Any, kind: str) -> None:
    shape, call = KINDS[kind]
    assert_gradients_close(route, operands(**({"seqlen_q": 37, "head_dim": 16} | shape)), **call)


@pytest.mark.parametrize("route", (raw_op, public), ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ("plain", "causal", "rows_without_a_key", "lengths", "scale"))
def test_gradients_of_lse(route: Any, kind: str) -> None:
    shape, call = KINDS[kind]
    assert_gradients_close(
        route, operands(**({"seqlen_q": 37, "head_dim": 16} | shape)), grad_lse=True, **call
    )


@pytest.mark.parametrize("route", (raw_op, public), ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", (BF16, F16, (F32, F32, BF16)), ids=str)
def test_gradients_in_half_precision(route: Any, dtype: Any) -> None:
    inputs = operands(batch=2, seqlen_q=37, heads_q=4, heads_k=2, head_dim=16, dtype=dtype)
    assert_gradients_close(route, inputs, k_lens=[33, 12], is_causal=True)


@pytest.mark.parametrize("route", (raw_op, public), ids=lambda f: f.__name__)
def test_padding_gets_no_gradient_and_gives_no_nan(route: Any) -> None:
    query, key, value = operands(batch=2, head_dim=16)
    call = {"q_lens": [17, 5], "k_lens": [33, 7]}
    inputs = (
        poisoned(query, call["q_lens"]),
        poisoned(key, call["k_lens"]),
        poisoned(value, call["k_lens"]),
    )
    grad_out = torch.randn(query.shape).double()
    got = gradients(route, inputs, grad_out, None, **call)
    want = gradients(
        reference, (query.double(), key.double(), value.double()), grad_out, None, **call
    )
    for g, w in zip(got, want, strict=True):
        assert g.isfinite().all()
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)
    for g, n in zip(got, (5, 7, 7), strict=True):
        assert not g[1, n:].any()


@pytest.mark.parametrize(
    "route", (raw_op_without_lse, public_without_lse), ids=lambda f: f.__name__
)
def test_only_what_needs_a_gradient_gets_one(route: Any) -> None:
    query, key, value = operands(head_dim=16)
    out, _ = route(query, key, value.requires_grad_())
    assert out.requires_grad
    out.sum().backward()
    assert value.grad is not None
    torch.testing.assert_close(value.grad.sum(), torch.tensor(17.0 * 2 * 16))
    assert query.grad is None and key.grad is None
    with torch.no_grad():
        assert not route(query, key, value)[0].requires_grad
    assert not route(query, key, value.detach())[0].requires_grad


@pytest.mark.parametrize(
    "route", (raw_op_without_lse, public_without_lse), ids=lambda f: f.__name__
)
def test_a_training_step(route: Any) -> None:
    """Through a layer, views and an optimizer, as a user would: the loss goes down."""
    layer = torch.nn.Linear(16, 3 * 32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x, target = torch.randn(2, 12, 16), torch.randn(2, 12, 2, 16)
    losses = []
    for _ in range(5):
        out, _ = route(*layer(x).view(2, 12, 3, 2, 16).unbind(2))
        loss = F.mse_loss(out, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
