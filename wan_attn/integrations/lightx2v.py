# SPDX-License-Identifier: Apache-2.0
"""lightx2v.py - an attention type `wan_attn` for LightX2V, through its public registry.

Interface: lightx2v/common/ops/attn (template.py, flash_attn.py, torch_sdpa.py) of ModelTC/LightX2V.
Importing this file imports nothing of it.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

from torch import Tensor

from wan_attn import attention
from wan_attn.request import Refusal, gate, refuse
from wan_attn.selfcheck import proof
from wan_attn.signatures import _masked, flash_attn

NAME = "wan_attn"
_NAMES = {
    **{"query": "q", "key": "k", "value": "v", "scale": "softmax_scale", "is_causal": "causal"},
    **{"cu_seqlens_k": "cu_seqlens_kv", "max_seqlen_k": "max_seqlen_kv"},
}


def register() -> type:
    """Make `wan_attn` a value of LightX2V's config keys self_attn_1_type, cross_attn_1_type, ...

    Call it before the runner is made. Twice is once.

    Returns:
        The class that LightX2V makes its attention objects of.

    Raises:
        ModuleNotFoundError: LightX2V cannot be imported here.
    """
    registry: Any = importlib.import_module("lightx2v.utils.registry_factory").ATTN_WEIGHT_REGISTER
    if NAME in registry:
        return cast(type, registry[NAME])
    base: Any = importlib.import_module("lightx2v.common.ops.attn.template").AttnWeightTemplate

    class WanAttnWeight(base):  # type: ignore[misc]  # a class of the host's
        """LightX2V's attention by wan_attn: exact, and never a silent other backend."""

        def __init__(self) -> None:
            self.config: dict[str, Any] = {}

        def apply(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return apply(q, k, v, *args, **kwargs)

        def apply_with_lse(
            self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None
        ) -> tuple[Tensor, Tensor]:
            return apply_with_lse(q, k, v, softmax_scale)

        def __reduce__(self) -> tuple[Any, ...]:
            """A class made at run time is not found by its name: pickle and copies make it anew."""
            return _made, (), vars(self)

    registry(NAME)(WanAttnWeight)
    proof.before_work()
    return WanAttnWeight


def _made() -> Any:
    return register()()


def unregister() -> None:
    """Take the name out again; without it, do nothing."""
    registry: Any = importlib.import_module("lightx2v.utils.registry_factory").ATTN_WEIGHT_REGISTER
    if NAME in registry:
        del registry[NAME]


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    *,
    drop_rate: float = 0.0,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    **context: Any,
) -> Tensor:
    """One call of LightX2V's.

    Args:
        q, k, v: [tokens, heads, head_dim] or [batch, seqlen, heads, head_dim].
        cu_seqlens_q, cu_seqlens_kv: [sequences + 1], both or neither; with one sequence, or none,
            each sample attends to itself.
        attn_mask: broadcastable to [batch, heads, seqlen_q, seqlen_kv], for one sequence: PyTorch
            computes such a call, which the log says once.
        drop_rate: 0.
        context: what LightX2V tells about where the call comes from (block, scheduler, model): it
            says nothing about the result.

    Returns:
        [tokens, heads * head_dim].
    """
    if gate.probability("drop_rate", drop_rate) > 0:
        refuse("drop_rate", "0, as inference has no dropout", drop_rate)
    causal = gate.flag("causal", causal)
    for name, operand in (("q", q), ("k", k), ("v", v)):
        rule = "[tokens, heads, head_dim] or [batch, seqlen, heads, head_dim]"
        if not isinstance(operand, Tensor):
            refuse(name, rule, gate.kind_of(operand))
        gate.dense(name, operand)
        if operand.dim() not in (3, 4):
            refuse(name, rule, list(operand.shape))
    for name, begins in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        if begins is not None:
            gate.dense(name, begins)
            if begins.dim() != 1:
                refuse(name, "[sequences + 1]", list(begins.shape))
    if (cu_seqlens_q is None) != (cu_seqlens_kv is None):
        refuse("cu_seqlens_q and cu_seqlens_kv", "given both or neither", "one")
    is_packed = cu_seqlens_q is not None and cu_seqlens_kv is not None and len(cu_seqlens_q) > 2
    if is_packed and attn_mask is not None:
        refuse("attn_mask", "None with several sequences", f"a tensor {list(attn_mask.shape)}")
    try:
        if is_packed:
            limits = (max_seqlen_q, max_seqlen_kv)
            return _packed(q, k, v, (cu_seqlens_q, cu_seqlens_kv), limits, softmax_scale, causal)
        return _plain(q, k, v, attn_mask, softmax_scale, causal)
    except Refusal as refusal:
        raise refusal.under(_NAMES) from None


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begins: tuple[Tensor | None, Tensor | None],
    limits: tuple[int | None, int | None],
    softmax_scale: float | None,
    causal: bool,
) -> Tensor:
    """Several sequences."""
    q, k, v = (x.flatten(0, 1) if x.dim() == 4 else x for x in (q, k, v))
    packed = flash_attn.flash_attn_varlen_func(
        q,
        k,
        v,
        *cast(tuple[Tensor, Tensor], begins),
        q.shape[0] if limits[0] is None else limits[0],
        k.shape[0] if limits[1] is None else limits[1],
        softmax_scale=softmax_scale,
        causal=causal,
    )
    return cast(Tensor, packed).flatten(1)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> Tensor:
    """One sequence, or a batch of them."""
    q, k, v = (x.unsqueeze(0) if x.dim() == 3 else x for x in (q, k, v))
    if attn_mask is not None:
        if causal:
            refuse("attn_mask", "None with causal", f"a tensor {list(attn_mask.shape)}")
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        out = _masked.attend(query, key, value, attn_mask, softmax_scale, "attn_mask")
        out = out.transpose(1, 2)
    else:
        out = cast(Tensor, attention.sdpa(q, k, v, scale=softmax_scale, is_causal=causal))
    return out.flatten(2).flatten(0, 1)


def apply_with_lse(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """What ring attention merges: out [tokens, heads * head_dim], lse [tokens, heads] float32."""
    q, k, v = (x.unsqueeze(0) if x.dim() == 3 else x for x in (q, k, v))
    out, lse = attention.sdpa(q, k, v, scale=softmax_scale, return_lse=True)
    return out.flatten(2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
