# SPDX-License-Identifier: Apache-2.0
"""transforms.py - what torch.func and forward-mode AD have made of a tensor; knows no attention."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from wan_attn.request.gate import refuse

_NO_TANGENT = (
    "without a tangent of forward-mode AD (jvp, jacfwd, hessian): only reverse mode is here"
)

# The innermost transform of torch.func that is at work; None outside of all.
innermost_transform = functorch.peek_interpreter_stack


def in_forward_mode() -> bool:
    """Whether a tensor may carry a tangent now: in torch.func.jvp, jacfwd or hessian, or within
    forward_ad.dual_level(). Must cost next to nothing: every call asks."""
    # The public question, unpack_dual(), costs a call of torch for each tensor.
    return getattr(forward_ad, "_current_level", 0) >= 0


def without_tangent(**tensors: object) -> None:
    """Tensors that forward-mode AD does not follow: a tangent that was dropped would read as 0.

    Raises:
        Refusal: one is a dual tensor.
    """
    if not in_forward_mode():
        return
    stack = functorch.get_interpreter_stack() or ()
    forward = {one.level() for one in stack if one.key() == functorch.TransformType.Jvp}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if functorch.is_functorch_wrapped_tensor(tensor):
            is_dual = any(functorch.maybe_get_level(layer) in forward for layer in _layers(tensor))
        else:
            is_dual = forward_ad.unpack_dual(tensor).tangent is not None
        if is_dual:
            refuse(name, _NO_TANGENT, "a dual tensor")


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func (vmap, grad) wraps one of these: its numbers cannot be read here."""
    if innermost_transform() is None:
        return False
    is_wrapped = functorch.is_functorch_wrapped_tensor
    return any(tensor is not None and is_wrapped(tensor) for tensor in tensors)


def untransformed(tensor: Tensor) -> Tensor:
    """What torch.func has wrapped, all samples of every vmap together; only for reading numbers."""
    return list(_layers(tensor))[-1]


def wants_grad_below(*tensors: Tensor) -> bool:
    """Whether a torch.func.grad further out than the innermost transform follows one of these."""
    return is_transformed(*tensors) and any(
        layer.requires_grad for tensor in tensors for layer in _layers(tensor)
    )


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor as each transform of torch.func sees it, from the innermost transform out."""
    yield tensor
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
        yield tensor
