# SPDX-License-Identifier: Apache-2.0
"""fa3.py - backend `fa3`: FlashAttention 3, if installed; imported when asked for.

Signatures: hopper/flash_attn_interface.py of Dao-AILab/flash-attention. Since pull request 1851
    (August 2025) its functions return out alone unless the probabilities are asked for; before,
    always (out, lse, ...). Since 2026 the module also lives in a package, flash_attn_3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from wan_attn import config
from wan_attn.backends import _flash_attention as fa
from wan_attn.backends._common import capability, positive_scale
from wan_attn.request import Call, Request, wants_grad

NAME = "fa3"
TITLE = "Flash Attention 3"

_MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")
_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")


@cache
def _load() -> tuple[Any, str]:
    """The module, or None and why it cannot be used."""
    return fa.load(*_MODULES, functions=_FUNCTIONS)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


config.memory(_load.cache_clear)
config.memory(_parameters.cache_clear)


def why_not(request: Request) -> str | None:
    """Why FlashAttention 3 cannot take this call; None: it can."""
    reason = fa.common_why_not(request)
    if reason is not None:
        return reason
    arch = capability(request.device)
    if arch is not None and arch[0] != 9:
        return f"needs compute capability 9.x (Hopper), this is {arch[0]}.{arch[1]}"
    if request.dropout_p > 0:
        return "has no dropout"
    module, reason = _load()
    if module is None:
        return reason
    known = _parameters(module.flash_attn_func) & _parameters(module.flash_attn_varlen_func)
    if request.window != (-1, -1) and "window_size" not in known:
        return "this version has no window_size"
    return None


def run(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute attention by FlashAttention 3; see Backend.run and wan_attn.sdpa.

    The backward pass is the deterministic one.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"FlashAttention 3: {reason}")
    if call.dropout_p > 0:
        raise RuntimeError("FlashAttention 3 has no dropout")
    out_dtype = query.dtype
    query, positive = positive_scale(query.to(value.dtype), call.scale)
    options: dict[str, Any] = {"softmax_scale": positive, "causal": call.is_causal}
    # The first releases know neither of these: name them only where they say something.
    if call.window != (-1, -1):
        options["window_size"] = call.window
    if wants_grad(query, key, value):
        options["deterministic"] = True
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
        return self._call(self.module.flash_attn_func, (q, k, v), return_lse)

    def packed(
        self, q: fa.Packed, k: fa.Packed, v: fa.Packed, max_q: int, max_k: int, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        tensors = (q.tokens, k.tokens, v.tokens, q.cu_seqlens, k.cu_seqlens, max_q, max_k)
        return self._call(self.module.flash_attn_varlen_func, tensors, return_lse)

    def _call(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        options = self.options
        if return_lse and "return_attn_probs" in _parameters(function):
            options = {**options, "return_attn_probs": True}
        return fa.unpack_result(function(*arguments, **options), return_lse)
