# SPDX-License-Identifier: Apache-2.0
"""_torch_kernels.py - which of PyTorch's SDPA kernels to ask, in what order; knows no lengths.

Each kernel is asked alone, in our order, and one that refuses is not asked again for that kind of
call. A list with `set_priority=True` (torch >= 2.6) would order them too, but hides which kernel
refused and cannot go on after one that fails when it runs, as cuDNN's does on some shapes.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_attn import config
from wan_attn.backends._errors import is_device_error
from wan_attn.transient import is_interruption

# Torch's own function, by its C name: programs put SageAttention's, or ours, in the place of
# torch.nn.functional's, and that one drops masks and scales, or calls us again.
SDPA = torch._C._nn.scaled_dot_product_attention

# cuDNN is ahead of flash where PyTorch itself prefers it: sm_90 and sm_100 with cuDNN newer than
# 9.15 (check_prefer_cudnn_attention in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
_CUDNN_FIRST = ((9, 0), (10, 0))
_CUDNN_FIRST_VERSION = 91500

_WINDOWS_ORDER = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_ORDER = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


class Variant(NamedTuple):
    """One of PyTorch's kernels that may be measured and chosen by name."""

    kernel: SDPBackend
    title: str


# Not MATH, which stores every score.
VARIANTS = {
    "flash": Variant(SDPBackend.FLASH_ATTENTION, "flash"),
    "cudnn": Variant(SDPBackend.CUDNN_ATTENTION, "cuDNN"),
    "efficient": Variant(SDPBackend.EFFICIENT_ATTENTION, "efficient"),
}

_here = threading.local()  # .asked: what asking() has set

_FLAGS_LOCK = threading.Lock()  # sdpa_kernel sets flags of the process, not of the thread
_refused: set[tuple[SDPBackend, tuple[object, ...]]] = set()
# Kinds of call that flash took when asked first: PyTorch asks it first too, so that pinning it,
# which costs a lock and a switch of flags, changes nothing.
_settled: set[tuple[object, ...]] = set()
_MEMORY_MAX = 4096  # shapes that never repeat must not grow these for ever
config.memory(_refused.clear)
config.memory(_settled.clear)


def _ask(function: str) -> bool:
    """torch.backends.cuda.<function>(); False where this torch lacks it."""
    return bool(getattr(torch.backends.cuda, function, bool)())


@cache
def has_flash() -> bool:
    """Whether this torch has a flash kernel for CUDA (Windows wheels up to 2.14 have none)."""
    return _ask("is_flash_attention_available")


def kernel_order(
    platform: str, flash: bool, capability: tuple[int, int], cudnn: int
) -> tuple[SDPBackend, ...]:
    """The kernels worth asking on a CUDA device, best first."""
    if platform == "win32" and not flash:
        return _WINDOWS_ORDER
    if capability in _CUDNN_FIRST and cudnn > _CUDNN_FIRST_VERSION:
        return (_ORDER[1], _ORDER[0], *_ORDER[2:])
    return _ORDER


@cache
def _device_order(index: int) -> tuple[SDPBackend, ...]:
    capability = torch.cuda.get_device_capability(index)
    cudnn = torch.backends.cudnn.version() or 0
    return kernel_order(sys.platform, has_flash(), capability, cudnn)


def _enabled(order: tuple[SDPBackend, ...]) -> list[SDPBackend]:
    """Those of `order` that the user has not switched off."""
    allowed = {
        SDPBackend.FLASH_ATTENTION: _ask("flash_sdp_enabled"),
        SDPBackend.EFFICIENT_ATTENTION: _ask("mem_efficient_sdp_enabled"),
        SDPBackend.MATH: _ask("math_sdp_enabled"),
        SDPBackend.CUDNN_ATTENTION: _ask("cudnn_sdp_enabled"),
    }
    return [kernel for kernel in order if allowed[kernel]]


def order_for(device: torch.device) -> tuple[SDPBackend, ...]:
    """The kernels to ask on `device`; empty where PyTorch's own choice is the only one."""
    if device.type != "cuda":
        return ()
    return _device_order(torch.cuda.current_device() if device.index is None else device.index)


def variants(device: torch.device) -> tuple[str, ...]:
    """The names in VARIANTS of the kernels to ask on `device`, best first; empty off CUDA."""
    order = _enabled(order_for(device))
    return tuple(name for kernel in order for name, one in VARIANTS.items() if one.kernel is kernel)


@contextmanager
def asking(kernel: SDPBackend, is_alone: bool) -> Iterator[None]:
    """Within, this thread asks `kernel` first, or it alone."""
    before = getattr(_here, "asked", None)
    _here.asked = (kernel, is_alone)
    try:
        yield
    finally:
        _here.asked = before


def _with_asked(
    order: tuple[SDPBackend, ...], asked: tuple[SDPBackend, bool]
) -> tuple[SDPBackend, ...]:
    kernel, is_alone = asked
    return (kernel,) if is_alone else (kernel, *(other for other in order if other is not kernel))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Torch's scaled_dot_product_attention through the best kernel that takes the call.

    Args:
        query: [batch, heads, seqlen_q, head_dim]; key, value: [batch, heads, seqlen_k, head_dim],
            same dtype.
        keep: bool, broadcastable to [batch, heads, seqlen_q, seqlen_k], True where the key is seen;
            None: all.
    """

    def call() -> Tensor:
        return SDPA(
            query, key, value, attn_mask=keep, dropout_p=dropout_p, is_causal=is_causal, scale=scale
        )

    query = laid_out(query)
    order = order_for(query.device)
    asked = getattr(_here, "asked", None)
    if not order or torch.compiler.is_compiling():  # a tracer follows neither locks nor flags
        return call()
    kind = (
        query.shape,
        key.shape,
        query.dtype,
        query.stride(),
        keep is None,
        is_causal,
        dropout_p > 0,
        query.device,
        torch.is_grad_enabled(),
    )
    if asked is not None:
        order = _with_asked(order, asked)
    elif kind in _settled:
        return call()
    with _FLAGS_LOCK:
        untried = [kernel for kernel in _enabled(order) if (kernel, kind) not in _refused]
        for kernel in untried:
            try:
                out = _by(kernel, call)
            except RuntimeError as error:
                if is_device_error(error) or is_interruption(error) or kernel is untried[-1]:
                    raise
                _remember(_refused, (kernel, kind))
                continue
            if kernel is SDPBackend.FLASH_ATTENTION and kernel is order[0] and asked is None:
                _remember(_settled, kind)
            return out
    if asked is not None and asked[1]:
        raise RuntimeError(f"PyTorch's {asked[0].name} has refused such a call, or is switched off")
    return call()  # the user switched all of ours off: PyTorch says so


def laid_out(query: Tensor) -> Tensor:
    """query as SDPA may read it: the result gets the order of its strides, and a kernel that takes
    the last dimension for the innermost one writes it wrongly where another dimension steps by less
    (rows that overlap). Torch 2.15's CPU kernel gives garbage then."""
    if torch.compiler.is_compiling():  # strides may be symbols
        return query
    head_dim = query.shape[-1]
    for size, stride in zip(query.shape[:-1], query.stride()[:-1], strict=True):
        if size > 1 and 0 < stride < head_dim:
            return query.contiguous()
    return query


def _by(kernel: SDPBackend, call: Callable[[], Tensor]) -> Tensor:
    with sdpa_kernel(kernel), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every reason why a kernel refuses
        return call()


def _remember(memory: set[Any], item: object) -> None:
    if len(memory) >= _MEMORY_MAX:
        memory.clear()
    memory.add(item)
