# SPDX-License-Identifier: Apache-2.0
"""adapters.py - functions with other signatures that call wan_attn's; they hold no state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from wan_attn.request import refuse

Attention = Callable[..., Any]
"""Anything with the signature of Wan2.2's flash_attention, or of flash_attn_func."""


def make_flash_attention(attention: Attention) -> Attention:
    """A new function that does what ``attention`` does.

    New, because unpatch finds it by identity and must not reach anybody's own
    ``from wan_attn import flash_attention``. Of ours it is a copy: a wrapper's ``args`` would keep
    q, k and v alive for the whole call.
    """
    if isinstance(attention, FunctionType) and attention.__module__.startswith("wan_attn."):
        copy = FunctionType(
            attention.__code__,
            attention.__globals__,
            attention.__name__,
            attention.__defaults__,
            attention.__closure__,
        )
        copy.__kwdefaults__ = attention.__kwdefaults__
        return functools.update_wrapper(copy, attention)

    @functools.wraps(attention)
    def flash_attention(*args: Any, **kwargs: Any) -> Any:
        return attention(*args, **kwargs)

    return flash_attention


def make_flash_attn_func(attention: Attention | None) -> Attention:
    """A new function with flash_attn.flash_attn_func's signature.

    Args:
        attention: what it calls, with Wan2.2's signature; None: it is wan_attn.flash_attn_func.
    """
    # Not at import: a stand-in needs none of what this pulls in.
    from wan_attn.signatures import flash_attn

    if attention is None:
        return make_flash_attention(flash_attn.flash_attn_func)

    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        """flash_attn.flash_attn_func by a function that has no lse; all tensors are BSHD."""
        flash_attn.check_options(dropout_p, softcap, alibi_slopes, return_attn_probs=False)
        if return_attn_probs:
            refuse("return_attn_probs", "False, as Wan2.2's flash_attention has no lse", True)
        return attention(
            q,
            k,
            v,
            dropout_p=dropout_p,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            deterministic=deterministic,
        )

    return flash_attn_func
