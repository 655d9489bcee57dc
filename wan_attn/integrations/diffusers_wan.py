# SPDX-License-Identifier: Apache-2.0
"""diffusers_wan.py - diffusers' Wan transformer through wan_attn: enable() and disable().

Uses nothing but diffusers' public processor interface: an attention layer hands itself and its
inputs to its processor. Importing this file imports neither diffusers nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from wan_attn import attention

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query, key, value), each [batch, seqlen, heads, head_dim] -> the same shape as query."""

TEXT_TOKENS = 512  # image-to-video: what precedes the last 512 rows of the context is the image
STOCK_PROCESSOR = "WanAttnProcessor"


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`wan_attn.sdpa` as Wan uses it: everything attends to everything, and lse is not wanted."""
    return cast(Tensor, attention.sdpa(query, key, value))


class Processor:
    """The processor of one layer; keeps the one it replaced."""

    def __init__(self, replaced: Any, function: AttentionFunction) -> None:
        self.replaced = replaced
        self.function = function

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError(
                "wan_attn: attention_mask must be None, as Wan passes it, got a tensor"
            )
        image, context = None, encoder_hidden_states
        if layer.add_k_proj is not None and context is not None:
            image, context = context[:, :-TEXT_TOKENS], context[:, -TEXT_TOKENS:]

        query, key, value = _project(layer, hidden_states, context)
        query, key = layer.norm_q(query), layer.norm_k(key)
        query, key, value = (x.unflatten(2, (layer.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        out = self.function(query, key, value).flatten(2)
        if image is not None:
            key, value = _project_image(layer, image)
            key, value = (x.unflatten(2, (layer.heads, -1)) for x in (key, value))
            out = out + self.function(query, key, value).flatten(2)
        for module in layer.to_out:  # the projection, and dropout
            out = module(out)
        return out


def _project(layer: Any, hidden_states: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """query, key, value, [batch, seqlen, heads * head_dim]; `context` is None in self-attention."""
    is_fused = getattr(layer, "fused_projections", False)
    if is_fused and context is None:
        return tuple(layer.to_qkv(hidden_states).chunk(3, dim=-1))
    source = hidden_states if context is None else context
    if is_fused:
        return (layer.to_q(hidden_states), *layer.to_kv(source).chunk(2, dim=-1))
    return layer.to_q(hidden_states), layer.to_k(source), layer.to_v(source)


def _project_image(layer: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    if getattr(layer, "fused_projections", False):
        key, value = layer.to_added_kv(image).chunk(2, dim=-1)
    else:
        key, value = layer.add_k_proj(image), layer.add_v_proj(image)
    return layer.norm_added_k(key), value


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) by its angle; cos and sin, float32, hold each angle twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 0::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def enable(transformer: Any, function: AttentionFunction | None = None) -> int:
    """Send the attention of a `WanTransformer3DModel` through wan_attn. Twice is once.

    Args:
        transformer: the model; of a WanPipeline that is `pipe.transformer` (and `transformer_2`).
        function: what computes attention; None: `wan_attn.sdpa`.

    Returns:
        The number of attention layers that go through wan_attn.

    Raises:
        TypeError: the model has no layer that diffusers' own Wan processor serves.
    """
    processors = dict(transformer.attn_processors)
    count = 0
    for name, processor in processors.items():
        stock = processor.replaced if isinstance(processor, Processor) else processor
        if type(stock).__name__ == STOCK_PROCESSOR:
            processors[name] = Processor(stock, function or attend)
            count += 1
    if not count:
        raise TypeError(
            "wan_attn: transformer must be a WanTransformer3DModel with diffusers' own "
            f"{STOCK_PROCESSOR}, got {type(transformer).__name__}"
        )
    transformer.set_attn_processor(processors)
    return count


def disable(transformer: Any) -> None:
    """Give every layer that enable() took its own processor back."""
    processors = dict(transformer.attn_processors)
    for name, processor in processors.items():
        if isinstance(processor, Processor):
            processors[name] = processor.replaced
    transformer.set_attn_processor(processors)
