# SPDX-License-Identifier: Apache-2.0
"""schemes.py - 8-bit attention as different libraries compute it, simulated in float64.

A scheme is a function (q [rows, D], k [keys, D], v [keys, D], scale) -> out [rows, D] of one head.
Rounding to integers, FP8 and f16 happens where the scheme has it; all else is float64, and out is
not rounded, so that only the schemes differ. Those of others follow what they have published (named
with each); no code of theirs is here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Scheme = Callable[[Array, Array, Array, float], Array]

LEVELS = 127.0
TILE = 64  # keys that a kernel takes at once
CPU_BLOCK = 128  # those of our CPU rows
WEIGHT_ONE, VALUE_TOP = 8192, 2047  # of our CPU rows: the largest integers of P and of V
P_SHIFT = 7  # of our GPU rows that sum in f16: P is 2^7 times as large


def exact(q: Array, k: Array, v: Array, scale: float) -> Array:
    """The softmax as it is."""
    out = np.empty((len(q), v.shape[1]))
    for begin in range(0, len(q), 64):  # 64 rows by 75,600 keys at once
        s = scale * (q[begin : begin + 64] @ k.T)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        out[begin : begin + 64] = (p @ v) / p.sum(axis=1, keepdims=True)
    return out


def signs(head_dim: int) -> Array:
    """+1 or -1 for each channel, the same in every build: a Hadamard matrix alone turns a constant
    row into one spike."""
    state, out = 0x9E3779B9, []
    for _ in range(head_dim):
        state = (1664525 * state + 1013904223) % 2**32
        out.append(1.0 if state >> 31 else -1.0)
    return np.array(out)


def hadamard(x: Array) -> Array:
    """[L, D] -> [L, D']: signed, then multiplied by the Hadamard matrix of D' >= D, a power of two,
    and divided by its root: a rotation, so products of two such rows stay what they were."""
    size = 1
    while size < x.shape[1]:
        size *= 2
    y = np.zeros((len(x), size))
    y[:, : x.shape[1]] = x * signs(x.shape[1])
    half = 1
    while half < size:
        pairs = y.reshape(len(x), size // (2 * half), 2, half)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        y = y.reshape(len(x), size)
        half *= 2
    return np.asarray(y / np.sqrt(size))


def to_int8(x: Array, group: NDArray[np.int64] | None = None) -> tuple[Array, Array]:
    """[L, D] -> integers of -127 to 127, and what one is worth in each row [L, 1]. Rows of one
    group share that; None: each row has its own."""
    largest = np.abs(x).max(axis=1)
    if group is not None:
        of_group = np.zeros(int(group.max()) + 1)
        np.maximum.at(of_group, group, largest)
        largest = of_group[group]
    step = largest / LEVELS
    inverse = np.divide(1.0, step, out=np.zeros_like(step), where=step > 0)
    return np.rint(x * inverse[:, None]), step[:, None]


def e4m3(x: Array) -> Array:
    """Rounded to FP8 of 4 exponent and 3 mantissa bits, saturating at 448."""
    x = np.clip(x, -448.0, 448.0)
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return np.asarray(np.rint(x / step) * step)


def f16(x: Array) -> Array:
    """Rounded to float16."""
    return x.astype(np.float16).astype(np.float64)


def rows_of_a_thread(rows: int, warp: int = 32) -> NDArray[np.int64]:
    """Groups of query rows that one thread of mma.m16n8 holds: r, r + 8, r + 16, r + 24."""
    i = np.arange(rows)
    return i // warp * 8 + i % 8


def keys_of_a_thread(keys: int, tile: int = TILE) -> NDArray[np.int64]:
    """Groups of keys that one thread holds: columns 2c and 2c + 1 of every 8, in a tile."""
    j = np.arange(keys)
    return j // tile * 4 + j % 8 // 2


def _online(
    s: Array, multiply: Callable[[Array, int, int], tuple[Array, Array]], tile: int
) -> Array:
    """Softmax over tiles of keys with a running maximum, as every kernel has it. multiply: (scores
    less a maximum, begin, end) -> (their part of out, their part of the row's sum)."""
    row_max = np.full((len(s), 1), -np.inf)
    row_sum: Array | float = 0.0
    out: Array | float = 0.0
    for begin in range(0, s.shape[1], tile):
        part = s[:, begin : begin + tile]
        top = np.maximum(row_max, part.max(axis=1, keepdims=True))
        shrink = np.exp(row_max - top)
        o, total = multiply(part - top, begin, begin + part.shape[1])
        out, row_sum, row_max = out * shrink + o, row_sum * shrink + total, top
    return np.asarray(out / row_sum)


def sage2(q: Array, k: Array, v: Array, scale: float) -> Array:
    """SageAttention2, 8 bits (arXiv 2411.10958): K less its mean; INT8 q and k with a scale per
    thread; P, 448 times as large, and V, scaled per channel, in FP8 e4m3; sums in f32."""
    q8, q_step = to_int8(q, rows_of_a_thread(len(q)))
    k8, k_step = to_int8(k - k.mean(axis=0), keys_of_a_thread(len(k)))
    s = scale * q_step * (q8 @ k8.T) * k_step.T
    v_step = np.maximum(np.abs(v).max(axis=0), 1e-30) / 448.0
    v8 = e4m3(v / v_step)

    def multiply(less_max: Array, begin: int, end: int) -> tuple[Array, Array]:
        p = np.exp(less_max)
        return e4m3(448.0 * p) @ v8[begin:end] / 448.0, p.sum(axis=1, keepdims=True)

    return np.asarray(_online(s, multiply, TILE) * v_step)


def sage_f16(q: Array, k: Array, v: Array, scale: float) -> Array:
    """SageAttention's other scheme (arXiv 2410.02367, for cards without FP8): the same INT8 scores,
    P and V in f16, sums in f32."""
    q8, q_step = to_int8(q, rows_of_a_thread(len(q)))
    k8, k_step = to_int8(k - k.mean(axis=0), keys_of_a_thread(len(k)))
    s = scale * q_step * (q8 @ k8.T) * k_step.T

    def multiply(less_max: Array, begin: int, end: int) -> tuple[Array, Array]:
        p = np.exp(less_max)
        return f16(p) @ f16(v[begin:end]), p.sum(axis=1, keepdims=True)

    return _online(s, multiply, TILE)


def comfy_anchor(k: Array) -> Array:
    """What comfy-kitchen takes off K: that of nine evenly spaced keys with the least energy around
    it, if this lowers theirs and raises their largest number by 12.5 % at most; else nothing."""
    samples = k[np.arange(9) * (len(k) - 1) // 8]
    anchor = samples[((samples - samples.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    rest = samples - anchor
    lowers = (rest**2).sum() < (samples**2).sum()
    is_better = lowers and np.abs(rest).max() <= 1.125 * np.abs(samples).max()
    return np.asarray(anchor if is_better else 0 * anchor)


def comfy_kitchen(q: Array, k: Array, v: Array, scale: float) -> Array:
    """comfy-kitchen's INT8 attention (its pull requests 104 and 146): an anchor off K, a signed
    Hadamard rotation of q and k, a scale per thread over tiles of 128 keys; P in u8 relative to its
    tile's largest, V in INT8 with a scale per channel; row sums of the rounded P."""
    tile = 128 if q.shape[1] >= 128 and len(k) > 1024 else 64
    q8, q_step = to_int8(hadamard(q), rows_of_a_thread(len(q)))
    k8, k_step = to_int8(hadamard(k - comfy_anchor(k)), keys_of_a_thread(len(k), tile))
    s = scale * q_step * (q8 @ k8.T) * k_step.T
    v8, v_step = to_int8(np.ascontiguousarray(v.T))

    def multiply(less_max: Array, begin: int, end: int) -> tuple[Array, Array]:
        top = less_max.max(axis=1, keepdims=True)
        p = np.rint(255.0 * np.exp(less_max - top))
        back = np.exp(top) / 255.0
        return back * (p @ v8[:, begin:end].T), back * p.sum(axis=1, keepdims=True)

    return np.asarray(_online(s, multiply, tile) * v_step.T)


def qk8(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    *,
    removes_mean: bool = True,
    rotates: bool = True,
    per_token: bool = True,
    sums_in_f16: bool = False,
    in_integers: bool = False,
) -> Array:
    """Ours: K less its mean over the real keys; a signed Hadamard rotation of q and k; INT8 with a
    scale for each row; P V as it is (the specification, and cards of full rate), summed in f16 (the
    other cards), or in integers of 14 and 12 bits (the CPU rows).

    The options take a part away, to see what it brings.
    """
    k = k - k.mean(axis=0) if removes_mean else k
    q, k = (hadamard(q), hadamard(k)) if rotates else (q, k)
    q8, q_step = to_int8(q, None if per_token else rows_of_a_thread(len(q)))
    k8, k_step = to_int8(k, None if per_token else keys_of_a_thread(len(k)))
    s = scale * q_step * (q8 @ k8.T) * k_step.T
    if in_integers:
        return _online(s, _pv_in_integers(v), CPU_BLOCK)
    multiply = _pv_in_f16(v) if sums_in_f16 else _pv32(v)
    return _online(s, multiply, TILE)


def _pv32(v: Array) -> Callable[[Array, int, int], tuple[Array, Array]]:
    def multiply(less_max: Array, begin: int, end: int) -> tuple[Array, Array]:
        p = np.exp(less_max)
        return p @ v[begin:end], p.sum(axis=1, keepdims=True)

    return multiply


def _pv_in_integers(v: Array) -> Callable[[Array, int, int], tuple[Array, Array]]:
    """As sdpa_qk8_values.inc: in each block, P relative to its row's largest, V with a scale per
    channel, row sums of the rounded P."""

    def multiply(less_max: Array, begin: int, end: int) -> tuple[Array, Array]:
        top = less_max.max(axis=1, keepdims=True)
        p = np.rint(WEIGHT_ONE * np.exp(less_max - top))
        largest = np.abs(v[begin:end]).max(axis=0)
        inverse = np.divide(VALUE_TOP, largest, out=np.zeros_like(largest), where=largest > 0)
        back = np.exp(top) / WEIGHT_ONE
        values = np.rint(v[begin:end] * inverse) * largest / VALUE_TOP
        return back * (p @ values), back * p.sum(axis=1, keepdims=True)

    return multiply


def _pv_in_f16(v: Array) -> Callable[[Array, int, int], tuple[Array, Array]]:
    """As sdpa_sm80_qk8 where a GPU sums f32 at half rate: P is 2^P_SHIFT times as large, V is
    brought below 2 by a power of two, and the sum of a tile, from zero, is rounded to f16 after
    every 16 keys."""
    shrink = 2.0 ** min(0.0, 1.0 - np.ceil(np.log2(max(np.abs(v).max(), 2.0**-100))))
    half = f16(v * shrink)

    def multiply(less_max: Array, begin: int, end: int) -> tuple[Array, Array]:
        p = np.exp(less_max)
        p16 = f16(2.0**P_SHIFT * p)
        out = np.zeros((len(p), v.shape[1]))
        for at in range(0, end - begin, 16):
            out = f16(out + p16[:, at : at + 16] @ half[begin + at : min(begin + at + 16, end)])
        return out / (2.0**P_SHIFT * shrink), p.sum(axis=1, keepdims=True)

    return multiply
