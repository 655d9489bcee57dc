# SPDX-License-Identifier: Apache-2.0
"""test_limits.py - what docs/limits.md says of transforms, subclasses, autocast, copies, export."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import wan_attn
from test_transforms import FUNCTIONS
from wan_attn import config

Q, K, V = torch.randn(3, 2, 7, 2, 16, generator=torch.Generator().manual_seed(0)).unbind()


def ours(query: Tensor, key: Tensor = K, value: Tensor = V) -> Tensor:
    return cast(Tensor, wan_attn.sdpa(query, key, value))


def torchs(query: Tensor, key: Tensor = K, value: Tensor = V) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Tagged(Tensor):
    """A subclass that does nothing of its own."""


class Recording(Tensor):
    """One that sees every function of torch's that is called with it."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call] # torch's


class Dispatched(Tensor):
    """One that holds another tensor and sees every operator: quantisers' and DTensor's kind."""

    ops: ClassVar[list[str]] = []
    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Dispatched:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares it as one of its own functions
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cls.ops.append(str(func))
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, cls) else x, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(32, 96)
        self.attention = ours

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 16)).unbind(2)
        return self.attention(query, key, value).flatten(2)


def assert_same(out: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


def test_vmap() -> None:
    batched = [torch.stack((x, 2 * x)) for x in (Q, K, V)]
    out = torch.func.vmap(ours)(*batched)
    assert_same(out[1], torchs(2 * Q, 2 * K, 2 * V))


def test_reverse_mode() -> None:
    want = torch.func.vjp(torchs, Q)[1](V)[0]
    assert float(want.abs().max()) > 0.01
    assert_same(torch.func.vjp(ours, Q)[1](V)[0], want)
    grads = [torch.func.grad(lambda q, f=f: f(q).square().sum())(Q) for f in (ours, torchs)]
    assert_same(*grads)
    rows = [torch.func.jacrev(lambda q, f=f: f(q).sum((1, 2, 3)))(Q) for f in (ours, torchs)]
    assert_same(*rows)


def test_a_subclass_stays_one() -> None:
    out = ours(Q.as_subclass(Tagged))
    assert type(out) is Tagged
    assert_same(out.as_subclass(Tensor), torchs(Q))


def test_a_subclass_sees_what_is_computed() -> None:
    """Its own functions are asked: memory is not read behind its back."""
    out = ours(Q.as_subclass(Recording))
    assert type(out) is Recording and any("wan_attn" in str(f) for f in Recording.seen)
    out = ours(*(Dispatched(x) for x in (Q, K, V)))
    assert isinstance(out, Dispatched) and torch.equal(out.held, ours(Q))
    assert any(op.startswith("wan_attn") for op in Dispatched.ops)


def test_lengths_that_cannot_be_read() -> None:
    lens = Dispatched(torch.tensor([7, 7]))
    with pytest.raises(RuntimeError, match="k_lens must be a tensor whose .*, got a Dispatched"):
        wan_attn.sdpa(Q, K, V, k_lens=lens)


def test_a_tensor_spread_over_processes_is_refused() -> None:
    """torch has no sharding rule for our ops, and its words name no argument."""
    spread = type("DTensor", (Tensor,), {})
    for index, name in enumerate(("query", "key", "value")):
        operands = [Q, K, V]
        operands[index] = operands[index].as_subclass(spread)
        with pytest.raises(RuntimeError, match=rf"{name} must be .*to_local.*, got a DTensor"):
            ours(*operands)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_default_dtype_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """What a function makes for itself takes its dtype from the operands."""
    want = FUNCTIONS[name](Q)
    before = torch.get_default_dtype()
    config.forget()  # what was kept of the call above
    try:
        torch.set_default_dtype(dtype)
        out = FUNCTIONS[name](Q)
    finally:
        torch.set_default_dtype(before)
    assert out.dtype == want.dtype and torch.equal(out, want)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("wants_grad", [False, True])
def test_another_default_device_changes_nothing(name: str, wants_grad: bool) -> None:
    q = Q.clone().requires_grad_(wants_grad)
    want = FUNCTIONS[name](q)
    config.forget()
    with torch.device("meta"):
        assert torch.equal(FUNCTIONS[name](q), want)


def test_layouts_and_dtypes_that_are_refused() -> None:
    jagged = torch.nested.nested_tensor([Q[0], Q[1]], layout=torch.jagged)
    for query in (jagged, Q.to_sparse(), Q.double(), Q.bfloat16()):
        with pytest.raises(RuntimeError, match="wan_attn: query must (be|have)"):
            ours(query)


def test_autocast_changes_nothing() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(Q)
    assert out.dtype == torch.float32 and torch.equal(out, ours(Q))


def test_copies_export_and_checkpointing() -> None:
    layer, x = Layer(), torch.randn(1, 5, 32)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), want)
    graph = torch.export.export(layer, (x,))
    assert_same(graph.module()(x), want)
    assert sum("wan_attn" in str(node.target) for node in graph.graph.nodes) == 1
    plain = torch.autograd.grad(want.square().sum(), layer.project.weight)[0]
    for use_reentrant in (False, True):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        checkpoint(layer, given, use_reentrant=use_reentrant).square().sum().backward()
        assert layer.project.weight.grad is not None
        assert_same(layer.project.weight.grad, plain)
