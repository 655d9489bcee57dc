# SPDX-License-Identifier: Apache-2.0
"""fa2.py - backend `fa2`: FlashAttention 2, if installed; imported when asked for.

Signatures: flash_attn/flash_attn_interface.py of Dao-AILab/flash-attention, 2.3 to 2.8.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from wan_attn import config
from wan_attn.backends import _flash_attention as fa
from wan_attn.backends._common import capability, positive_scale
from wan_attn.request import Call, Request, wants_grad

NAME = "fa2"
TITLE = "Flash Attention 2"

_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")
_OLDEST = (2, 3)  # the first with window_size; before 2.1 causal was aligned top-left


@cache
def _load() -> tuple[Any, str]:
    """The module, or None and why it cannot be used."""
    module, reason = fa.load("flash_attn", functions=_FUNCTIONS)
    if module is None:
        return None, reason
    version = str(getattr(module, "__version__", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST:
        return None, f"flash_attn {version} is older than {_OLDEST[0]}.{_OLDEST[1]}"
    return module, ""


config.memory(_load.cache_clear)


def why_not(request: Request) -> str | None:
    """Why FlashAttention 2 cannot take this call; None: it can."""
    reason = fa.common_why_not(request)
    if reason is not None:
        return reason
    arch = capability(request.device)
    if arch is not None and arch < (8, 0):
        return f"needs compute capability 8.0 or newer, this is {arch[0]}.{arch[1]}"
    return _load()[1] or None


def run(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute attention by FlashAttention 2; see Backend.run and wan_attn.sdpa.

    The backward pass is the deterministic one.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"FlashAttention 2: {reason}")
    out_dtype = query.dtype
    query, positive = positive_scale(query.to(value.dtype), call.scale)
    options = {
        "dropout_p": call.dropout_p,
        "softmax_scale": positive,
        "causal": call.is_causal,
        "window_size": call.window,
        "deterministic": wants_grad(query, key, value),
    }
    library = _Library(module, options)
    out, lse = fa.attend(library, query, key.to(value.dtype), value, call)
    return out.to(out_dtype), lse


@dataclass(frozen=True, slots=True)
class _Library:
    module: Any
    options: dict[str, Any]

    def dense(
        self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        result = self.module.flash_attn_func(q, k, v, return_attn_probs=return_lse, **self.options)
        return fa.unpack_result(result, return_lse)

    def packed(
        self, q: fa.Packed, k: fa.Packed, v: fa.Packed, max_q: int, max_k: int, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        result = self.module.flash_attn_varlen_func(
            q.tokens,
            k.tokens,
            v.tokens,
            q.cu_seqlens,
            k.cu_seqlens,
            max_q,
            max_k,
            return_attn_probs=return_lse,
            **self.options,
        )
        return fa.unpack_result(result, return_lse)
