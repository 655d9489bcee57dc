# SPDX-License-Identifier: Apache-2.0
"""qk8_oracle.py - 8-bit scores as csrc/cpu/qk8.h defines them, in numpy; shares no code with them.

float32 where the definition says so, each operation rounded by itself; what follows the integers is
float64. So a row must have these very integers and steps, and may differ by float32's rounding in
what it makes of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import oracle
from oracle import Array

Float32 = NDArray[np.float32]
ONE_BLOCK, LARGEST_INT = 64, np.float32(127.0)


def depth_of(head_dim: int) -> int:
    """The power of two that head_dim is filled up to."""
    return 1 << (head_dim - 1).bit_length()


def negated(head_dim: int) -> NDArray[np.bool_]:
    """Which channels change their sign: where a linear congruence's top bit is 0."""
    state, out = 0x9E3779B9, []
    for _ in range(head_dim):
        state = (1664525 * state + 1013904223) & 0xFFFFFFFF
        out.append(state < 0x80000000)
    return np.array(out)


def rotated(x: Float32) -> Float32:
    """[rows, head_dim] -> [rows, depth]."""
    rows, head_dim = x.shape
    depth = depth_of(head_dim)
    y = np.zeros((rows, depth), np.float32)
    y[:, :head_dim] = np.where(negated(head_dim), -x, x)
    half = 1
    while half < depth:
        a = np.array([d for d in range(depth) if not d & half])
        b = a + half
        y[:, a], y[:, b] = y[:, a] + y[:, b], y[:, a] - y[:, b]
        half *= 2
    return y


def quantised(x: Float32) -> tuple[NDArray[np.int64], Float32]:
    """[rows, head_dim] -> integers [rows, depth], and the rows' steps [rows]."""
    y = rotated(x)
    largest = np.abs(y).max(axis=1).astype(np.float32)  # NaN if one is
    is_small = largest < np.float32(2.0**-100)
    safe = np.where(np.isfinite(largest) & ~is_small, largest, np.float32(1.0))
    inverse = (LARGEST_INT / safe).astype(np.float32)
    integers = np.rint((y * inverse[:, None]).astype(np.float32))
    step = np.where(is_small, np.float32(0.0), (largest / LARGEST_INT).astype(np.float32))
    step = np.where(np.isfinite(largest), step, np.float32(np.nan)).astype(np.float32)
    integers = np.where((np.isfinite(largest) & ~is_small)[:, None], integers, 0.0)
    return integers.astype(np.int64), step


def mean_of(keys: Float32) -> Float32:
    """[keys, head_dim] -> [head_dim], in the definition's order."""
    count, head_dim = keys.shape
    finite = np.where(np.isfinite(keys), keys, np.float32(0.0))
    total = np.zeros(head_dim)
    for begin in range(0, count, ONE_BLOCK):
        block = np.zeros(head_dim, np.float32)
        for row in finite[begin : begin + ONE_BLOCK]:
            block = block + row
        total = total + block.astype(np.float64)
    mean = (total / max(count, 1)).astype(np.float32)
    return np.asarray(np.where(np.isfinite(mean), mean, 0.0), dtype=np.float32)


def one_head(
    q: Array, k: Array, v: Array, scale: float, seen: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Rows q [len_q, D] over keys k, v [len_k, D] -> (out [len_q, D], lse [len_q])."""
    out, lse = np.zeros_like(q), np.full(len(q), -np.inf)
    rows = np.flatnonzero(seen.any(axis=1))
    if not len(rows):
        return out, lse
    with np.errstate(all="ignore"):
        mean = mean_of(k.astype(np.float32))
        k8, k_step = quantised(k.astype(np.float32) - mean)
        q8, q_step = quantised(np.copysign(1.0, scale).astype(np.float32) * q.astype(np.float32))
        unscaled = ((q8 @ k8.T).astype(np.float32) * k_step).astype(np.float64)
        factor = q_step.astype(np.float64) * abs(scale) / depth_of(q.shape[1])
        scores = unscaled * np.minimum(factor, 2.0**127).astype(np.float32)[:, None]
        for i in rows:
            s = scores[i, seen[i]]
            weights = np.exp(s - s.max())
            out[i] = weights @ v[seen[i]] / weights.sum()
            lse[i] = s.max() + np.log(weights.sum()) + scale * (q[i] @ mean.astype(np.float64))
    return out, lse


def attention(query: Any, key: Any, value: Any, **call: Any) -> tuple[Array, Array]:
    """As oracle.attention, with 8-bit scores."""
    return oracle.attention(query, key, value, **call, head=one_head)
