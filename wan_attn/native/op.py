# SPDX-License-Identifier: Apache-2.0
"""op.py - registers torch.ops.wan_attn.sdpa, and rms_norm_rope beside it, on the best binding that
works here.

======  =========================================================================================
shim    csrc/torch/shim.c through torch's stable C ABI; torch >= 2.9
ctypes  the same C functions called from Python; any torch >= 2.4, some 25 us more a call
torch   no native library: computed by torch's operators, so the op exists wherever torch does
======  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wan_attn.config import current
from wan_attn.native import autograd, backward, cuda_driver, library, rope, shim
from wan_attn.native.bindings import ctypes_sdpa
from wan_attn.native.kernels import KernelInfo, build_info, cpu_features, kernels, select, why_not
from wan_attn.request import Call, check, empty_lse, gate, refuse

__all__ = [
    "SCHEMA",
    "KernelInfo",
    "binding",
    "binding_reason",
    "build_info",
    "cpu_features",
    "kernels",
    "register",
    "select",
    "why_not",
]

SCHEMA = (
    "sdpa(Tensor query, Tensor key, Tensor value, Tensor? q_lens=None, Tensor? k_lens=None, *,"
    " float? scale=None, bool is_causal=False, int window_left=-1, int window_right=-1,"
    " bool return_lse=False, int kernel=-1, bool out_like_value=False, int precision=0)"
    " -> (Tensor out, Tensor lse)"
)

# Torch frees an operator with the last reference to its Library: keep it as long as the module.
_LIBRARY = torch.library.Library("wan_attn", "FRAGMENT")
_is_defined = False
_is_registered = False
_binding: str = "torch"
_reason: str = ""

# fallback(query, key, value, call) -> out, lse or None: attention by torch's operators.
Fallback = Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor | None]]


def binding() -> str:
    """How torch.ops.wan_attn.sdpa reaches its kernels here: "shim", "ctypes" or "torch"."""
    return _binding


def binding_reason() -> str:
    """Why not a better binding; "" if it is the best one."""
    return _reason


def _call(
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    return_lse: bool = False,
    kernel: int = -1,
    out_like_value: bool = False,
    precision: int = library.EXACT,
) -> tuple[Call, int, bool]:
    """The schema's arguments behind query, key and value: a call, the row that is forced, and
    whether out has value's dtype rather than query's."""
    if precision not in (library.EXACT, library.QK8):
        refuse("precision", "0 (exact) or 1 (8-bit scores)", precision)
    window = (window_left, window_right)
    call = Call(q_lens, k_lens, scale, is_causal, window, return_lse=return_lse)
    return call, kernel, out_like_value


def _by_torch(fallback: Fallback) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op without our kernels: without the library, or for a gradient within torch.func. It is
    exact whatever `precision` allows."""

    def sdpa(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        call, kernel, out_like_value = _call(*args, **options)
        if kernel != -1:
            why = _reason or "torch computes gradients within torch.func"
            refuse("kernel", f"-1, as {why}", kernel)
        check(query, key, value, call)
        out, lse = fallback(query, key, value, call)
        out = out.to((value if out_like_value else query).dtype).contiguous()
        return out, empty_lse(query, return_lse=False) if lse is None else lse

    return sdpa


def _sdpa_elsewhere(
    query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    """Devices and layouts that no binding registers a kernel for; one odd operand is enough."""
    given: dict[str, object] = {"query": query, "key": key, "value": value}
    given |= dict(zip(("q_lens", "k_lens"), args, strict=False)) | kwargs
    for name, x in given.items():
        if isinstance(x, Tensor):
            gate.dense(name, x)
            if x.is_quantized or x.device.type not in ("cpu", "cuda"):
                kind = f"{x.dtype} on {x.device}" if x.is_quantized else f"{x.layout} on {x.device}"
                refuse(name, gate.DENSE, kind)
    refuse("query", gate.DENSE, f"{query.layout} on {query.device}")


def _sdpa_fake(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    call, _, out_like_value = _call(*args, **options)
    check(query, key, value, call)
    out = query.new_empty(query.shape, dtype=(value if out_like_value else query).dtype)
    return out, empty_lse(query, call.return_lse)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    query, key, value, *lens = inputs
    call, kernel, _ = _call(*lens, **keyword_only_inputs)
    is_forced_lossy = 0 <= kernel < len(kernels()) and kernels()[kernel].is_lossy
    is_exact = keyword_only_inputs["precision"] == library.EXACT and not is_forced_lossy
    autograd.remember(ctx, query, key, value, call, output if is_exact else None)


def _define(fallback: Fallback) -> None:
    global _is_defined
    # Else inductor may hand over other strides than eager does; the contract wants a last one of 1.
    _LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _is_defined = True
    torch.library.register_fake("wan_attn::sdpa", _sdpa_fake, lib=_LIBRARY)
    _LIBRARY.impl("sdpa", _sdpa_elsewhere, "CompositeExplicitAutograd")
    by_torch = _by_torch(fallback)
    autograd.register(_LIBRARY, "wan_attn::sdpa", autograd.backward, _setup_context, by_torch, True)
    backward.define(_LIBRARY)
    rope.define(_LIBRARY)


def register(fallback: Fallback) -> None:
    """Register torch.ops.wan_attn.sdpa; twice is once.

    Args:
        fallback: what computes where the native library is not used.

    Raises:
        RuntimeError: WAN_ATTN_BINDING=shim, and there is none. ConfigError: a variable is wrong.
            Either may be put right, and this called again.
    """
    global _is_registered, _binding, _reason
    wanted = current().binding
    if _is_registered:
        return
    if not _is_defined:
        _define(fallback)
    if wanted == "torch" or library.load() is None:
        _binding = "torch"
        _reason = library.load_error() or "WAN_ATTN_BINDING=torch"
    else:
        cuda_driver.configure(library.lib())
        why_no_shim = "WAN_ATTN_BINDING=ctypes" if wanted == "ctypes" else shim.load()
        if wanted == "shim" and why_no_shim is not None:
            raise RuntimeError(f"wan_attn: WAN_ATTN_BINDING=shim is not available: {why_no_shim}")
        _binding, _reason = ("ctypes", why_no_shim) if why_no_shim is not None else ("shim", "")
    if _binding != "shim":
        function = ctypes_sdpa if _binding == "ctypes" else _by_torch(fallback)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl("sdpa", function, key)
    autograd.has_kernels = _binding != "torch"
    backward.register(_LIBRARY, _binding)
    rope.register(_LIBRARY, _binding)
    _is_registered = True
