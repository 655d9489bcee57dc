# SPDX-License-Identifier: Apache-2.0
"""test_blocks_qk8.py - lists of blocks in the rows of 8-bit scores, against the definition's own
integers: those of all keys, because K's mean is that of all real keys, listed or not.

Exact rows: test_blocks.py. What these rows refuse: test_blocks_refused.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import calls
import oracle
import qk8_oracle
from blocks_oracle import BLOCK, Lists, random_lists
from calls import BF16, DTYPES, F32
from test_blocks import MASKS, listed
from test_qk8 import in_integers, score_range
from tolerances import ulp
from wan_attn.native import op

pytestmark = pytest.mark.usefixtures("native")

ROWS = [row for row in op.kernels() if row.is_lossy and calls.can_run(row)]
each_row = pytest.mark.parametrize("row", ROWS, ids=calls.row_id)


def by_definition(qkv: Any, lists: Lists, call: dict[str, Any], **kind: Any) -> Any:
    """(out, lse) of qk8_oracle over the listed keys."""
    places = iter([(b, h) for b in range(qkv[0].shape[0]) for h in range(qkv[0].shape[2])])

    def head(q: Any, k: Any, v: Any, scale: float, seen: Any) -> Any:
        named = lists.named[next(places)]
        of_row, of_key = np.arange(len(q)) // BLOCK, np.arange(len(k)) // BLOCK
        return qk8_oracle.one_head(q, k, v, scale, seen & named[of_row][:, of_key], **kind)

    return oracle.attention(*qkv, head=head, **call)


def check(row: op.KernelInfo, qkv: Any, lists: Lists, **call: Any) -> None:
    """As test_qk8.check, but for lists."""
    out, lse = listed(row, qkv, lists, **call)
    of_row = partial(by_definition, qkv, lists, call)
    want, want_lse = of_row(in_integers=in_integers(row))
    sees = np.isfinite(want_lse)
    assert (np.isfinite(lse.numpy()) == sees).all(), "a row sees nothing, or should not"
    error = np.abs(oracle.as_float64(lse)[sees] - want_lse[sees]).max(initial=0)
    assert error <= 2e-6 * max(1.0, float(np.abs(want_lse[sees]).max(initial=0)))
    peak = score_range(qkv[0], qkv[1], call.get("scale"))
    largest = float(np.abs(want).max(initial=0))
    allowed = 2e-6 * (1.0 + peak) * max(largest, 1e-30) + ulp(out.dtype, largest)
    off = np.abs(oracle.as_float64(out) - want)
    if in_integers(row):
        off -= of_row(slack=2e-6 * (1.0 + peak))[0]
    assert off.max(initial=0) <= allowed


@pytest.mark.parametrize("mask", MASKS)
@each_row
def test_random_lists(row: op.KernelInfo, mask: str) -> None:
    for seed, density in enumerate((0.0, 0.15, 0.5, 0.9)):
        dtype = DTYPES[seed % len(DTYPES)]
        qkv = calls.operands(2, 197, 333, 4, 2, 40, dtype)
        check(row, qkv, random_lists(seed, 2, 4, 197, 333, density), **MASKS[mask])


@pytest.mark.parametrize("head_dim", (1, 8, 64, 100, 128, 256))
@pytest.mark.parametrize("scale", (0.3, -0.2, 0.0))
@each_row
def test_sizes_and_scales(row: op.KernelInfo, head_dim: int, scale: float) -> None:
    qkv = calls.operands(1, 65, 1300, 1, 1, head_dim)
    check(row, qkv, random_lists(head_dim, 1, 1, 65, 1300, 0.4), scale=scale)


@pytest.mark.parametrize("seqlen_q", (1, 17, 64, 70, 150))
@pytest.mark.parametrize("seqlen_k", (1, 63, 64, 65, 500))
@each_row
def test_edges(row: op.KernelInfo, seqlen_q: int, seqlen_k: int) -> None:
    qkv = calls.operands(1, seqlen_q, seqlen_k, 3, 3, 16, BF16)
    for seed in range(3):
        lists = random_lists(seed, 1, 3, seqlen_q, seqlen_k, 0.5)
        check(row, qkv, lists, is_causal=seed == 2)


@each_row
def test_a_full_list_gives_the_bits_of_none(row: op.KernelInfo) -> None:
    """In a call of full lists, and head by head, where another head's is not full."""
    for masks in ({}, {"is_causal": True, "k_lens": [700, 77]}, {"window": (40, -1)}):
        qkv = calls.operands(2, 300, 700, 2, 1, 40)
        full = random_lists(0, 2, 2, 300, 700, 1.1)
        want = calls.sdpa(*qkv, row=row, return_lse=True, **masks)
        for got, expected in zip(listed(row, qkv, full, **masks), want, strict=True):
            assert torch.equal(got, expected)
        full.named[:, 1, :, -1] = False
        out, lse = listed(row, qkv, full, **masks)
        assert torch.equal(out[:, :, 0], want[0][:, :, 0]) and torch.equal(lse[:, 0], want[1][:, 0])
        assert not torch.equal(out[:, :, 1], want[0][:, :, 1])


def test_vector_rows_have_the_same_bits() -> None:
    results = []
    for row in (row for row in ROWS if in_integers(row)):
        torch.manual_seed(3)
        qkv = calls.operands(1, 200, 900, 2, 1, 64)
        results.append(listed(row, qkv, random_lists(11, 1, 2, 200, 900, 0.3)))
    for out, lse in results[1:]:
        assert torch.equal(lse, results[0][1])
        assert (out - results[0][0]).abs().max() < 2e-6


@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
@each_row
def test_blocks_that_are_not_listed_cannot_leak(row: op.KernelInfo, poison: float) -> None:
    """K's mean knows their finite numbers; what is not finite counts as 0 there."""
    q, k, v = calls.operands(1, 130, 640, 1, 1, 24)
    lists = random_lists(5, 1, 1, 130, 640, 1.1)
    lists.named[0, 0, :, 3:5] = False
    k[:, 200:300] = poison
    want, _ = listed(row, (q, k, v), lists)
    v[:, 200:300] = poison  # its neighbour's weights are not rounded then
    got, _ = listed(row, (q, k, v), lists)
    assert want.isfinite().all() and got.isfinite().all()
    assert (got - want).abs().max() < 1e-3


@each_row
def test_thread_counts_give_the_same_bits(row: op.KernelInfo, threads: None) -> None:
    qkv = calls.operands(2, 333, 301, 4, 2, 40, F32)
    lists = random_lists(9, 2, 4, 333, 301, 0.4)
    results: list[tuple[Tensor, Tensor]] = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(listed(row, qkv, lists, is_causal=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
