# SPDX-License-Identifier: Apache-2.0
"""test_compile.py - torch.compile(fullgraph=True): no graph break, no recompilation per length.

Most of it compiles to aot_eager, which traces and functionalises as inductor does but generates no
code: a graph break or a wrong fake shows there, in a tenth of the time. Inductor itself runs once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import calls
import wan_attn
from calls import BF16, F32, operands
from tolerances import assert_close_to_oracle

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend that counts how often it is asked to compile."""

    def __init__(self, backend: str) -> None:
        self.compile, self.count = torch._dynamo.lookup_backend(backend), 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        self.count += 1
        return self.compile(graph, example)


def raw_op(query: Tensor, key: Tensor, value: Tensor, k_lens: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.wan_attn.sdpa(query, key, value, None, k_lens)[0]
    return out


def public(query: Tensor, key: Tensor, value: Tensor, k_lens: Tensor | None = None) -> Tensor:
    out = wan_attn.sdpa(query, key, value, k_lens=k_lens)
    assert isinstance(out, Tensor)
    return out


def wan22(query: Tensor, key: Tensor, value: Tensor, k_lens: Tensor | None = None) -> Tensor:
    return wan_attn.flash_attention(query, key, value, k_lens=k_lens, dtype=value.dtype)


FUNCTIONS = pytest.mark.parametrize("function", (raw_op, public, wan22), ids=lambda f: f.__name__)


def block(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention between operators that a compiler would fuse, as in a transformer block."""

    def run(query: Tensor, key: Tensor, value: Tensor, k_lens: Tensor | None = None) -> Tensor:
        out = function(query * 1.5, key, value + 1, k_lens)
        return out.flatten(2) * 2 + out.mean()

    return run


@FUNCTIONS
def test_dynamic_lengths_compile_once(function: Callable[..., Tensor]) -> None:
    counter, counts = Counter("aot_eager"), []
    compiled = torch.compile(block(function), fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for seqlen_q, seqlen_k in ((17, 33), (40, 50), (129, 64)):
            call = operands(batch=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=4, heads_k=2)
            k_lens = torch.tensor([seqlen_k, seqlen_k // 2])
            assert torch.equal(compiled(*call, k_lens), block(function)(*call, k_lens))
            counts.append(counter.count)
    # Dynamo may restart its analysis of the first call and ask the backend again; not after it.
    assert counts[0] == counts[-1], counts


@FUNCTIONS
def test_half_precision_and_views(function: Callable[..., Tensor]) -> None:
    """What Wan2.2 passes: float32 query and key, bfloat16 value, views, no lengths."""

    def attend(q_and_k: Tensor, value: Tensor) -> Tensor:
        query, key = q_and_k.unbind(2)
        return function(query, key, value.transpose(1, 2))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q_and_k, value = torch.randn(1, 33, 2, 2, 64), torch.randn(1, 2, 33, 64).to(BF16)
    with torch.inference_mode():
        out = compiled(q_and_k, value)
        assert out.dtype == F32 and torch.equal(out, attend(q_and_k, value))


@FUNCTIONS
def test_gradients(function: Callable[..., Tensor]) -> None:
    inputs = operands(head_dim=16)
    results = []
    compiled = torch.compile(block(function), fullgraph=True, backend="aot_eager")
    for run in (block(function), compiled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        run(*leaves).square().sum().backward()
        results.append([x.grad for x in leaves])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_inductor() -> None:
    """All three in one graph, so that code is generated once; views that inductor may re-lay."""

    def all_three(query: Tensor, key: Tensor, value: Tensor, k_lens: Tensor) -> list[Tensor]:
        heads_first = key.transpose(1, 2).contiguous().transpose(1, 2)
        return [
            function(query * 1.0, heads_first, value, k_lens) + 0
            for function in (raw_op, public, wan22)
        ]

    counter, counts = Counter("inductor"), []
    compiled = torch.compile(all_three, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for seqlen_k in (33, 64, 71):
            query, key, value = operands(batch=2, seqlen_k=seqlen_k)
            k_lens = torch.tensor([seqlen_k, 9])
            for out in compiled(query, key, value, k_lens):
                assert_close_to_oracle(out, query, key, value, k_lens=k_lens)
            counts.append(counter.count)
    assert counts[0] == counts[-1], counts


def test_bad_arguments_are_refused_while_tracing() -> None:
    query, key, value = operands()
    compiled = torch.compile(raw_op, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="value must be shaped like key"):
        compiled(query, key, value[:, 1:])
    torch._dynamo.reset()
    assert torch.equal(compiled(query, key, value), calls.sdpa(query, key, value)[0])
