# SPDX-License-Identifier: Apache-2.0
"""test_cpu_accuracy.py - the CPU rows are as exact as torch, from one key to 16,384.

Against float64: RMS error at most 1.1 times torch's, largest error at most twice torch's and two
units in the last place. Torch's error is that of its own attention at the same dtype. sdpa_ref is
left out: it is the specification, written to be read, and held to twice torch's error elsewhere.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import calls
import oracle
from calls import NAMES, sdpa
from tolerances import ulp
from wan_attn.native import op

pytestmark = pytest.mark.usefixtures("native")

ROWS = [row for row in calls.rows() if row is not None and row.device == "cpu" and row.cpu_features]
CASES = [(row, dtype) for row in ROWS for dtype in row.dtypes]
each_case = pytest.mark.parametrize(
    ("row", "dtype"), CASES, ids=[f"{row.name}-{NAMES[dtype]}" for row, dtype in CASES]
)
# Wan2.2's lengths of text and image and their neighbours, tails of every block; Wan2.2's head_dim.
LENGTHS = (1, 2, 3, 16, 77, 128, 129, 257, 512, 1000, 4096, 16384)
QUERIES, HEADS, HEAD_DIM = 48, 4, 128


def rms(x: oracle.Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


@pytest.mark.parametrize("peaky", (1.0, 6.0))
@pytest.mark.parametrize("length", LENGTHS)
@each_case
def test_as_exact_as_torch(
    row: op.KernelInfo, dtype: torch.dtype, length: int, peaky: float
) -> None:
    query, key, value = calls.operands(
        seqlen_q=QUERIES,
        seqlen_k=length,
        heads_q=HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        peaky=peaky,
    )
    want, _ = oracle.attention(query, key, value)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    torchs = oracle.as_float64(F.scaled_dot_product_attention(q, k, v).transpose(1, 2)) - want
    ours = oracle.as_float64(sdpa(query, key, value, row=row)[0]) - want
    if length == 1:
        assert not ours.any(), "one key must give its value exactly"
    unit = ulp(dtype, float(np.abs(want).max()))
    assert np.abs(ours).max() <= 2.0 * np.abs(torchs).max() + 2.0 * unit
    assert rms(ours) <= 1.1 * rms(torchs)


@each_case
def test_the_largest_scales(row: op.KernelInfo, dtype: torch.dtype) -> None:
    """Near the end of float32, where the scale times log2(e) is beyond: the largest score wins."""
    tensors = calls.operands(seqlen_q=20, seqlen_k=300, head_dim=16, dtype=dtype)
    out, below = (sdpa(*tensors, row=row, scale=scale)[0] for scale in (3e38, 1e38))
    assert torch.equal(out, below)
    assert torch.isfinite(out).all()
