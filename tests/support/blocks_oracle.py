# SPDX-License-Identifier: Apache-2.0
"""blocks_oracle.py - attention with lists of blocks in numpy float64, straight from the contract.

A row sees the keys that it may see at all and whose block its list names. With pools_others each
other block of which it may see every real key is one more key: the mean of that block's keys and
values, whose weight is multiplied by the number of its keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import oracle
from oracle import Array

BLOCK = 64


class Lists(NamedTuple):
    """Which blocks of keys each block of queries sees: [batch, heads, query blocks, key blocks]."""

    named: NDArray[np.bool_]

    def as_tensors(self, capacity: int | None = None, behind: int = -(1 << 31)) -> tuple[Any, Any]:
        """block_counts and block_indices; what lies behind a count is `behind`."""
        import torch

        counts = self.named.sum(-1)
        room = max(int(counts.max(initial=0)), 0) if capacity is None else capacity
        indices = np.full((*counts.shape, room), behind, dtype=np.int64)
        for place in np.ndindex(*counts.shape):
            found = np.flatnonzero(self.named[place])
            indices[place][: len(found)] = found
        return torch.tensor(counts, dtype=torch.int32), torch.tensor(indices, dtype=torch.int32)


def blocks_of(length: int) -> int:
    return (length + BLOCK - 1) // BLOCK


def keys_of(blocks: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """[rows, blocks of keys] -> [rows, keys], cut to `shape`."""
    return blocks[: shape[0], np.arange(shape[1]) // BLOCK]


def random_lists(
    seed: int, batch: int, heads: int, seqlen_q: int, seqlen_k: int, density: float
) -> Lists:
    shape = (batch, heads, blocks_of(seqlen_q), blocks_of(seqlen_k))
    return Lists(np.random.default_rng(seed).random(shape) < density)


def one_head(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    seen: NDArray[np.bool_],
    named: NDArray[np.bool_],
    pools_others: bool,
) -> tuple[Array, Array]:
    """Rows q over keys k, v, cut to real lengths; seen: what masks leave, [len_q, len_k]."""
    len_q, len_k = seen.shape
    of_key = np.arange(len_k) // BLOCK
    listed = seen & named[np.arange(len_q) // BLOCK][:, of_key]
    keys, values = [k], [v]
    counts, rows = [np.ones(len_k)], [listed]
    for n in range(blocks_of(len_k) if pools_others else 0):
        mine = slice(n * BLOCK, min((n + 1) * BLOCK, len_k))
        whole = seen[:, mine].all(axis=1) & ~named[np.arange(len_q) // BLOCK, n]
        keys.append(k[mine].mean(axis=0, keepdims=True))
        values.append(v[mine].mean(axis=0, keepdims=True))
        counts.append(np.array([float(mine.stop - mine.start)]))
        rows.append(whole[:, None])
    all_k, all_v = np.concatenate(keys), np.concatenate(values)
    factor, counted = np.concatenate(counts), np.concatenate(rows, axis=1)
    out, lse = np.zeros_like(q), np.full(len_q, -np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        scores = scale * (q @ all_k.T)
        for i in range(len_q):
            s = counted[i]
            if not s.any():
                continue
            top = scores[i, s].max()
            weight = factor[s] * np.exp(scores[i, s] - top)
            out[i] = weight @ all_v[s] / weight.sum()
            lse[i] = top + np.log(weight.sum())
    return out, lse


def attention(
    query: Any,
    key: Any,
    value: Any,
    lists: Lists,
    *,
    pools_others: bool = False,
    left_out: NDArray[np.bool_] | None = None,
    **call: Any,
) -> tuple[Array, Array]:
    """As oracle.attention, with lists. left_out: [batch, heads, rows, key blocks]: what a row does
    not see although it is listed."""
    batch, _, heads, _ = query.shape
    places = iter([(b, h) for b in range(batch) for h in range(heads)])

    def head(q: Array, k: Array, v: Array, scale: float, seen: Any) -> tuple[Array, Array]:
        place = next(places)
        if left_out is not None:
            seen = seen & ~keys_of(left_out[place], seen.shape)
        return one_head(q, k, v, scale, seen, lists.named[place], pools_others)

    return oracle.attention(query, key, value, head=head, **call)
