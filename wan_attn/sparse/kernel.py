# SPDX-License-Identifier: Apache-2.0
"""kernel.py - one call of our kernels that leaves out blocks of keys."""

from __future__ import annotations

import struct
from dataclasses import replace

import torch
from torch import Tensor

from wan_attn.backends import native
from wan_attn.observe.heads import Operands, Result
from wan_attn.request import Call, Request
from wan_attn.sparse.lists import BlockLists


def asked(request: Request, threshold: float = 0.0, pools_others: bool = True) -> Request:
    """Such a call with blocks left out.

    Args:
        threshold: as of by_threshold(); 0: it comes with lists.
        pools_others: as of by_lists().
    """
    if threshold:
        return replace(request, skip_threshold=threshold)
    return replace(request, has_block_lists=True, pools_others=pools_others)


def why_not(request: Request) -> str | None:
    """Why no kernel of ours takes a call that asked() has made; None: one does."""
    if request.needs_grad:
        return "forward only, and a gradient is wanted"
    return native.why_not(request)


def title(request: Request) -> str:
    """What computes a call that asked() has made, as the log names it."""
    return f"{native.TITLE} ({native.kernel_name(request)}, blocks left out)"


def by_lists(
    operands: Operands, call: Call, lists: BlockLists, pools_others: bool = True
) -> Result:
    """The listed blocks; with `pools_others` each of the others as one key, its mean."""
    counts, indices = lists
    return native.run(
        *operands,
        call,
        block_counts=counts,
        block_indices=indices,
        pools_others=pools_others,
    )


def by_threshold(operands: Operands, call: Call, threshold: float, guard: Tensor) -> Result:
    """All but the blocks whose largest weight against the running maximum is below `threshold`.

    Args:
        guard: of make_guard(), which learns the largest share that a row has lost.
    """
    return native.run(*operands, call, skip_threshold=threshold, guard=guard)


def make_guard(device: torch.device) -> Tensor:
    """[5] int32, zeros: wan_attn_guard of csrc/wan_attn.h, whose last word is lost_mass."""
    return torch.zeros(5, dtype=torch.int32, device=device)


def lost_mass(words: list[int]) -> float:
    """The share of its weights that no row lacks more of."""
    (share,) = struct.unpack("f", struct.pack("i", words[4]))
    return float(share)
