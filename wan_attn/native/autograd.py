# SPDX-License-Identifier: Apache-2.0
"""autograd.py - the derivative of torch.ops.wan_attn.sdpa.

A kernel computes it (backward.py) from what forward has left: out and lse. Where none takes the
call, of few rows on the CPU, and without the native library, torch's operators do
(gradient_in_torch.py); wan_attn.sdpa and flash_attention send such calls, but for few rows, to
another backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from wan_attn.native import backward as kernels
from wan_attn.native.gradient_in_torch import gradients
from wan_attn.request import Call, empty_lse, transforms, wants_grad

has_kernels = False
"""Whether the op runs on our kernels, so that gradients may: op.py says so."""


FEW_ROWS = 32
"""Of so few queries on the CPU torch's operators compute gradients: a weight made from one float32
lse is off by lse's rounding, and where scores are large and sums short, that is up to four times
what torch, which has maximum and sum apart, is off by."""


def register(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
    in_torch: Callable[..., Any],
    lse_place: int | None = None,
    keeps_lse: Callable[..., bool] = lambda *operands: True,
) -> None:
    """torch.library.register_autograd for an op whose first arguments are query, key and value,
    and what that kernel of torch's does not do.

    Args:
        in_torch: the op in torch's operators: gradients within torch.func come from there.
        lse_place: where return_lse stands among the op's arguments; None: it is a keyword.
        keeps_lse: whether the op, called with these operands, may compute lse for backward's sake.
    """
    guard: Any = _Guard(library, in_torch, lse_place, keeps_lse)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=guard)


class _Guard:
    """Stands for the library where torch puts the kernel of an op's derivative."""

    def __init__(
        self,
        library: torch.library.Library,
        in_torch: Callable[..., Any],
        lse_place: int | None,
        keeps_lse: Callable[..., bool],
    ) -> None:
        self._library, self._in_torch = library, in_torch
        self._lse_place, self._keeps_lse = lse_place, keeps_lse

    def impl(self, op: Any, kernel: Callable[..., Any], key: str, **options: Any) -> None:
        """As a library's."""

        def guarded(keyset: Any, *operands: Any, **keywords: Any) -> Any:
            query, key, value = operands[:3]
            # As in transforms.in_forward_mode(), without a call: a tangent would be dropped.
            if getattr(forward_ad, "_current_level", 0) >= 0:
                transforms.without_tangent(query=query, key=key, value=value)
            # Outside of torch.func, as most calls are, this asks one question.
            if transforms.innermost_transform() is not None and transforms.is_transformed(
                query, key, value
            ):
                if wants_grad(query, key, value):
                    return self._in_torch(*operands, **keywords)
            # wants_grad(), too, without a call; what is no tensor is the op's to refuse.
            elif (
                has_kernels
                and torch.is_grad_enabled()
                and isinstance(query, Tensor)
                and isinstance(key, Tensor)
                and isinstance(value, Tensor)
                and (query.requires_grad or key.requires_grad or value.requires_grad)
                and self._keeps_lse(*operands)
            ):
                return self._and_lse(kernel, keyset, operands, keywords)
            return kernel(keyset, *operands, **keywords)

        self._library.impl(op, guarded, key, **options)

    def _and_lse(
        self, kernel: Callable[..., Any], keyset: Any, operands: Any, keywords: dict[str, Any]
    ) -> Any:
        """The op with a gradient, which keeps lse if a kernel can use it."""
        place = self._lse_place
        is_wanted = keywords.get("return_lse", False) if place is None else operands[place]
        dtype = None if place is None else operands[place + 1]
        query, key, value = operands[:3]
        if is_wanted or not is_for_kernels(query, key, value, dtype):
            return kernel(keyset, *operands, **keywords)
        if place is None:
            keywords = {**keywords, "return_lse": True}
        else:
            operands = (*operands[:place], True, *operands[place + 1 :])
        out, _ = kernel(keyset, *operands, **keywords)
        return out, empty_lse(query, return_lse=False)


def is_for_kernels(
    query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype | None = None
) -> bool:
    """Whether our kernels compute the gradients. dtype: as Call has it."""
    if not has_kernels:
        return False
    if query.device.type == "cpu":
        return query.dim() == 4 and query.shape[1] > FEW_ROWS
    return query.device.type == "cuda" and kernels.takes(query, key, value, dtype)


def remember(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    output: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Keeps what backward needs. Tensors go where torch looks after them.

    Args:
        output: out and lse, if they are exact, and of these very operands.
    """
    is_kept = (
        output is not None and call.return_lse and is_for_kernels(query, key, value, call.dtype)
    )
    kept = output if is_kept and output is not None else (None, None)
    ctx.save_for_backward(query, key, value, call.q_lens, call.k_lens, *kept)
    ctx.set_materialize_grads(False)
    ctx.call = call._replace(q_lens=None, k_lens=None)


def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """(grad_query, grad_key, grad_value, None, None), in the inputs' dtypes."""
    query, key, value, q_lens, k_lens, *results = ctx.saved_tensors
    call: Call = ctx.call._replace(q_lens=q_lens, k_lens=k_lens)
    if not call.return_lse:
        grad_lse = None  # it is of what stands in lse's place
    if grad_out is None:
        grad_out = torch.zeros_like(query)
    if is_for_kernels(query, key, value, call.dtype):
        grads = _by_kernel(grad_out, grad_lse, (query, key, value), call, results)
    else:
        with torch.autocast(query.device.type, enabled=False):
            grads = gradients(grad_out, grad_lse, query, key, value, call)
    return *grads, None, None


def _by_kernel(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    operands: tuple[Tensor, Tensor, Tensor],
    call: Call,
    results: list[Tensor | None],
) -> tuple[Tensor, ...]:
    """Where no results are kept, they are computed again, exactly, in what the call computes in."""
    dtypes = kernels.computed_in(*operands, call.dtype)
    query, key, value = (x.to(dtype) for x, dtype in zip(operands, dtypes, strict=True))
    options = {"scale": call.scale, "is_causal": call.is_causal}
    options |= {"window_left": call.window[0], "window_right": call.window[1]}
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    lens = (call.q_lens, call.k_lens)
    if results[0] is None:
        results = torch.ops.wan_attn.sdpa(*inputs, *lens, return_lse=True, **options)
    out, lse = results
    if out is not None and out.dtype not in (query.dtype, value.dtype):
        out = out.to(query.dtype)  # what the caller has it in holds what was computed
    grads = torch.ops.wan_attn.sdpa_backward(
        grad_out, grad_lse, *inputs, out, lse, *lens, **options
    )
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, operands, strict=True))
