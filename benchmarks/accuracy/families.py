# SPDX-License-Identifier: Apache-2.0
"""families.py - inputs on which 8-bit attention is judged: what breaks it, one kind at a time.

Each family is one head: queries, keys and values in float64, with bfloat16 numbers, as a model
gives them. Rows of Q are sampled (their number does not change an error); keys are all there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from .schemes import Array

KEYS, LONG, HEAD_DIM = 8192, 65536, 128
ROWS, FEW_ROWS = 128, 32


@dataclass(frozen=True)
class Case:
    """One head."""

    family: str
    what: str  # one line for the table
    q: Array
    k: Array
    v: Array

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.q.shape[1])


def bf16(x: Array) -> Array:
    """Rounded to bfloat16, to nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.asarray(rounded.astype(np.uint32).view(np.float32), dtype=np.float64)


def _case(family: str, what: str, q: Array, k: Array, v: Array) -> Case:
    return Case(family, what, bf16(q), bf16(k), bf16(v))


def synthetic(head_dim: int = HEAD_DIM, keys: int = KEYS, long: int = LONG) -> Iterator[Case]:
    """All but the recorded ones."""
    draw = np.random.default_rng(17)

    def normal(rows: int, spread: float = 1.0) -> Array:
        return draw.normal(0.0, spread, (rows, head_dim))

    q, k, v = normal(ROWS), normal(keys), normal(keys)
    yield _case("normal", "N(0, 1)", q, k, v)
    yield _case("peaky", "scores of standard deviation 3", 3 * q, k, v)
    bias = draw.normal(0.0, 3.0, head_dim)
    yield _case("k_bias", "each channel of K has a mean of N(0, 3^2)", q, k + bias, v)
    yield _case("v_bias", "V has a mean of 3", q, k, v + 3)
    spikes = np.where(draw.random(v.shape) < 0.01, 10.0, 1.0)
    yield _case("v_outliers", "1 % of V's numbers are 10 times as large", q, k, v * spikes)
    yield _case(
        "qk_outliers", "q and k have 4 channels of 8 times the size", *_outliers(draw, q, k, v)
    )
    yield _case(
        "few_channels", "the scores come from 3 channels of k", *_few_channels(draw, q, k, v)
    )
    yield _case("sinks", "4 keys take most of the weight", *_sinks(draw, q, k, v))
    yield _case("long", f"N(0, 1), {long:,} keys", normal(FEW_ROWS), normal(long), normal(long))
    yield _case(
        "long_peaky",
        f"scores of standard deviation 3, {long:,} keys",
        *(3 * normal(FEW_ROWS), normal(long), normal(long)),
    )


def _outliers(draw: Generator, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Scores keep a standard deviation of about 1."""
    gain = np.ones(q.shape[1])
    gain[draw.choice(len(gain), 4, replace=False)] = 8.0
    size = np.sqrt((gain**4).mean())
    return q * gain / size, k * gain, v


def _few_channels(draw: Generator, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """As the last blocks of MiniMax-H3 are reported to have it: three channels of k carry what
    tells keys apart; the queries are as large everywhere."""
    gain = np.full(q.shape[1], 0.1)
    gain[draw.choice(len(gain), 3, replace=False)] = 12.0
    return q, k * gain, v


def _sinks(draw: Generator, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """The first four keys point where all queries do; their values are small, as sinks' are."""
    common = draw.normal(0.0, 1.0, q.shape[1])
    common *= math.sqrt(q.shape[1]) / np.linalg.norm(common)
    q, k, v = q + common, k.copy(), v.copy()
    k[:4] += 0.9 * common
    v[:4] *= 0.1
    return q, k, v
