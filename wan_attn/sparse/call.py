# SPDX-License-Identifier: Apache-2.0
"""call.py - attention by a caller's own block lists."""

from __future__ import annotations

from torch import Tensor

from wan_attn.request import Blocks, Call, Request, check_blocks, gate, refuse
from wan_attn.sparse import kernel
from wan_attn.sparse.lists import BlockLists


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    *,
    pools_others: bool = False,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """wan_attn.sdpa of the listed blocks alone, by our kernels; forward only.

    Always as listed: no mode, budget or order of tokens changes it.

    Args:
        query, key, value: as of wan_attn.sdpa.
        lists: of block_lists(), or made by the caller: which blocks of 64 keys each block of 64
            queries computes, for each sample and each of query's heads.
        pools_others: each block that is not listed counts as one key, the mean of its keys and
            values, with their number as its weight.
        q_lens, k_lens, scale, is_causal, window, return_lse: as of wan_attn.sdpa.

    Raises:
        RuntimeError: a bad argument; or no kernel of ours takes the call, with the reason.
    """
    call = Call(
        q_lens=None if q_lens is None else gate.lengths("q_lens", q_lens),
        k_lens=None if k_lens is None else gate.lengths("k_lens", k_lens),
        scale=None if scale is None else gate.number("scale", scale),
        is_causal=gate.flag("is_causal", is_causal),
        window=gate.pair("window", window),
        return_lse=gate.flag("return_lse", return_lse),
    )
    pools_others = gate.flag("pools_others", pools_others)
    request = Request.from_tensors(query, key, value, call)
    if not isinstance(lists, tuple) or len(lists) != 2:
        refuse("lists", "BlockLists, or (counts, indices)", gate.kind_of(lists))
    check_blocks(query, Blocks(*lists, pools_others))
    reason = kernel.why_not(kernel.asked(request, pools_others=pools_others))
    if reason is not None:
        raise RuntimeError(f"wan_attn: no kernel computes block lists for this call: {reason}")
    out, lse = kernel.by_lists((query, key, value), call, lists, pools_others)
    return out if lse is None else (out, lse)
