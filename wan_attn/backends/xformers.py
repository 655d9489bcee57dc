# SPDX-License-Identifier: Apache-2.0
"""xformers.py - backend `xformers`: xFormers' memory-efficient attention, if installed; exact.

Signatures: xformers/ops/fmha/__init__.py, common.py and attn_bias.py of facebookresearch/xformers
at 03b91d7 (0.0.35). Newer sources take that part from the package mslk, without which they have no
such function. Its backward passes are not deterministic, so that gradients stay elsewhere.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wan_attn import config
from wan_attn.backends import _at_lengths
from wan_attn.backends import _flash_attention as fa
from wan_attn.backends._common import capability, positive_scale
from wan_attn.backends._masks import HostMask
from wan_attn.request import MAX_HEAD_DIM, Call, Request

NAME = "xformers"
TITLE = "xFormers"

_FUNCTIONS = ("memory_efficient_attention", "memory_efficient_attention_forward_requires_grad")
_BIASES = ("LowerTriangularFromBottomRightMask", "LocalAttentionFromBottomRightMask")
_HEAD_DIM_STEP = 8  # its kernels load 16 bytes at a time


@cache
def is_installed() -> bool:
    """Whether there is such a package, broken or not; imports nothing."""
    if NAME in sys.modules:
        return sys.modules[NAME] is not None
    return importlib.util.find_spec(NAME) is not None


@cache
def _load() -> tuple[Any, str]:
    """The module, or None and why it cannot be used."""
    module, reason = fa.load("xformers.ops", functions=_FUNCTIONS)
    if module is None:
        return None, reason
    biases = getattr(getattr(module, "fmha", None), "attn_bias", None)
    missing = [name for name in _BIASES if not hasattr(biases, name)]
    if missing:
        return None, f"xformers.ops is installed but has no {missing[0]}"
    return module, ""


config.memory(is_installed.cache_clear)
config.memory(_load.cache_clear)


def why_not(request: Request) -> str | None:
    """Why xFormers cannot take this call; None: it can."""
    reason = _at_lengths.common_why_not(request)
    if reason is not None:
        return reason
    if request.head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {request.head_dim}"
    if request.head_dim % _HEAD_DIM_STEP:
        return f"head_dim must be a multiple of {_HEAD_DIM_STEP}, got {request.head_dim}"
    arch = capability(request.device)
    if arch is None:
        return "needs a CUDA device, and there is none"
    module, reason = _load()
    if module is None:
        return reason
    if arch < (8, 0) and request.dtype == torch.bfloat16:
        return f"bfloat16 needs compute capability 8.0 or newer, this is {arch[0]}.{arch[1]}"
    if not any(_is_for(kernel, arch, request) for kernel in _kernels(module)):
        return f"none of its kernels is made for compute capability {arch[0]}.{arch[1]}"
    return None


def _kernels(module: Any) -> list[Any]:
    return list(getattr(module.fmha, "ALL_FW_OPS", ()))


def _is_for(kernel: Any, arch: tuple[int, int], request: Request) -> bool:
    """Whether it was built, and for such cards and masks; the rest is said when it is called."""
    lowest = getattr(kernel, "CUDA_MINIMUM_COMPUTE_CAPABILITY", (0, 0))
    highest = getattr(kernel, "CUDA_MAXIMUM_COMPUTE_CAPABILITY", None) or arch
    has_window = request.window != (-1, -1)
    biases = {bias.__name__ for bias in kernel.SUPPORTED_ATTN_BIAS_TYPES}
    return bool(
        lowest <= arch <= highest
        and request.dtype in kernel.SUPPORTED_DTYPES
        and request.head_dim <= kernel.SUPPORTED_MAX_K
        and (not request.is_causal or has_window or _BIASES[0] in biases)
        and (not has_window or _BIASES[1] in biases)
        and kernel.is_available()
    )


def run(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute attention by xFormers; see Backend.run and wan_attn.sdpa."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"xFormers: {reason}")
    out_dtype = query.dtype
    query, scale = positive_scale(query.to(value.dtype), call.scale)

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: HostMask) -> tuple[Tensor, Tensor | None]:
        group = q.shape[2] // k.shape[2]
        if group > 1:  # which it has experimentally, for some of its kernels
            k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        bias = _bias(module.fmha.attn_bias, mask)
        if not call.return_lse:
            return module.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale), None
        attend = module.memory_efficient_attention_forward_requires_grad
        out, lse = attend(q, k, v, attn_bias=bias, scale=scale)
        return out, lse[..., : q.shape[1]].float()  # some of its kernels pad the rows

    out, lse = _at_lengths.attend(dense, query, key.to(value.dtype), value, call)
    return out.to(out_dtype), lse


def _bias(biases: Any, mask: HostMask) -> Any:
    """The mask as xFormers has it: aligned bottom-right as the contract's; None: no mask."""
    if mask.is_full:
        return None
    if mask.left is None and mask.right == 0:
        return biases.LowerTriangularFromBottomRightMask()
    everything = mask.q_len + mask.k_len
    return biases.LocalAttentionFromBottomRightMask(
        window_left=everything if mask.left is None else mask.left,
        window_right=everything if mask.right is None else mask.right,
    )
