# SPDX-License-Identifier: Apache-2.0
"""other_libraries.py - xformers, sageattention and comfy_kitchen as they are called, by the oracle:
none of them runs without a GPU.

Signatures and refusals are those of facebookresearch/xformers at 03b91d7 (0.0.35),
thu-ml/SageAttention at d1a57a5 (2.2.0) and 0db4cbf (1.0.6), and Comfy-Org/comfy-kitchen at 7d86acf
(0.2.31). What they do to their callers, these do: SageAttention drops keywords and changes the
current device, version 1 changes its keys; rows that see no key are garbage in all of them.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import oracle
from standins import check_operands

GARBAGE = 777.0


def _exact(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """[batch, seqlen, heads, head_dim], aligned bottom-right."""
    check_operands(q, k, v)
    if 0 in q.shape or 0 in k.shape:
        raise ValueError("batch, head counts, and sequence lengths must be positive")
    out, lse = oracle.attention(q, k, v, scale=scale, is_causal=causal, window=window)
    result = torch.from_numpy(out).to(q.dtype)
    alive = torch.from_numpy(lse).isfinite().transpose(1, 2).unsqueeze(-1)
    return result.masked_fill(~alive, GARBAGE), torch.from_numpy(lse).float()


class LowerTriangularFromBottomRightMask:
    """Causal; LowerTriangularMask, aligned top-left, is not what anybody here means."""


class LocalAttentionFromBottomRightMask:
    """A window; refuses bounds below 0, as the real one."""

    def __init__(self, window_left: int, window_right: int) -> None:
        if window_left < 0 or window_right < 0:
            raise ValueError("Invalid window value passed to `LocalAttentionFromBottomRightMask`")
        self.window = (window_left, window_right)


def _kernel(lowest: tuple[int, int], highest: Any, biases: tuple[type, ...], there: bool) -> Any:
    return SimpleNamespace(
        CUDA_MINIMUM_COMPUTE_CAPABILITY=lowest,
        CUDA_MAXIMUM_COMPUTE_CAPABILITY=highest,
        SUPPORTED_DTYPES={torch.half, torch.bfloat16},
        SUPPORTED_MAX_K=256,
        SUPPORTED_ATTN_BIAS_TYPES=(type(None), *biases),
        is_available=lambda: there,
    )


def make_xformers(*, has_flash: bool = True) -> Any:
    """xformers.ops; its cutlass kernel ends at compute capability 9.0 and has no window."""

    def compute(q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: Any) -> tuple[Tensor, Tensor]:
        if q.shape[2] != k.shape[2]:
            raise ValueError("Incompatible shapes for attention inputs")
        window = bias.window if isinstance(bias, LocalAttentionFromBottomRightMask) else (-1, -1)
        causal = isinstance(bias, LowerTriangularFromBottomRightMask)
        if bias is not None and not causal and window == (-1, -1):
            raise RuntimeError("No operator found for `memory_efficient_attention_forward`")
        return _exact(q, k, v, scale, causal, window)

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0,
        scale: float | None = None, *, op: Any = None, output_dtype: Any = None,
    ) -> Any:  # fmt: skip
        return compute(query, key, value, attn_bias, scale)[0]

    def memory_efficient_attention_forward_requires_grad(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0,
        scale: float | None = None, *, op: Any = None, output_dtype: Any = None,
    ) -> Any:  # fmt: skip
        out, lse = compute(query, key, value, attn_bias, scale)
        padding = -query.shape[1] % 32  # the rows of cutlass's come in multiples of 32
        return out, torch.nn.functional.pad(lse, (0, padding), value=GARBAGE)

    both = (LowerTriangularFromBottomRightMask, LocalAttentionFromBottomRightMask)
    module: Any = ModuleType("xformers.ops")
    module.memory_efficient_attention = memory_efficient_attention
    module.memory_efficient_attention_forward_requires_grad = (
        memory_efficient_attention_forward_requires_grad
    )
    module.fmha = SimpleNamespace(
        attn_bias=SimpleNamespace(**{bias.__name__: bias for bias in both}),
        ALL_FW_OPS=[
            _kernel((8, 0), None, both, has_flash),
            _kernel((5, 0), (9, 0), both[:1], True),
        ],
    )
    return module


def make_sage2() -> Any:
    """sageattention 2.2."""

    def sageattn(
        q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
        sm_scale: float | None = None, return_lse: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        assert tensor_layout == "NHD" and not kwargs, "the stand-in knows what is given to it"
        if q.shape[-1] > 128:
            raise ValueError(f"Unsupported head_dim: {q.shape[-1]}")
        if return_lse and q.shape[2] != k.shape[2]:
            raise RuntimeError("The size of tensor a must match the size of tensor b")
        # Aligned top-left: row i sees keys up to i.
        causal = is_causal and q.shape[1] == k.shape[1]
        window = (-1, q.shape[1] - k.shape[1]) if is_causal and not causal else (-1, -1)
        out, lse = _exact(q, k, v, sm_scale, causal, window)
        return (out, lse) if return_lse else out

    module: Any = ModuleType("sageattention")
    module.sageattn = sageattn
    return module


def make_sage1() -> Any:
    """sageattention 1.0.6: return_lse would be dropped, and the mean of the keys is taken from the
    caller's own."""

    def sageattn(
        q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
        sm_scale: float | None = None, smooth_k: bool = True, **kwargs: Any,
    ) -> Any:  # fmt: skip
        assert q.shape[-1] in [64, 96, 128], "headdim should be in [64, 96, 128]."
        assert tensor_layout == "NHD" and not kwargs, "the stand-in knows what is given to it"
        out, _ = _exact(q, k, v, sm_scale, is_causal, (-1, -1))
        k.fill_(GARBAGE)
        return out

    module: Any = ModuleType("sageattention")
    module.sageattn = sageattn
    return module


def make_comfy_kitchen(*, is_available: bool = True) -> Any:
    """comfy_kitchen 0.2.31."""

    def int8_attention(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, attn_mask: Any = None
    ) -> Tensor:
        """Operands [batch, heads, seqlen, head_dim]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _exact(q, k, v, scale, False, (-1, -1))[0].transpose(1, 2)

    module: Any = ModuleType("comfy_kitchen")
    module.int8_attention = int8_attention
    module.int8_attention_is_available = lambda device=None: is_available
    return module
