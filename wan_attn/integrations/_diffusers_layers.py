# SPDX-License-Identifier: Apache-2.0
"""_diffusers_layers - what diffusers' Wan layers do around attention: projections and rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def project(layer: Any, hidden_states: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """query, key, value, [batch, seqlen, heads * head_dim]; `context` is None in self-attention.

    Fused projections stand beside the three; not every version of diffusers makes them everywhere.
    """
    is_fused = getattr(layer, "fused_projections", False)
    if is_fused and context is None and hasattr(layer, "to_qkv"):
        return tuple(layer.to_qkv(hidden_states).chunk(3, dim=-1))
    source = hidden_states if context is None else context
    if is_fused and hasattr(layer, "to_kv"):
        return (layer.to_q(hidden_states), *layer.to_kv(source).chunk(2, dim=-1))
    return layer.to_q(hidden_states), layer.to_k(source), layer.to_v(source)


def project_image(layer: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    if getattr(layer, "fused_projections", False) and hasattr(layer, "to_added_kv"):
        key, value = layer.to_added_kv(image).chunk(2, dim=-1)
    else:
        key, value = layer.add_k_proj(image), layer.add_v_proj(image)
    return layer.norm_added_k(key), value


def rotate(x: Tensor, rotary_emb: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) by its angle.

    Args:
        rotary_emb: (cos, sin), float32, [1, seqlen, 1, head_dim] holding each angle twice; before
            diffusers 0.35 cos + i*sin, complex, [1, 1, seqlen, head_dim / 2].
    """
    if isinstance(rotary_emb, Tensor):
        turn = rotary_emb.transpose(1, 2)
        cos, sin = turn.real, turn.imag
    else:
        cos, sin = (part[..., 0::2] for part in rotary_emb)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
