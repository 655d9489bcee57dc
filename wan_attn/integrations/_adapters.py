# SPDX-License-Identifier: Apache-2.0
"""_adapters - functions with other people's signatures that call wan_attn's; they hold no state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from wan_attn.request import refuse

Attention = Callable[..., Any]
"""Anything with the signature of Wan2.2's flash_attention."""


def make_flash_attention(attention: Attention) -> Attention:
    """A new function that does what ``attention`` does.

    New, because unpatch finds it by identity and must not reach anybody's own
    ``from wan_attn import flash_attention``.
    """

    @functools.wraps(attention)
    def flash_attention(*args: Any, **kwargs: Any) -> Any:
        return attention(*args, **kwargs)

    return flash_attention


def make_flash_attn_func(attention: Attention) -> Attention:
    """A stand-in for ``flash_attn.flash_attn_func`` that calls ``attention``."""

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
        """flash_attn.flash_attn_func through wan_attn; all tensors are BSHD."""
        for name, value, neutral in (
            ("softcap", softcap, 0.0),
            ("alibi_slopes", alibi_slopes, None),
            ("return_attn_probs", return_attn_probs, False),
        ):
            if value is not neutral and value != neutral:
                refuse(name, str(neutral), value)
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
