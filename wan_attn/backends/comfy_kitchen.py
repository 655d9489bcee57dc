# SPDX-License-Identifier: Apache-2.0
"""comfy_kitchen.py - backend `comfy_kitchen`: comfy-kitchen's INT8 attention, if installed; lossy,
so only where it is named.

Signatures: comfy_kitchen/sage_attention.py of Comfy-Org/comfy-kitchen at 7d86acf (0.2.31), which
has no lengths, no causal mask, no window and no log-sum-exp.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from wan_attn import config
from wan_attn.backends import _at_lengths
from wan_attn.backends import _flash_attention as fa
from wan_attn.backends._common import capability
from wan_attn.backends._masks import HostMask
from wan_attn.request import MAX_HEAD_DIM, Call, Request

NAME = "comfy_kitchen"
TITLE = "comfy-kitchen INT8 (lossy: 8-bit)"

_FUNCTIONS = ("int8_attention", "int8_attention_is_available")


@cache
def _load() -> tuple[Any, str]:
    """The module, or None and why it cannot be used."""
    return fa.load("comfy_kitchen", functions=_FUNCTIONS)


config.memory(_load.cache_clear)


def why_not(request: Request) -> str | None:
    """Why comfy-kitchen cannot take this call; None: it can."""
    reason = _at_lengths.common_why_not(request)
    if reason is not None:
        return reason
    if request.head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {request.head_dim}"
    if request.is_causal:
        return "has no causal mask"
    if request.window != (-1, -1):
        return "has no window"
    if request.return_lse:
        return "has no log-sum-exp"
    if capability(request.device) is None:
        return "needs a CUDA device, and there is none"
    module, reason = _load()
    if module is None:
        return reason
    if not module.int8_attention_is_available(request.device):
        return "its INT8 attention says that it is not available on this device"
    return None


def run(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute attention by comfy-kitchen, not exactly; see Backend.run and wan_attn.sdpa."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"comfy-kitchen: {reason}")
    if call.is_causal or call.window != (-1, -1) or call.return_lse:
        raise RuntimeError("comfy-kitchen has no causal mask, no window and no log-sum-exp")
    scale = _at_lengths.positive(call.scale, query.shape[3])

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: HostMask) -> tuple[Tensor, None]:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out: Tensor = module.int8_attention(q, k, v, scale=scale)
        return out.transpose(1, 2), None

    key = key.to(value.dtype)
    out, _ = _at_lengths.attend(dense, query.to(value.dtype), key, value, call)
    return out.to(query.dtype), None
