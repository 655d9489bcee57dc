# SPDX-License-Identifier: Apache-2.0
"""test_transforms.py - torch.func and forward-mode AD: the right result, or a refusal by name.

Every public function that takes operands, and both ops, by every transform.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import wan_attn

Q, K, V = torch.randn(3, 2, 7, 2, 16, generator=torch.Generator().manual_seed(0)).unbind()
LENS = torch.tensor([4, 7])
BEGINS = torch.tensor([0, 5, 14])
TRIL = torch.ones(7, 7, dtype=torch.bool).tril()
NO_OPTIONS = (None, None, None, False, -1, -1, False, None, None)

Attention = Callable[..., Any]


def wrapper(method: str) -> Attention:
    return lambda q, k=K, v=V: wan_attn.windows_flash_attention_wrapper(
        q, k, v, method=method, max_elements=64
    )


def varlen(q: Tensor, k: Tensor = K, v: Tensor = V) -> Any:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return wan_attn.flash_attn_varlen_func(q, k, v, BEGINS, BEGINS, 9, 9)


def sage_masked(q: Tensor, k: Tensor = K, v: Tensor = V) -> Any:
    return wan_attn.sageattn(q, k, v, tensor_layout="NHD", attn_mask=TRIL)


FUNCTIONS: dict[str, Attention] = {
    "sdpa": lambda q, k=K, v=V: wan_attn.sdpa(q, k, v),
    "sdpa lens": lambda q, k=K, v=V: wan_attn.sdpa(q, k, v, k_lens=LENS, is_causal=True),
    "sdpa lse": lambda q, k=K, v=V: wan_attn.sdpa(q, k, v, return_lse=True)[1],
    "op sdpa": lambda q, k=K, v=V: torch.ops.wan_attn.sdpa(q, k, v)[0],
    "op attention": lambda q, k=K, v=V: torch.ops.wan_attn.attention(q, k, v, *NO_OPTIONS)[0],
    "flash_attention": lambda q, k=K, v=V: wan_attn.flash_attention(q, k, v, dtype=torch.float32),
    "flash_attn_func": lambda q, k=K, v=V: wan_attn.flash_attn_func(q, k, v, causal=True),
    "qkvpacked": lambda q, k=K, v=V: wan_attn.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2)),
    "varlen": varlen,
    "sageattn": lambda q, k=K, v=V: wan_attn.sageattn(q, k, v, tensor_layout="NHD"),
    "sageattn masked": sage_masked,
    **{f"wrapper {method}": wrapper(method) for method in ("rows", "direct", "chunked", "ring")},
}
each = pytest.mark.parametrize("name", FUNCTIONS)

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # torch's, of vmap
]


def dual(function: Attention, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


def both(x: Tensor) -> Tensor:
    return torch.stack((x, 2 * x))


FORWARD: dict[str, Callable[[Attention], Any]] = {
    "jvp": lambda f: jvp(f, (Q,), (Q,)),
    "jvp of key": lambda f: jvp(lambda k: f(Q, k), (K,), (K,)),
    "dual": lambda f: dual(f, Q),
    "dual of key": lambda f: dual(lambda k: f(Q, k), K),
    "jacfwd": lambda f: jacfwd(f)(Q),
    "hessian": lambda f: hessian(lambda q: f(q).square().sum())(Q),
    "vmap of jvp": lambda f: vmap(lambda q: jvp(f, (q,), (q,))[1])(both(Q)),
    "jvp of vmap": lambda f: jvp(vmap(f), (both(Q),), (both(Q),)),
}


@each
def test_forward_mode_is_refused(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing else comes: no tangent of 0, no words of torch's; and no backend is blamed."""
    function = FUNCTIONS[name]
    before = function(Q)
    said = r"^wan_attn: (query|key|q|k|qkv) must be without a tangent of forward-mode AD .*, got "
    for transform in FORWARD.values():
        with caplog.at_level(logging.WARNING, "wan_attn"), pytest.raises(RuntimeError, match=said):
            transform(function)
    assert "failed at run time" not in caplog.text
    assert torch.equal(function(Q), before)


@pytest.mark.parametrize("name", ["sdpa", "op sdpa", "sageattn masked"])
def test_forward_mode_is_refused_by_a_compiled_function(name: str) -> None:
    def tangent(q: Tensor) -> Any:
        return jvp(FUNCTIONS[name], (q,), (q,))[1]

    with pytest.raises(RuntimeError, match="must be without a tangent of forward-mode AD"):
        torch.compile(tangent, backend="aot_eager")(Q)


def test_what_needs_no_tangent_works_within_forward_mode() -> None:
    for function in FUNCTIONS.values():
        with forward_ad.dual_level():
            out = function(Q)
        assert torch.equal(out, function(Q))


