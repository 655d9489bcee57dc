# SPDX-License-Identifier: Apache-2.0
"""skip_oracle.py - what a skip_threshold leaves out on a GPU, and what is lost by it, in numpy
float64, straight from the contract.

Rows that are computed together (16 or 32 of a block of 64 or 128) walk along the listed blocks of
keys from the last to the first. They leave out a block that every real row of the 64 or 128 sees
whole, if all its scores and values are finite and no score of it comes near the largest so far of
its row: by the threshold's logarithm, whatever else is rounded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import blocks_oracle
import oracle
from blocks_oracle import BLOCK, Lists
from oracle import Array

MARGIN = 2e-3  # of a score: what is nearer to the threshold may go either way


class Skipped(NamedTuple):
    left_out: NDArray[np.bool_]  # [batch, heads, rows, blocks of keys]
    is_sure: bool  # no block is near the threshold


def _of_warp(
    scores: Array, seen: NDArray[np.bool_], may_go: NDArray[np.bool_], limit: float
) -> tuple[list[int], bool]:
    """Blocks that these rows leave out, of those that may go. seen: listed and not masked."""
    largest, gone, is_sure = np.full(len(scores), -np.inf), [], True
    for n in reversed(range(len(may_go))):
        mine = slice(n * BLOCK, (n + 1) * BLOCK)
        block = np.where(seen[:, mine], scores[:, mine], -np.inf)
        if not seen[:, mine].any():
            continue
        with np.errstate(invalid="ignore"):
            tops = np.fmax.reduce(block, axis=1)
            below = tops - largest - limit
        if may_go[n] and np.isfinite(scores[:, mine]).all() and (below < 0).all():
            is_sure &= bool((below < -MARGIN).all())
            gone.append(n)
            continue
        if may_go[n] and np.isfinite(scores[:, mine]).all():
            is_sure &= bool((below > MARGIN).any())
        largest = np.fmax(largest, tops)
    return gone, is_sure


def skipped(
    query: Any,
    key: Any,
    value: Any,
    lists: Lists,
    threshold: float,
    *,
    block_m: int,
    rows_of_warp: int,
    **call: Any,
) -> Skipped:
    """What a kernel with blocks of so many rows leaves out."""
    batch, seqlen_q, heads, _ = query.shape
    shape = (batch, heads, seqlen_q, lists.named.shape[3])
    left_out, sure = np.zeros(shape, dtype=bool), [True]
    places = iter(np.ndindex(batch, heads))

    def head(q: Array, k: Array, v: Array, scale: float, seen: Any) -> tuple[Array, Array]:
        place = next(places)
        len_q, len_k = seen.shape
        whole_blocks, named = len_k // BLOCK, lists.named[place]
        with np.errstate(invalid="ignore", over="ignore"):
            scores = scale * (q @ k.T)
        for first in range(0, len_q, block_m):
            rows = slice(first, min(first + block_m, len_q))
            may_go = np.zeros(-(-len_k // BLOCK), dtype=bool)
            for n in range(whole_blocks):
                mine = slice(n * BLOCK, (n + 1) * BLOCK)
                may_go[n] = seen[rows, mine].all() and np.isfinite(v[mine]).all()
            for begin in range(first, rows.stop, rows_of_warp):
                warp = slice(begin, min(begin + rows_of_warp, rows.stop))
                listed = seen[warp] & named[begin // BLOCK, np.arange(len_k) // BLOCK]
                gone, is_sure = _of_warp(scores[warp], listed, may_go, np.log(threshold))
                left_out[place][warp, gone] = True
                sure[0] &= is_sure
        return np.zeros_like(q), np.zeros(len_q)

    oracle.attention(query, key, value, head=head, **call)
    return Skipped(left_out, sure[0])


def lost_shares(
    query: Any, key: Any, value: Any, lists: Lists, left_out: NDArray[np.bool_], **call: Any
) -> Array:
    """[batch, heads, rows]: the share of a row's weights that is of the blocks left out."""
    finite = np.nan_to_num(oracle.as_float64(value), posinf=0.0, neginf=0.0)  # not looked at
    _, whole = blocks_oracle.attention(query, key, finite, lists, **call)
    call.pop("pools_others", None)
    _, lost = blocks_oracle.attention(query, key, finite, lists, left_out=~left_out, **call)
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(lost), 0.0, np.exp(lost - whole))
