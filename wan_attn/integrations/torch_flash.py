# SPDX-License-Identifier: Apache-2.0
"""torch_flash.py - wan_attn's kernels as a flash implementation of torch's own SDPA.

    wan_attn.integrations.torch_flash.register()
    torch.nn.attention.activate_flash_attention_impl("wan_attn")
    torch.nn.attention.restore_flash_attention_impl()

register() adds a name to torch's list and nothing else; activating it, which replaces one CUDA
operator of torch for the whole process, is left to the user. Calls that our CUDA kernels do not
take, and all calls while grad is enabled, run torch's own kernel as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wan_attn import log
from wan_attn.backends import native
from wan_attn.request import Call, Request
from wan_attn.selfcheck import proof

NAME = "wan_attn"
OPERATOR = "_scaled_dot_product_flash_attention"
DEVICE = "CUDA"

Result = tuple[Any, ...]
"""output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_attn_mask"""


def register() -> None:
    """Offer `wan_attn` to torch.nn.attention.activate_flash_attention_impl(). Twice is once.

    Raises:
        RuntimeError: torch is older than 2.11, or built without CUDA.
    """
    offer = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if offer is None or not hasattr(torch.library, "get_kernel"):
        raise RuntimeError(
            "wan_attn: torch must be 2.11 or newer to take another flash implementation,"
            f" got {torch.__version__}"
        )
    _own_kernel(DEVICE)
    offer(NAME, register_fn=_activate)


def _own_kernel(device: str) -> Any:
    """The kernel that the operator has now."""
    try:
        return torch.library.get_kernel(f"aten::{OPERATOR}", device)
    except RuntimeError as error:
        raise RuntimeError(f"wan_attn: this torch has no {OPERATOR} for {device}") from error


class _Handle:
    """What torch keeps while ours is active."""

    def __init__(self, library: torch.library.Library) -> None:
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        """Let torch's own kernel be the operator's again. Twice is once."""
        library, self._library = self._library, None
        if library is not None:
            library._destroy()


def _activate() -> _Handle:
    """Called by torch's activate_flash_attention_impl()."""
    proof.before_work()
    forward = make_forward(_own_kernel(DEVICE))
    library = torch.library.Library("aten", "IMPL", DEVICE)
    handle = _Handle(library)
    try:
        library.impl(OPERATOR, forward, DEVICE, with_keyset=True)
    except BaseException:
        handle.remove()
        raise
    return handle


def make_forward(own_kernel: Any) -> Callable[..., Result]:
    """The operator: our kernels where they take the call, else `own_kernel`."""

    def forward(
        keyset: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Result:
        reason = _why_not(query, key, value, dropout_p, is_causal, return_debug_mask)
        if reason is None:
            return _run(query, key, value, is_causal, scale)
        text = f"torch: its own flash kernel takes a call: {reason}"
        log.once(text, logging.INFO, text)
        options = (dropout_p, is_causal, return_debug_mask)
        result: Result = own_kernel.call_boxed(keyset, query, key, value, *options, scale=scale)
        return result

    return forward


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
) -> str | None:
    if torch.is_grad_enabled():
        return "grad is enabled, and wan_attn's kernels are forward only"
    if dropout_p > 0 or return_debug_mask:
        return "it has dropout"
    if is_causal and query.shape[2] != key.shape[2]:
        return "it is causal with another number of queries than keys"
    if value.shape[-1] != query.shape[-1]:
        return "its value has another head_dim than its query"
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    call = Call(is_causal=is_causal, return_lse=True)
    native.prove(query.device)
    return native.why_not(Request.from_tensors(query, key, value, call))


def _run(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Result:
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    call = Call(scale=scale, is_causal=is_causal, return_lse=True)
    out, lse = native.run(query, key, value, call)
    # What a backward pass would need for dropout, of which there is none here.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    nothing = query.new_empty(0)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return out.transpose(1, 2), lse, None, None, seqlen_q, seqlen_k, state, unused, nothing
