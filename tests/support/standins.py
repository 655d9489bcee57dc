# SPDX-License-Identifier: Apache-2.0
"""standins.py - flash_attn and flash_attn_interface as they are called, computed by the oracle.

Neither package installs without a GPU. Signatures are those of Dao-AILab/flash-attention:
flash_attn/flash_attn_interface.py (2.3 to 2.8) and hopper/flash_attn_interface.py before and after
pull request 1851. What the real ones refuse, these refuse; NaN in what they are given is padding
that should not have come.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from wan_attn import config, log
from wan_attn.backends import (
    _flash_attention,
    comfy_kitchen,
    fa2,
    fa3,
    sage,
    torch_sdpa,
    xformers,
)
from wan_attn.selection import choose

HALF = (torch.float16, torch.bfloat16)
Window = tuple[int, int]


def reset() -> None:
    """Forget everything that the package keeps between calls."""
    config.forget()
    log.disable()


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in HALF or x.dtype != q.dtype:
            raise RuntimeError(f"FlashAttention only support fp16 and bf16 data type, {name}")
        if x.stride(-1) != 1:
            raise RuntimeError("Input tensor must have contiguous last dimension")
        if not torch.isfinite(x).all():
            raise AssertionError(f"padding came along in {name}")


def dense(q: Tensor, k: Tensor, v: Tensor, scale: Any, causal: bool, window: Any) -> Any:
    check_operands(q, k, v)
    out, lse = oracle.attention(q, k, v, scale=scale, is_causal=causal, window=tuple(window))
    return torch.from_numpy(out).to(q.dtype), torch.from_numpy(lse).float()


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: Any,
    causal: bool,
    window: Any,
) -> tuple[Tensor, Tensor]:
    """[total, heads, head_dim] -> out likewise, lse [heads, total]."""
    check_operands(q, k, v)
    for cu in (cu_q, cu_k):
        if cu.dtype != torch.int32 or cu.device != q.device or not cu.is_contiguous():
            raise RuntimeError("cu_seqlens must be contiguous int32 on the device")
    out = torch.full(q.shape, 777.0, dtype=q.dtype)  # the real one leaves it uninitialised
    lse = torch.full((q.shape[1], q.shape[0]), 777.0)
    for b in range(len(cu_q) - 1):
        (q0, q1), (k0, k1) = cu_q[b : b + 2].tolist(), cu_k[b : b + 2].tolist()
        assert q1 - q0 <= max_q and k1 - k0 <= max_k, "max_seqlen is too small"
        if q1 == q0:
            continue
        one, one_lse = oracle.attention(
            q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], scale=scale, is_causal=causal,
            window=tuple(window),
        )  # fmt: skip
        out[q0:q1] = torch.from_numpy(one[0]).to(q.dtype)
        lse[:, q0:q1] = torch.from_numpy(one_lse[0]).float()
    return out, lse


def plus_inf(lse: Tensor) -> Tensor:
    """FlashAttention 2 says +inf for a row without a key."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def module_of(
    name: str, dense: Callable[..., Any], varlen: Callable[..., Any], version: str = ""
) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(flash_attn_func=dense, flash_attn_varlen_func=varlen)
    if version:
        vars(module).update(__version__=version)
    return module


def make_fa2(*, padded_lse: bool = False, version: str = "2.8.3") -> ModuleType:
    """flash_attn; `padded_lse` as before 2.7."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0,
        alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        out, lse = dense(q, k, v, softmax_scale, causal, window_size)
        return (out, plus_inf(lse), None) if return_attn_probs else out

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1),
        softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
        return_attn_probs: bool = False, block_table: Any = None,
    ) -> Any:  # fmt: skip
        out, lse = packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
            causal, window_size,
        )  # fmt: skip
        lse = plus_inf(lse)
        if padded_lse:
            padded = torch.zeros(len(cu_seqlens_q) - 1, q.shape[1], max_seqlen_q)
            for b in range(len(padded)):
                begin, end = cu_seqlens_q[b : b + 2].tolist()
                padded[b, :, : end - begin] = lse[:, begin:end]
            lse = padded
        return (out, lse, None) if return_attn_probs else out

    return module_of("flash_attn", flash_attn_func, flash_attn_varlen_func, version)


def make_fa3(name: str = "flash_attn_interface") -> ModuleType:
    """flash_attn_interface of today: out alone unless the probabilities are asked for."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
        qv: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
        window_size: Window = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
        num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False,
        sm_margin: int = 0, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        out, lse = dense(q, k, v, softmax_scale, causal, window_size)
        return (out, lse) if return_attn_probs else out

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, seqused_q: Any = None, seqused_k: Any = None,
        softmax_scale: float | None = None, causal: bool = False, qv: Any = None,
        q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
        window_size: Window = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
        num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False,
        sm_margin: int = 0, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        out, lse = packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
            causal, window_size,
        )  # fmt: skip
        return (out, lse) if return_attn_probs else out

    return module_of(name, flash_attn_func, flash_attn_varlen_func)


def make_old_fa3() -> ModuleType:
    """flash_attn_interface of 2024: (out, lse) always, no window, no probabilities."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
        deterministic: bool = False,
    ) -> Any:  # fmt: skip
        return dense(q, k, v, softmax_scale, causal, (-1, -1))

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None = None,
        causal: bool = False, deterministic: bool = False,
    ) -> Any:  # fmt: skip
        return packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
            causal, (-1, -1),
        )  # fmt: skip

    return module_of("flash_attn_interface", flash_attn_func, flash_attn_varlen_func)


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType | None, name: str) -> None:
    """Make `import name` give this module; None: make it fail as if it were not installed."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        package = ModuleType(".".join(parts[:end]))
        package.__path__ = []
        monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, name, module)
    reset()


def pretend_card(monkeypatch: pytest.MonkeyPatch, arch: tuple[int, int] | None) -> None:
    """Every CUDA device has this compute capability; None: there is no CUDA device."""

    def capability(device: torch.device) -> tuple[int, int] | None:
        return arch if device.type == "cuda" else None

    others = (xformers, sage, comfy_kitchen)
    for module in (_flash_attention, fa2, fa3, torch_sdpa, choose, *others):
        monkeypatch.setattr(module, "capability", capability)
