# SPDX-License-Identifier: Apache-2.0
"""_diffusers_layers - what diffusers' Wan layers do around attention: project, norm, rotate."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from wan_attn.integrations import _rope


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


def norm_and_rotate(
    norm: Any, x: Tensor, heads: int, rotary_emb: Any, *, may_fuse: bool = True
) -> Tensor:
    """[batch, seqlen, heads * head_dim] -> normed, and turned if rotary_emb is not None,
    [batch, seqlen, heads, head_dim]; in one pass where our kernels take it."""
    ours = _fused(norm, x, heads, rotary_emb) if may_fuse else None
    if ours is not None:
        return ours
    x = norm(x).unflatten(2, (heads, -1))
    return x if rotary_emb is None else rotate(x, rotary_emb)


def _fused(norm: Any, x: Tensor, heads: int, rotary_emb: Any) -> Tensor | None:
    if type(norm) is not torch.nn.RMSNorm or norm._forward_hooks or norm._forward_pre_hooks:
        return None
    if type(x) is not Tensor or norm.eps is None or norm.normalized_shape != (x.shape[-1],):
        return None
    y = x.unflatten(2, (heads, -1))
    if not _rope.is_plain(y) or not (rotary_emb is None or isinstance(rotary_emb, tuple)):
        return None
    table = None if rotary_emb is None else _table(*rotary_emb)
    if table is not None and (table.dim() != 4 or table.shape[1] != y.shape[1]):
        return None
    if not _rope.takes(y, norm.weight, table):
        return None
    return _rope.rms_norm_rope(
        y,
        norm.weight,
        None if table is None else table.expand_as(y),
        eps=norm.eps,
        round_norm=False,
        dtype=x.dtype,
    )


_here = threading.local()


def _table(cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin in turn, [1, seqlen, 1, head_dim]: made once for all layers of a forward."""
    # A tensor of inference mode does not tell whether it has been written to since.
    if torch.compiler.is_compiling() or cos.is_inference() or sin.is_inference():
        return _interleaved(cos, sin)
    known = vars(_here).get("known", ())
    is_known = len(known) == 2 and all(
        of() is part and version == part._version
        for (of, version), part in zip(known, (cos, sin), strict=True)
    )
    if not is_known:
        _here.known = tuple((weakref.ref(part), part._version) for part in (cos, sin))
        _here.table = _interleaved(cos, sin)
    made: Tensor = _here.table
    return made


def _interleaved(cos: Tensor, sin: Tensor) -> Tensor:
    return torch.stack((cos[..., 0::2], sin[..., 1::2]), dim=-1).flatten(-2)


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
