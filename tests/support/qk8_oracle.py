# SPDX-License-Identifier: Apache-2.0
"""qk8_oracle.py - 8-bit scores as csrc/cpu/qk8.h defines them, in numpy; shares no code with them.

float32 where the definition says so, each operation rounded by itself; what follows the integers is
float64. So a row must have these very integers and steps, and may differ by float32's rounding in
what it makes of them. P V is float64, or in integers as sdpa_qk8_values.inc defines them: a weight
that lies between two integers may then become either, and `slack` says what that can do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
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


VALUE_BLOCK, WEIGHT_ONE, VALUE_TOP = 128, 8192.0, np.float32(2047.0)


def rounded_values(v: Array) -> Array:
    """[keys of one block, D] -> what their integers are worth; numbers that are infinite or NaN
    leave the whole block as it is."""
    if not np.isfinite(v).all():
        return v
    largest = np.abs(v).max(axis=0).astype(np.float32)
    counts = largest >= np.float32(2.0**-100)
    inverse = VALUE_TOP / np.where(counts, largest, np.float32(1.0))
    integers = np.rint((v.astype(np.float32) * inverse).astype(np.float32))
    step = np.where(counts, largest / VALUE_TOP, np.float32(0.0))
    return np.asarray(integers.astype(np.float64) * step.astype(np.float64))


@dataclass(frozen=True)
class Part:
    """What one row's weights of one block of keys are: unit is what a weight of 1 counts."""

    weights: Array  # in units, not rounded
    values: Array  # as their integers have them
    unit: float
    is_rounded: bool


def parts(s: Array, v: Array, seen: NDArray[np.bool_]) -> Iterator[Part]:
    """Of a row with these scores, every block of which it sees a key."""
    for begin in range(0, len(s), VALUE_BLOCK):
        block = slice(begin, begin + VALUE_BLOCK)
        if not seen[block].any():
            continue
        values = rounded_values(v[block])[seen[block]]
        of_row = s[block][seen[block]]
        weights = np.exp(of_row - of_row.max()) * WEIGHT_ONE
        unit = np.exp(of_row.max() - s[seen].max()) / WEIGHT_ONE
        yield Part(weights, values, unit, bool(np.isfinite(v[block]).all()))


def weighed_in_integers(s: Array, v: Array, seen: NDArray[np.bool_]) -> Array:
    """[D]: the mean of the values that a row sees."""
    out, total = np.zeros(v.shape[1]), 0.0
    for part in parts(s, v, seen):
        weights = np.rint(part.weights) if part.is_rounded else part.weights
        out = out + part.unit * (weights @ part.values)
        total = total + part.unit * weights.sum()
    return np.asarray(out / total)


def slack_of(s: Array, v: Array, seen: NDArray[np.bool_], off: float) -> Array:
    """[D]: how far a row's out may move by weights which, off by this share, round to another
    integer."""
    mean = weighed_in_integers(s, v, seen)
    moved, total = np.zeros(v.shape[1]), 0.0
    for part in parts(s, v, seen):
        reach = off * part.weights
        to_a_tie = np.abs(part.weights - np.floor(part.weights) - 0.5)
        steps = np.where(part.is_rounded & (to_a_tie <= reach), 1.0 + reach, 0.0)
        moved = moved + part.unit * (steps @ np.abs(part.values - mean))
        total = total + part.unit * part.weights.sum()
    return np.asarray(moved / total)


def one_head(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    seen: NDArray[np.bool_],
    *,
    in_integers: bool = False,
    slack: float | None = None,
) -> tuple[Array, Array]:
    """Rows q [len_q, D] over keys k, v [len_k, D] -> (out [len_q, D], lse [len_q]). slack: the
    share that weights may be off by, and out is slack_of."""
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
            lse[i] = s.max() + np.log(weights.sum()) + scale * (q[i] @ mean.astype(np.float64))
            if slack is not None:
                out[i] = slack_of(scores[i], v, seen[i], slack)
            elif in_integers:
                out[i] = weighed_in_integers(scores[i], v, seen[i])
            else:
                out[i] = weights @ v[seen[i]] / weights.sum()
    return out, lse


def attention(
    query: Any, key: Any, value: Any, *, in_integers: bool = False, **call: Any
) -> tuple[Array, Array]:
    """As oracle.attention, with 8-bit scores; in_integers: P V too."""
    head = partial(one_head, in_integers=in_integers)
    return oracle.attention(query, key, value, **call, head=head)


def slack(query: Any, key: Any, value: Any, off: float, **call: Any) -> Array:
    """[B, Lq, Nq, D]: what rounding P may do to attention(in_integers=True), if the weights are off
    by this share."""
    return oracle.attention(query, key, value, **call, head=partial(one_head, slack=off))[0]
