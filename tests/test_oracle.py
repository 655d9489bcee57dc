# SPDX-License-Identifier: Apache-2.0
"""test_oracle.py - the judge is judged: the masks that flash-attn documents, sums by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from tolerances import assert_close_to_oracle


def rows(text: str) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in text.split()])


@pytest.mark.parametrize(
    ("len_q", "len_k", "mask", "expected"),
    [
        (2, 5, {"is_causal": True}, "11110 11111"),  # the two examples of flash-attn's docstring
        (5, 2, {"is_causal": True}, "00 00 00 10 11"),
        (4, 4, {"window": (1, 0)}, "1000 1100 0110 0011"),
        (4, 4, {"window": (0, -1)}, "1111 0111 0011 0001"),
        (2, 4, {"window": (1, 1)}, "0111 0011"),
        (3, 3, {"window": (-1, 1), "is_causal": True}, "100 110 111"),
        (2, 0, {}, " "),
    ],
)
def test_visible(len_q: int, len_k: int, mask: dict[str, Any], expected: str) -> None:
    seen = oracle.visible(len_q, len_k, **mask)
    assert seen.shape == (len_q, len_k)
    if len_k:
        np.testing.assert_array_equal(seen, rows(expected))


def test_sums_by_hand() -> None:
    query = np.array([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # [1, 2, 1, 2]
    key = np.array([[[[1.0, 1.0]], [[3.0, 0.0]]]])
    value = np.array([[[[10.0, 0.0]], [[0.0, 1.0]]]])
    out, lse = oracle.attention(query, key, value, scale=1.0)
    e = math.e
    np.testing.assert_allclose(out[0, 0, 0], [10 * e / (e + e**3), e**3 / (e + e**3)])
    np.testing.assert_allclose(out[0, 1, 0], [10 * e**2 / (e**2 + 1), 1 / (e**2 + 1)])
    np.testing.assert_allclose(lse[0, 0], [math.log(e + e**3), math.log(e**2 + 1)])


def test_lengths_groups_and_rows_without_a_key() -> None:
    query, key, value = np.ones((2, 3, 4, 1)), np.zeros((2, 5, 2, 1)), np.zeros((2, 5, 2, 1))
    value[:, :, 1] = 1.0
    value[1, 2:] = np.nan
    out, lse = oracle.attention(query, key, value, q_lens=[2, 3], k_lens=[0, 2])
    assert not out[0].any() and np.isneginf(lse[0]).all()
    np.testing.assert_array_equal(out[1, :, :, 0], [[0, 0, 1, 1]] * 3)  # heads 2, 3 use key head 1
    np.testing.assert_allclose(lse[1], math.log(2))


def test_a_nan_is_seen_by_the_rows_that_see_its_key_only() -> None:
    query, key, value = np.zeros((1, 3, 1, 1)), np.zeros((1, 3, 1, 1)), np.ones((1, 3, 1, 1))
    value[0, 1] = np.nan
    out, _ = oracle.attention(query, key, value, is_causal=True)
    np.testing.assert_array_equal(np.isnan(out[0, :, 0, 0]), [False, True, True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_tolerance_takes_torch_and_nothing_worse(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 70, 2, 32).to(dtype) for _ in range(3))
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert_close_to_oracle(sdpa(q, k, v).transpose(1, 2), query, key, value)
    slightly_off = 4 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="out"):
        worse = sdpa(q, k, v, scale=(1 + 20 * slightly_off) * 32**-0.5)
        assert_close_to_oracle(worse.transpose(1, 2), query, key, value)
    with pytest.raises(AssertionError, match="out"):
        one_key_less = sdpa(q, k[:, :, 1:], v[:, :, 1:])
        assert_close_to_oracle(one_key_less.transpose(1, 2), query, key, value)
    with pytest.raises(AssertionError, match="lse"):
        _, lse = oracle.attention(query, key, value)
        in_log2 = torch.from_numpy(lse / math.log(2)).float()
        out = sdpa(q, k, v).transpose(1, 2)
        assert_close_to_oracle(out, query, key, value, lse=in_log2)
