# SPDX-License-Identifier: Apache-2.0
"""sage.py - backend `sage`: SageAttention 1 or 2, if installed; lossy, so only where it is named.

Signatures: sageattention/core.py of thu-ml/SageAttention at d1a57a5 (2.2.0) and at 0db4cbf (1.0.6,
the one on PyPI). Every keyword that it does not know, attn_mask and return_lse among them, it drops
without a word: nothing is given to it here that its signature does not name.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wan_attn import config
from wan_attn.backends import _at_lengths
from wan_attn.backends import _flash_attention as fa
from wan_attn.backends._common import capability
from wan_attn.backends._masks import HostMask
from wan_attn.request import Call, Request

NAME = "sage"
TITLE = "SageAttention (lossy: 8-bit)"

_HEAD_DIM_MAX = 128
_HEAD_DIMS_OF_1 = (64, 96, 128)
# Its kernels leave the tail of a tile of keys unfilled (thu-ml/SageAttention pull request 377):
# what lies there is finite once longer calls have filled it, and may be NaN before.
_BLOCK = 128
_KEYS_MIN = 1024
# Noise beyond this on RTX 50 (Comfy-Org/ComfyUI issue 15263).
_KEYS_MAX_OF_BLACKWELL = 160_000


@cache
def _load() -> tuple[Any, str]:
    """The module, or None and why it cannot be used."""
    return fa.load("sageattention", functions=("sageattn",))


@cache
def _parameters() -> frozenset[str]:
    """What the signature of the installed sageattn names."""
    return frozenset(inspect.signature(_load()[0].sageattn).parameters)


config.memory(_load.cache_clear)
config.memory(_parameters.cache_clear)


def _is_version_1() -> bool:
    return "smooth_k" in _parameters()


def why_not(request: Request) -> str | None:
    """Why SageAttention cannot take this call; None: it can."""
    reason = _at_lengths.common_why_not(request) or _why_not_shape(request)
    if reason is not None:
        return reason
    arch = capability(request.device)
    if arch is None:
        return "needs a CUDA device, and there is none"
    if arch < (7, 5):
        return f"needs compute capability 7.5 or newer, this is {arch[0]}.{arch[1]}"
    if arch[0] == 12 and request.seqlen_k > _KEYS_MAX_OF_BLACKWELL:
        return f"gives noise on this card beyond {_KEYS_MAX_OF_BLACKWELL} keys"
    module, reason = _load()
    if module is None:
        return reason
    if request.return_lse and "return_lse" not in _parameters():
        return "this version has no log-sum-exp"
    if _is_version_1() and request.head_dim not in _HEAD_DIMS_OF_1:
        return f"version 1 has head_dim 64, 96 and 128, not {request.head_dim}"
    return None


def _why_not_shape(request: Request) -> str | None:
    if request.head_dim > _HEAD_DIM_MAX:
        return f"head_dim must be at most {_HEAD_DIM_MAX}, got {request.head_dim}"
    if request.window != (-1, -1):
        return "has no window"
    if request.is_causal and request.seqlen_q != request.seqlen_k:
        return "is causal only where there are as many queries as keys"
    if request.is_causal and (request.has_q_lens or request.has_k_lens):
        return "has no lengths beside causal"
    if request.return_lse and request.num_heads_q != request.num_heads_k:
        return "its log-sum-exp is not one of grouped heads"
    return _why_not_keys(request.seqlen_k)


def _why_not_keys(keys: int) -> str | None:
    if 0 < keys < _KEYS_MIN and keys % _BLOCK:
        return f"may give NaN for {keys} keys: below {_KEYS_MIN} it needs a multiple of {_BLOCK}"
    return None


def run(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute attention by SageAttention, not exactly; see Backend.run and wan_attn.sdpa.

    Raises:
        RuntimeError: a sample's real lengths are none that it computes.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"SageAttention: {reason}")
    scale = _at_lengths.positive(call.scale, query.shape[3])
    options: dict[str, Any] = {"tensor_layout": "NHD", "sm_scale": scale}
    options |= {"return_lse": True} if call.return_lse else {}

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: HostMask) -> tuple[Tensor, Tensor | None]:
        reason = _why_not_keys(mask.k_len)
        if reason is not None:
            raise RuntimeError(reason)
        if _is_version_1():  # which takes the mean of its keys from them where they lie
            k = k.clone()
        # It makes the tensors' device the current one of the thread, and leaves it so.
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            result = module.sageattn(q, k, v, is_causal=call.is_causal, **options)
        return fa.unpack_result(result, call.return_lse)

    key = key.to(value.dtype)
    out, lse = _at_lengths.attend(dense, query.to(value.dtype), key, value, call)
    return out.to(query.dtype), lse
