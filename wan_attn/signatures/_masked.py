# SPDX-License-Identifier: Apache-2.0
"""_masked.py - a call with a mask of its own, by PyTorch's SDPA: our kernels know lengths, causal
and window only, and a mask that was dropped would be a wrong picture that is easily overlooked."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from wan_attn import log
from wan_attn.backends._torch_kernels import SDPA, laid_out
from wan_attn.request import Call, check, check_dense, gate, refuse
from wan_attn.signatures import _operands

REASON = "a mask is given, and wan_attn's kernels know lengths, causal and window only"


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, argument: str
) -> Tensor:
    """softmax(scale · query keyᵀ under the mask) value.

    Args:
        query: [batch, heads_q, seqlen_q, head_dim]; key, value: [batch, heads_k, seqlen_k,
            head_dim], of query's dtype.
        mask: broadcastable to [batch, heads_q, seqlen_q, seqlen_k]; bool, True where the key is
            seen, or floating, added to the scores.
        argument: what the caller calls the mask.

    Returns:
        [batch, heads_q, seqlen_q, head_dim] in query's dtype; a row that sees no key is 0.

    Raises:
        RuntimeError: the mask's dtype or shape does not fit.
    """
    check_dense(query, key, value)
    rows, keys, values = (x.transpose(1, 2) if x.dim() == 4 else x for x in (query, key, value))
    check(rows, keys, values, Call(scale=scale), takes_any_strides=True)
    if query.dtype != value.dtype or key.dtype != value.dtype:
        refuse("query and key", f"of value's dtype {value.dtype}", f"{query.dtype} and {key.dtype}")
    if not isinstance(mask, Tensor):
        refuse(argument, "a tensor or None", type(mask).__name__)
    gate.dense(argument, mask)
    if mask.device != query.device:
        refuse(argument, f"on query's device {query.device}", mask.device)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        refuse(argument, "of dtype bool or floating", mask.dtype)
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if not _operands.broadcasts(mask.shape, shape):
        refuse(argument, f"broadcastable to {list(shape)}", list(mask.shape))
    mask = torch.atleast_2d(mask)  # torch's function counts its dimensions from the end
    if not torch.compiler.is_compiling():
        log.once(("mask", argument), logging.INFO, f"Using PyTorch SDPA ({argument}: {REASON})")
    group = query.shape[1] // key.shape[1]
    if group > 1:  # enable_gqa came with torch 2.5
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
        sees = mask > -math.inf
    else:
        sees = mask
    out = SDPA(laid_out(query), key, value, attn_mask=mask, scale=scale)
    # What a softmax over nothing gives depends on torch's version and kernel.
    return out.masked_fill(~sees.any(-1, keepdim=True), 0)
