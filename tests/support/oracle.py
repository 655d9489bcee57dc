# SPDX-License-Identifier: Apache-2.0
"""oracle.py - attention in numpy float64, straight from the contract; shares no code with others.

For each sample and head: cut everything to the real lengths, so that nothing behind them is even
read; scores of all pairs; take away the keys a row may not see; softmax; weighted sum of values.
No blocks, no online softmax, no tricks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# (q, k, v, scale, which keys each row sees) -> (out, lse) of one head; see one_head.
Head = Callable[[Array, Array, Array, float, NDArray[np.bool_]], tuple[Array, Array]]


def as_float64(x: Any) -> Array:
    """A torch tensor of any float dtype and strides, or anything numpy takes: the same values."""
    if hasattr(x, "detach"):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def as_lengths(lens: Any, batch: int, padded: int) -> list[int]:
    """Real lengths as Python ints; None: every sample has the padded length."""
    if lens is None:
        return [padded] * batch
    return [int(n) for n in (lens.tolist() if hasattr(lens, "tolist") else lens)]


def visible(
    len_q: int, len_k: int, is_causal: bool = False, window: tuple[int, int] = (-1, -1)
) -> NDArray[np.bool_]:
    """[len_q, len_k]: may row i see key j? Bottom-right: the last row ends in the last key."""
    i = np.arange(len_q)[:, None]
    j = np.arange(len_k)[None, :]
    distance = j - (i + len_k - len_q)  # of key j to the right of row i's diagonal
    seen = np.ones((len_q, len_k), dtype=bool)
    if is_causal:
        seen &= distance <= 0
    left, right = window
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def one_head(
    q: Array, k: Array, v: Array, scale: float, seen: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Rows q [len_q, D] over keys k, v [len_k, D] -> (out [len_q, D], lse [len_q])."""
    out = np.zeros_like(q)
    lse = np.full(len(q), -np.inf)
    rows = seen.any(axis=1)  # the others see no key: out stays 0, lse -inf
    if not rows.any():
        return out, lse
    q, seen = q[rows], seen[rows]
    with np.errstate(invalid="ignore", over="ignore"):
        scores = np.where(seen, scale * (q @ k.T), -np.inf)
        row_max = scores.max(axis=1, keepdims=True)
        weights = np.where(seen, np.exp(scores - row_max), 0.0)
        row_sum = weights.sum(axis=1, keepdims=True)
        if np.isfinite(v).all():
            weighted = weights @ v
        else:  # 0 * NaN is NaN: a value that a row does not see must not take part in it at all
            weighted = np.stack([w[s] @ v[s] for w, s in zip(weights, seen, strict=True)])
        out[rows] = weighted / row_sum
        lse[rows] = (row_max + np.log(row_sum))[:, 0]
    return out, lse


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    q_lens: Any = None,
    k_lens: Any = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    head: Head | None = None,
) -> tuple[Array, Array]:
    """[B, Lq, Nq, D] over two [B, Lk, Nk, D] -> (out [B, Lq, Nq, D], lse [B, Nq, Lq]), float64.

    head: what computes one head; None: one_head.
    """
    q, k, v = as_float64(query), as_float64(key), as_float64(value)
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_k, heads_k = k.shape[1], k.shape[2]
    if scale is None:
        scale = head_dim**-0.5
    out = np.zeros_like(q)
    lse = np.full((batch, heads_q, seqlen_q), -np.inf)
    lens_q = as_lengths(q_lens, batch, seqlen_q)
    lens_k = as_lengths(k_lens, batch, seqlen_k)
    for b, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        seen = visible(len_q, len_k, is_causal, window)
        for h in range(heads_q):
            h_k = h // (heads_q // heads_k)  # consecutive query heads share a key head
            o, s = (head or one_head)(
                q[b, :len_q, h], k[b, :len_k, h_k], v[b, :len_k, h_k], scale, seen
            )
            out[b, :len_q, h] = o
            lse[b, h, :len_q] = s
    return out, lse
