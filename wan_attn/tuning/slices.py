# SPDX-License-Identifier: Apache-2.0
"""slices.py - the part of a call that is measured: some heads, the last rows, all keys.

A kernel reads every key for each block of rows, so a slice of heads and rows does what the call
does, on the call's own operands, in a small part of its time and of its memory. It is cut from the
last rows, because masks are aligned bottom-right: they see the very keys that they see in the call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_attn.request import Call, Request
from wan_attn.tuning.kinds import work

# Rows of one head that are kept together: what a kernel does once for a head (packing keys on a
# CPU) must weigh as little in the slice as in a long call.
ROWS_TOGETHER = 2048
# Rows, over all heads, that give each multiprocessor or thread something to do.
ROWS_EACH = {"cpu": 1024, "cuda": 128}
ROWS_MIN = 64
MULTIPLE = 128  # of rows: the blocks of most kernels

Operands = tuple[Tensor, Tensor, Tensor, Call]


@dataclass(frozen=True, slots=True)
class Slice:
    """How much of a call.

    Attributes:
        heads_k: heads of key and value; query has its group of heads for each.
        rows: of query, the last ones.
        share: of the call's work, masks included.
    """

    heads_k: int
    rows: int
    share: float


def choose(request: Request, want: float, most: float = math.inf) -> Slice:
    """The slice of a call that is about `want` of its work, and large enough to tell.

    Args:
        want: a share, 0 to 1.
        most: FLOP, without masks, that a slice should not exceed.
    """
    r = request
    group = r.num_heads_q // r.num_heads_k
    all_rows = r.batch * r.num_heads_q * r.seqlen_q
    least = _units(r.device) * ROWS_EACH[r.device.type]
    rows = max(want * all_rows, least)
    rows = min(rows, max(most / max(work(r), 1.0), 1e-9) * all_rows, all_rows)
    together = min(r.seqlen_q, ROWS_TOGETHER)
    heads = min(r.num_heads_k, max(1, round(rows / (r.batch * group * together))))
    each = rows / (r.batch * group * heads)
    each = min(r.seqlen_q, max(ROWS_MIN, math.ceil(each / MULTIPLE) * MULTIPLE))
    part = each / r.seqlen_q
    is_square = r.is_causal and r.seqlen_q == r.seqlen_k
    seen = 1 - (1 - part) ** 2 if is_square else part  # the last rows see the most keys
    return Slice(heads, each, seen * heads / r.num_heads_k)


def _units(device: torch.device) -> int:
    """What computes side by side: multiprocessors, or threads."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return torch.get_num_threads()


def cut(query: Tensor, key: Tensor, value: Tensor, call: Call, part: Slice) -> Operands:
    """Views of the operands, and the call for them. Lengths on a device are read, which waits."""
    group = query.shape[2] // key.shape[2]
    longest = query.shape[1]
    if call.q_lens is not None:
        longest = max([0, *(min(int(n), longest) for n in call.q_lens.tolist())])
    start = max(0, longest - part.rows)
    if call.q_lens is not None:
        call = call._replace(q_lens=(call.q_lens - start).clamp(0, part.rows))
    return (
        query[:, start : start + part.rows, : part.heads_k * group],
        key[:, :, : part.heads_k],
        value[:, :, : part.heads_k],
        call,
    )


def quarter(part: Slice) -> Slice:
    """A quarter of its rows: for the first run, whose time does not count."""
    rows = min(part.rows, max(ROWS_MIN, part.rows // 4))
    return Slice(part.heads_k, rows, part.share * rows / part.rows)
