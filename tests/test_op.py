# SPDX-License-Identifier: Apache-2.0
"""test_op.py - torch.ops.wan_attn.sdpa as torch sees it: schema, fake, meta, export, opcheck."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import calls
from calls import BF16, F16, F32, operands
from tolerances import assert_close_to_oracle
from wan_attn.native import bindings, op
from wan_attn.request import Request

OP = torch.ops.wan_attn.sdpa

SCHEMA = (
    "wan_attn::sdpa(Tensor query, Tensor key, Tensor value, Tensor? q_lens=None, "
    "Tensor? k_lens=None, Tensor? block_counts=None, Tensor? block_indices=None, *, "
    "float? scale=None, bool is_causal=False, int window_left=-1, "
    "int window_right=-1, bool return_lse=False, int kernel=-1,"
    " bool out_like_value=False, int precision=0, bool pools_others=False,"
    " float skip_threshold=0.) -> (Tensor out, Tensor lse)"
)


def lens(*n: int) -> torch.Tensor:
    return torch.tensor(n, dtype=torch.int32)


def samples() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """name -> (args, kwargs): one call of each kind."""
    qkv = torch.randn(2, 9, 3, 2, 16)
    return {
        "plain": (operands(), {}),
        "lengths": (
            (*operands(batch=2), lens(17, 3), torch.tensor([33, 8])),
            {"is_causal": True, "return_lse": True},
        ),
        "window": (operands(dtype=BF16), {"window_left": 4, "window_right": 2, "scale": 0.3}),
        "fused_qkv": (qkv.unbind(2), {"return_lse": True}),
        "mixed": (operands(dtype=(F32, F32, BF16), heads_q=4, heads_k=2), {}),
        "heads_first": (tuple(map(calls.from_heads_first, operands(dtype=F16))), {}),
        "empty": (operands(seqlen_k=0), {"return_lse": True}),
        "lossy": (operands(dtype=BF16), {"precision": 1, "return_lse": True}),
    }


NAMES = tuple(samples())


def test_schema() -> None:
    assert str(OP.default._schema) == SCHEMA
    assert OP.overloads() == ["default"]
    assert op.SCHEMA in SCHEMA


def test_binding(binding: str) -> None:
    """Says which one this is, and why not a better one."""
    assert binding in ("shim", "ctypes", "torch")
    assert bool(op.binding_reason()) == (binding != "shim")
    assert bool(op.kernels()) or binding == "torch"


# What autograd registers does not depend on the kind of call: three of them will do with gradients.
OPCHECKS = [(name, False) for name in NAMES] + [(n, True) for n in ("plain", "lengths", "mixed")]


@pytest.mark.parametrize(("name", "needs_grad"), OPCHECKS)
def test_opcheck(name: str, needs_grad: bool) -> None:
    """Torch's four: schema, autograd registration, fake tensors, and dynamic shapes through AOT."""
    args, kwargs = samples()[name]
    args = tuple(x.detach().requires_grad_(needs_grad and x.is_floating_point()) for x in args)
    torch.library.opcheck(OP.default, args, kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_fake_and_meta_describe_what_eager_returns(name: str) -> None:
    args, kwargs = samples()[name]
    real = OP(*args, **kwargs)
    on_meta = OP(*(x.to("meta") for x in args), **kwargs)
    with FakeTensorMode() as mode:
        fake = OP(*(mode.from_tensor(x) for x in args), **kwargs)
    for eager, *others in zip(real, on_meta, fake, strict=True):
        for other in others:
            assert (other.shape, other.dtype) == (eager.shape, eager.dtype)
            assert other.stride() == eager.stride()
    assert [x.device.type for x in on_meta] == ["meta", "meta"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lossy"])
def test_result(name: str) -> None:
    """Contiguous, new, query's dtype; the lengths and the rest mean what the oracle means."""
    args, kwargs = samples()[name]
    before = [x.clone() for x in args]
    out, lse = OP(*args, **kwargs)
    query, key, value = args[:3]
    assert out.is_contiguous() and out.shape == query.shape and out.dtype == query.dtype
    assert not out.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True)), "inputs were changed"
    if not kwargs.pop("return_lse", False):
        assert lse.shape == (0, query.shape[2], query.shape[1]) and lse.dtype == F32
        lse = None
    window = (kwargs.pop("window_left", -1), kwargs.pop("window_right", -1))
    names = dict(zip(("q_lens", "k_lens"), args[3:], strict=False))
    assert_close_to_oracle(out, query, key, value, lse=lse, window=window, **names, **kwargs)


def test_precision_reaches_the_row(native: str) -> None:
    """A lossy row where it is asked for, whose error is its own; and words for another number."""
    (query, key, value), kwargs = samples()["lossy"]
    exact, _ = OP(query, key, value)
    lossy, _ = OP(query, key, value, **kwargs)
    assert op.kernels()[bindings.last_kernel()].is_lossy
    error = (lossy.double() - exact.double()).norm() / exact.double().norm()
    assert 1e-4 < error < 0.03
    for number in (-1, 2, 1 << 32):  # the last would wrap to 0
        for function in (OP, bindings.ctypes_sdpa):
            rule = "precision must be 0 \\(exact\\) or 1 \\(8-bit scores\\), got"
            with pytest.raises(RuntimeError, match=rule):
                function(query, key, value, precision=number)


