# SPDX-License-Identifier: Apache-2.0
"""test_traced.py - torch.ops.wan_attn.attention, which is what compilers see of the selection.

test_compile.py compiles the public functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import standins
from calls import BF16, F32, operands, poisoned
from wan_attn.attention import flash_attention, sdpa


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    standins.reset()
    yield
    standins.reset()


SAMPLES: tuple[tuple[Any, ...], ...] = (
    (None, None, None, False, -1, -1, False, None, None),
    (torch.tensor([3, 17]), torch.tensor([33, 0]), 0.3, True, 5, -1, True, None, None),
    (None, torch.tensor([9, 33], dtype=torch.int32), None, False, -1, -1, False, BF16, 2),
)


@pytest.mark.parametrize("sample", range(len(SAMPLES)))
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(sample: int, needs_grad: bool) -> None:
    q, k, v = (x.requires_grad_(needs_grad) for x in operands(batch=2, head_dim=16, dtype=F32))
    torch.library.opcheck(torch.ops.wan_attn.attention.default, (q, k, v, *SAMPLES[sample]))


def test_the_op_is_the_function() -> None:
    q, k, v = operands(batch=2, dtype=(F32, F32, BF16))
    lens = torch.tensor([33, 4])
    out, lse = torch.ops.wan_attn.attention(
        q, k, v, None, lens, None, False, -1, -1, True, None, None
    )
    want = sdpa(q, k, v, k_lens=lens, return_lse=True)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1]) and out.is_contiguous()


def test_the_op_returns_the_dtype_of_query_whatever_it_computes_in() -> None:
    q, k, v = operands(dtype=(BF16, F32, F32))
    arguments = (None, None, None, False, -1, -1, False, torch.float16, None)
    out, _ = torch.ops.wan_attn.attention(q, k, v, *arguments)
    assert out.dtype == BF16 and out.is_contiguous()


def test_the_ops_gradient_is_the_functions() -> None:
    q, k, v = operands(batch=2, dtype=F32)
    lens = torch.tensor([33, 4])
    grads = []
    for through_op in (False, True):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        if through_op:
            out, lse = torch.ops.wan_attn.attention(
                *inputs, None, lens, 0.2, True, -1, -1, True, None, None
            )
        else:
            out, lse = sdpa(*inputs, k_lens=lens, scale=0.2, is_causal=True, return_lse=True)
        (out.sum() + lse.nan_to_num(neginf=0.0).mul(0.1).sum()).backward()
        grads.append([x.grad for x in inputs])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_meta_and_fake_tensors_go_through_the_op() -> None:
    q, k, v = (x.to("meta") for x in operands(batch=2, dtype=BF16))
    out = flash_attention(q, k, v)
    assert out.shape == q.shape and out.is_meta and out.dtype == BF16
    both = sdpa(q, k, v, return_lse=True)
    assert both[1].shape == (2, 2, 17) and both[1].dtype == F32
    with torch._subclasses.FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in operands(batch=2, dtype=BF16))
        out = flash_attention(q, k, v, k_lens=mode.from_tensor(torch.tensor([3, 3])))
        assert out.shape == q.shape


def test_a_last_stride_that_is_not_1() -> None:
    q, k, v = operands(batch=2, dtype=BF16)
    sideways = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    want: Any = sdpa(q, k, v)
    got: Any = sdpa(q, sideways, v)
    assert torch.equal(want, got)
    call = torch.compile(lambda k: sdpa(q, k, v), fullgraph=True, backend="aot_eager")
    compiled: Any = call(sideways)
    assert torch.equal(want, compiled)


@pytest.mark.parametrize("wrong", [None, [1.0], 3])
def test_what_is_no_tensor_is_refused(wrong: Any) -> None:
    _, k, v = operands(dtype=BF16)
    with pytest.raises(RuntimeError, match="query must be a tensor"):
        sdpa(wrong, k, v)
    with pytest.raises(RuntimeError, match="value must be a tensor"):
        sdpa(k, k, wrong)


@pytest.mark.compile
def test_dropout_under_compile_with_a_gradient() -> None:
    """The forward's dropout is the backward's, with no graph break; lengths are not read."""
    q, k, v = operands(batch=2, seqlen_q=33, heads_q=4, head_dim=16, dtype=F32)
    lens = torch.tensor([33, 20])
    call = torch.compile(
        lambda q, k, v: flash_attention(q, k, v, k_lens=lens, dropout_p=0.4, dtype=F32),
        fullgraph=True,
        backend="aot_eager",
    )
    k, v = poisoned(k, [33, 20]), poisoned(v, [33, 20])
    v.requires_grad_()
    out = call(q, k, v)
    # d(sum of out)/dv is the column sums of the dropped weights, so v · grad = sum of out.
    out.sum().backward()
    assert v.grad is not None and v.grad.isfinite().all()
    total = (v.detach().nan_to_num(0.0) * v.grad).sum()
    torch.testing.assert_close(total, out.detach().sum(), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(out, flash_attention(q, k, v.detach(), k_lens=lens, dtype=F32))
