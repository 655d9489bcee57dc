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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan_attn.config import current
from wan_attn.native import autograd, backward, cuda_driver, library, rope, shim
from wan_attn.native.bindings import ctypes_sdpa
from wan_attn.native.kernels import KernelInfo, build_info, cpu_features, kernels, select, why_not
from wan_attn.request import Blocks, Call, check, check_blocks, empty_lse, gate, refuse

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
    "sdpa(Tensor query, Tensor key, Tensor value, Tensor? q_lens=None, Tensor? k_lens=None,"
    " Tensor? block_counts=None, Tensor? block_indices=None, *,"
    " float? scale=None, bool is_causal=False, int window_left=-1, int window_right=-1,"
    " bool return_lse=False, int kernel=-1, bool out_like_value=False, int precision=0,"
    " bool pools_others=False, float skip_threshold=0.)"
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


class _Arguments(NamedTuple):
    """The schema's arguments behind query, key and value; kernel: the row that is forced, and
    out_like_value: out has value's dtype rather than query's."""

    call: Call
    blocks: Blocks
    kernel: int
    out_like_value: bool


def _arguments(
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    block_counts: Tensor | None = None,
    block_indices: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    return_lse: bool = False,
    kernel: int = -1,
    out_like_value: bool = False,
    precision: int = library.EXACT,
    pools_others: bool = False,
    skip_threshold: float = 0.0,
) -> _Arguments:
    if precision not in (library.EXACT, library.QK8):
        refuse("precision", "0 (exact) or 1 (8-bit scores)", precision)
    window = (window_left, window_right)
    call = Call(q_lens, k_lens, scale, is_causal, window, return_lse=return_lse)
    blocks = Blocks(block_counts, block_indices, pools_others, skip_threshold)
    return _Arguments(call, blocks, kernel, out_like_value)


def _check(query: Tensor, key: Tensor, value: Tensor, given: _Arguments) -> None:
    check(query, key, value, given.call)
    check_blocks(query, given.blocks)


def _refuse_blocks(blocks: Blocks, rule: str) -> None:
    """Raises where a call is not dense: rule says what would have to be."""
    if blocks.skip_threshold:
        refuse("skip_threshold", f"0 {rule}", blocks.skip_threshold)
    refuse("block_counts", f"None {rule}", gate.shown(blocks.block_counts))


def _by_torch(fallback: Fallback) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op without our kernels: without the library, or for a gradient within torch.func. It is
    exact whatever `precision` allows."""

    def sdpa(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        given = _arguments(*args, **options)
        why = _reason or "torch computes gradients within torch.func"
        if given.kernel != -1:
            refuse("kernel", f"-1, as {why}", given.kernel)
        _check(query, key, value, given)
        if not given.blocks.is_dense:
            _refuse_blocks(given.blocks, f"where torch computes: {why}")
        out, lse = fallback(query, key, value, given.call)
        out = out.to((value if given.out_like_value else query).dtype).contiguous()
        return out, empty_lse(query, return_lse=False) if lse is None else lse

    return sdpa


def _sdpa_elsewhere(
    query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    """Devices and layouts that no binding registers a kernel for; one odd operand is enough."""
    given: dict[str, object] = {"query": query, "key": key, "value": value}
    names = ("q_lens", "k_lens", "block_counts", "block_indices")
    given |= dict(zip(names, args, strict=False)) | kwargs
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
    given = _arguments(*args, **options)
    _check(query, key, value, given)
    out = query.new_empty(query.shape, dtype=(value if given.out_like_value else query).dtype)
    return out, empty_lse(query, given.call.return_lse)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    query, key, value, *others = inputs
    given = _arguments(*others, **keyword_only_inputs)
    if not given.blocks.is_dense:
        _refuse_blocks(given.blocks, "where a gradient is wanted: such calls are forward only")
    row = given.kernel
    is_forced_lossy = 0 <= row < len(kernels()) and kernels()[row].is_lossy
    is_exact = keyword_only_inputs["precision"] == library.EXACT and not is_forced_lossy
    autograd.remember(ctx, query, key, value, given.call, output if is_exact else None)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return *autograd.backward(ctx, *gradients), None, None  # of the lists


def _define(fallback: Fallback) -> None:
    global _is_defined
    # Else inductor may hand over other strides than eager does; the contract wants a last one of 1.
    _LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _is_defined = True
    torch.library.register_fake("wan_attn::sdpa", _sdpa_fake, lib=_LIBRARY)
    _LIBRARY.impl("sdpa", _sdpa_elsewhere, "CompositeExplicitAutograd")
    by_torch = _by_torch(fallback)
    autograd.register(_LIBRARY, "wan_attn::sdpa", _backward, _setup_context, by_torch)
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