def test_a_gradient_through_a_lossy_call_is_that_of_the_exact_one() -> None:
    (query, key, value), kwargs = samples()["lossy"]
    grads = []
    for options in ({}, kwargs):
        leaf = query.clone().requires_grad_()
        OP(leaf, key, value, **options)[0].sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_defaults_and_keywords() -> None:
    query, key, value = operands(batch=2)
    want, _ = OP(query, key, value)
    all_named, _ = OP(
        query=query,
        key=key,
        value=value,
        q_lens=None,
        k_lens=None,
        scale=None,
        is_causal=False,
        window_left=-1,
        window_right=-1,
        return_lse=False,
        kernel=-1,
    )
    assert torch.equal(want, all_named)
    assert torch.equal(OP.default(query, key, value)[0], want)
    assert torch.equal(OP(query, key, value, None, lens(33, 33))[0], want)


def test_inference_mode_and_no_grad() -> None:
    query, key, value = operands()
    want, _ = OP(query, key, value)
    with torch.inference_mode():
        assert torch.equal(OP(query, key, value)[0], want)
        made_inside = query.clone()
        assert torch.equal(OP(made_inside, key, value)[0], want)
    assert torch.equal(OP(made_inside, key, value)[0], want)
    with torch.no_grad():
        out, _ = OP(query.requires_grad_(), key, value)
    assert not out.requires_grad and torch.equal(out, want)


def test_autocast_leaves_the_call_alone() -> None:
    query, key, value = operands(dtype=(F32, F32, BF16))
    want, _ = OP(query, key, value)
    with torch.autocast("cpu", dtype=BF16):
        out, _ = OP(query, key, value)
    assert out.dtype == F32 and torch.equal(out, want)


def test_a_pending_minus_sign() -> None:
    """Torch can keep a negation outside the memory, as a bit of the tensor."""
    query, key, value = operands()
    negated = torch._neg_view(query)
    assert negated.is_neg()
    assert torch.equal(OP(negated, key, value)[0], OP(-query, key, value)[0])


def test_parameters_and_other_subclasses() -> None:
    query, key, value = operands()
    want, _ = OP(query, key, value)
    assert torch.equal(OP(torch.nn.Parameter(query, requires_grad=False), key, value)[0], want)
    subclass = type("Subclass", (torch.Tensor,), {})
    assert torch.equal(OP(query.as_subclass(subclass), key, value)[0], want)


def test_calls_from_many_threads() -> None:
    """Re-entrant: nothing is kept between calls."""
    inputs = [operands(seqlen_q=40 + n, seqlen_k=60 + n) for n in range(8)]
    want = [OP(*call, return_lse=True) for call in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = list(pool.map(lambda call: OP(*call, return_lse=True), inputs))
            for (a, b), (c, d) in zip(got, want, strict=True):
                assert torch.equal(a, c) and torch.equal(b, d)


class Attention(torch.nn.Module):
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, k_lens: torch.Tensor
    ) -> torch.Tensor:
        out: torch.Tensor = OP(query, key, value, None, k_lens, is_causal=True)[0]
        return out + 1


def test_export_with_dynamic_lengths() -> None:
    args = (*operands(batch=2), lens(33, 20))
    seqlen_q, seqlen_k = torch.export.Dim("seqlen_q", min=2), torch.export.Dim("seqlen_k", min=2)
    dynamic = ({1: seqlen_q}, {1: seqlen_k}, {1: seqlen_k}, None)
    program = torch.export.export(Attention(), args, dynamic_shapes=dynamic)
    assert [n.target for n in program.graph.nodes].count(OP.default) == 1
    assert torch.equal(program.module()(*args), Attention()(*args))
    longer = (*operands(batch=2, seqlen_q=50, seqlen_k=70), lens(64, 3))
    assert torch.equal(program.module()(*longer), Attention()(*longer))


def test_select_and_why_not_agree_with_the_op(native: str) -> None:
    query, key, value = operands()
    request = Request.from_tensors(query, key, value)
    row, why = op.select(request)
    assert row is not None and why == ""
    assert op.why_not(request, row.index) is None
    forced, _ = OP(query, key, value, kernel=row.index)
    assert torch.equal(forced, OP(query, key, value)[0])
    too_wide = Request.from_tensors(*operands(head_dim=257))
    nothing, why = op.select(too_wide)
    assert nothing is None
    for row in op.kernels():
        is_near = row.device == "cpu" and query.dtype in row.dtypes
        assert row.is_lossy or not is_near or row.name in why
        reason = op.why_not(too_wide, row.index)
        assert reason is not None and row.name in reason


def test_kernel_table(native: str) -> None:
    """Names are unique and in the grammar; the last row takes everything."""
    names = [row.name for row in op.kernels()]
    assert len(set(names)) == len(names)
    assert [row.index for row in op.kernels()] == list(range(len(names)))
    for row in op.kernels():
        assert row.name.startswith("sdpa_") and row.description and row.device in ("cpu", "cuda")
        assert (row.arch_min, row.arch_max) == (0, 0) or row.device == "cuda"
    assert op.kernels()[-1].name == "sdpa_ref", "the last resort takes every legal CPU call"
    assert op.build_info()