def test_merge_states_has_forward_mode() -> None:
    lse = torch.randn(2, 2, 7)

    def merge(x: Tensor) -> Tensor:
        return wan_attn.merge_states(x, lse, K, 2 * lse)[0]

    assert torch.allclose(
        jvp(merge, (Q,), (V,))[1], merge(V) - merge(torch.zeros_like(V)), atol=1e-5
    )


def by_hand(function: Attention) -> Tensor:
    leaf = Q.clone().requires_grad_()
    function(leaf).square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@each
def test_reverse_mode(name: str, caplog: pytest.LogCaptureFixture) -> None:
    function = FUNCTIONS[name]
    want = by_hand(function)
    assert float(want.abs().max()) > 0.01

    def loss(q: Tensor) -> Any:
        return function(q).square().sum()

    with caplog.at_level(logging.WARNING, "wan_attn"):
        found = [
            grad(loss)(Q),
            vjp(loss, Q)[1](torch.tensor(1.0))[0],
            jacrev(loss)(Q),
            vmap(grad(loss))(both(Q))[0],
            grad(lambda q: vmap(function)(q).square().sum())(both(Q))[0],
        ]
    for gradient in found:
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-4)
    assert "failed at run time" not in caplog.text


@each
def test_vmap(name: str) -> None:
    function = FUNCTIONS[name]
    samples = [both(x).unbind() for x in (Q, K, V)]
    want = torch.stack([function(*one) for one in zip(*samples, strict=True)])
    found = vmap(function)(*(both(x) for x in (Q, K, V)))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    found = vmap(lambda k: function(Q, k))(both(K))  # query is shared
    want = torch.stack([function(Q, K), function(Q, 2 * K)])
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def lengths_of(name: str) -> Attention:
    """A function of k_lens alone."""
    return {
        "sdpa": lambda n: wan_attn.sdpa(Q, K, V, k_lens=n),
        "sdpa masked": lambda n: wan_attn.sdpa(Q, K, V, k_lens=n, q_lens=n, is_causal=True),
        "sdpa lse": lambda n: wan_attn.sdpa(Q, K, V, k_lens=n, return_lse=True)[1],
        "sdpa grad": lambda n: grad(lambda q: wan_attn.sdpa(q, K, V, k_lens=n).square().sum())(Q),  # type: ignore[union-attr]
        "op": lambda n: torch.ops.wan_attn.sdpa(Q, K, V, None, n)[0],
        "flash_attention": lambda n: wan_attn.flash_attention(Q, K, V, k_lens=n),
        "rows": lambda n: wan_attn.windows_flash_attention_wrapper(
            Q, K, V, k_lens=n, method="rows", max_elements=64
        ),
        "ring": lambda n: wan_attn.windows_flash_attention_wrapper(
            Q, K, V, k_lens=n, method="ring", max_elements=64
        ),
        "varlen": lambda n: wan_attn.flash_attn_varlen_func(
            Q.flatten(0, 1), K.flatten(0, 1), V.flatten(0, 1), BEGINS, n.cumsum(0), 9, 9
        ),
    }[name]


OF_LENGTHS = (
    "sdpa",
    "sdpa masked",
    "sdpa lse",
    "sdpa grad",
    "op",
    "flash_attention",
    "rows",
    "ring",
)


@pytest.mark.parametrize("name", OF_LENGTHS)
def test_lengths_of_each_sample(name: str) -> None:
    function = lengths_of(name)
    lens = torch.tensor([[4, 7], [1, 3], [0, 7]])
    want = torch.stack([function(one) for one in lens])
    torch.testing.assert_close(vmap(function)(lens), want, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"^wan_attn: [qk]_lens must be between 0 and .*, got 9"):
        vmap(function)(lens + torch.tensor([0, 2]))


def test_begins_of_each_sample() -> None:
    lens = torch.tensor([[0, 4, 7], [0, 1, 3], [1, 8, 5]])
    function = lengths_of("varlen")
    want = torch.stack([function(one) for one in lens])
    torch.testing.assert_close(vmap(function)(lens), want, rtol=0, atol=1e-5)


def test_a_failure_under_a_transform_is_no_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    from wan_attn.selection import run

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("not under vmap")

    before = wan_attn.sdpa(Q, K, V)
    for plan in run._plans.values():
        monkeypatch.setattr(plan, "run", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vmap(lambda q: wan_attn.sdpa(q, K, V))(both(Q))
    monkeypatch.undo()
    assert not any(plan.failed for plan in run._plans.values())
    assert torch.equal(wan_attn.sdpa(Q, K, V), before)  # type: ignore[arg-type]
