# SPDX-License-Identifier: Apache-2.0
"""test_backward_op.py - the op sdpa_backward and what uses it: autograd, compilers, checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

import wan_attn
from calls import BF16, F32, operands
from wan_attn import config
from wan_attn.backends import native as backend
from wan_attn.native import autograd, backward
from wan_attn.request import Call, Request
from wan_attn.workloads import parse_shape

OP = torch.ops.wan_attn.sdpa_backward
pytestmark = pytest.mark.usefixtures("native")


def inputs(dtype: Any = F32, **shape: Any) -> tuple[Any, ...]:
    """(grad_out, None, query, key, value, out, lse)"""
    query, key, value = operands(dtype=dtype, **shape)
    out, lse = torch.ops.wan_attn.sdpa(query, key, value, return_lse=True)
    return torch.randn_like(out), None, query, key, value, out, lse


def loss_of(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Any = wan_attn.sdpa(query, key, value, is_causal=True)
    result: Tensor = out.float().square().sum()
    return result


def gradients(function: Any, *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    function(*leaves).backward()
    return [x.grad for x in leaves if x.grad is not None]


@pytest.mark.parametrize("with_lse", (False, True))
def test_opcheck(with_lse: bool) -> None:
    args = list(inputs(batch=2, head_dim=16))
    if with_lse:
        args[1] = torch.randn_like(args[6])
    lens = (torch.tensor([17, 3]), torch.tensor([5, 33]))
    torch.library.opcheck(OP, (*args, *lens), {"is_causal": True})


def test_our_kernels_are_chosen_where_they_are_fast() -> None:
    _, _, query, key, value, *_ = inputs(seqlen_q=33)
    vars(backward._here).clear()
    request = Request.from_tensors(query, key, value, Call(), needs_grad=True)
    name = backward.chosen(request)
    is_fast = name != backward.PORTABLE
    assert (backend.why_not(request) is None) == is_fast
    loss_of(query.requires_grad_(), key, value).backward()
    if is_fast:
        assert backward.last_kernel() == name


def test_few_rows_are_left_to_torch() -> None:
    for rows in (autograd.FEW_ROWS, autograd.FEW_ROWS + 1):
        vars(backward._here).clear()
        gradients(loss_of, *operands(seqlen_q=rows))
        assert (backward.last_kernel() is None) == (rows == autograd.FEW_ROWS)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    query, key, value = (x.requires_grad_() for x in operands(seqlen_q=33, head_dim=16))
    out, _ = torch.ops.wan_attn.sdpa(query, key, value)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="sdpa must be differentiated once"):
        grad.sum().backward()


def test_what_is_wrong_is_said() -> None:
    args = inputs()
    with pytest.raises(RuntimeError, match="wan_attn: grad_out must be shaped like query"):
        OP(args[0][:, 1:], *args[1:])
    with pytest.raises(RuntimeError, match="wan_attn: lse must be float32"):
        OP(*args[:6], args[6][:0])
    with pytest.raises(RuntimeError, match="wan_attn: kernel must be -1"):
        OP(*args, kernel=99)
    with pytest.raises(RuntimeError, match="wan_attn: grad_lse must be float32"):
        OP(args[0], args[6].double(), *args[2:])
    with pytest.raises(RuntimeError, match="k_lens must be between 0 and"):
        OP(*args, None, torch.tensor([34]))


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoints_change_nothing(reentrant: bool) -> None:
    x = operands(seqlen_q=33)
    plain = gradients(loss_of, *x)
    again = gradients(lambda *t: checkpoint(loss_of, *t, use_reentrant=reentrant), *x)
    # Reentrant, forward runs once more; the same kernels, so the same bits.
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.compile
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_a_compiled_training_step(dtype: torch.dtype) -> None:
    x = operands(batch=2, seqlen_q=33, dtype=dtype)
    plain = gradients(loss_of, *x)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for a, b in zip(plain, gradients(compiled, *x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.compile
@pytest.mark.parametrize("dtype", (None, BF16), ids=str)
def test_a_compiled_step_computes_forward_once(dtype: torch.dtype | None) -> None:
    """The traced op keeps out and lse: the graph of backward has the op of gradients alone, and
    its result has eager mode's bits."""
    graphs: list[set[str]] = []

    def look(graph: Any, example: Any) -> Any:
        graphs.append({str(n.target) for n in graph.graph.nodes if "wan_attn" in str(n.target)})
        return make_boxed_func(graph.forward)

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if dtype is None:
            return loss_of(query, key, value)
        out: Tensor = wan_attn.flash_attention(query, key, value, dtype=dtype)
        return out.float().square().sum()

    x = operands(batch=2, seqlen_q=33)
    compiled = torch.compile(
        loss, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look)
    )
    found = gradients(compiled, *x)
    assert graphs == [{"wan_attn.attention.default"}, {"wan_attn.sdpa_backward.default"}]
    assert all(map(torch.equal, found, gradients(loss, *x)))


def test_a_traced_step_of_another_backend_computes_forward_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it leaves may differ from what our kernels would compute by the order of its sums."""
    ran: list[bool] = []
    real = autograd.remember

    def remember(*call: Any) -> None:
        ran.append(call[-1] is not None)
        real(*call)

    monkeypatch.setattr(autograd, "remember", remember)
    arguments = (None, None, None, False, -1, -1, False, None, None)
    for forced, kept in (("auto", True), ("sdpa", True), ("torch", False)):
        monkeypatch.setenv("USE_ATTENTION_BACKEND", forced)
        config.refresh()
        x = [t.requires_grad_() for t in operands(seqlen_q=33)]
        out, lse = torch.ops.wan_attn.attention(*x, *arguments)
        assert ran.pop() is kept and not ran and lse.shape[0] == 0
        out.square().sum().backward()
    monkeypatch.delenv("USE_ATTENTION_BACKEND")
    config.refresh()


def test_opcheck_of_the_traced_op_with_more_than_a_few_rows() -> None:
    x = [t.requires_grad_() for t in operands(batch=2, seqlen_q=33, head_dim=16)]
    arguments = (None, None, None, True, -1, -1, False, None, None)
    torch.library.opcheck(torch.ops.wan_attn.attention.default, (*x, *arguments))


def test_autocast_leaves_gradients_in_the_leaves_dtype() -> None:
    x = operands(batch=2, seqlen_q=33)
    weight = torch.randn(64, 64) / 8

    def through_a_layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return loss_of(query @ weight, key @ weight, value @ weight)

    found = gradients(through_a_layer, *x)
    assert all(grad.dtype == F32 and grad.isfinite().all() for grad in found)
    exact = gradients(lambda q, k, v: loss_of(q @ weight, k @ weight, v @ weight), *x)
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.03


def test_func_vjp_gives_the_same() -> None:
    x = operands(seqlen_q=33)
    plain = gradients(loss_of, *x)
    _, pull = torch.func.vjp(loss_of, *x)
    for a, b in zip(plain, pull(torch.ones(())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_memory_grows_with_the_lengths() -> None:
    """Four times as long: at most four times the workspace, and a constant."""

    def needed(length: int) -> int:
        call = parse_shape(f"1x{length}x1x64")
        size = backward.workspace_bytes(Request.of(call, F32, "cpu", needs_grad=True))
        assert size is not None
        return size

    assert needed(1 << 18) < 4.2 * needed(1 << 16)
