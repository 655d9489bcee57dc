# SPDX-License-Identifier: Apache-2.0
"""test_blocks.py - lists of blocks: every row that takes them, against float64; what is not listed
is not read.

A skip_threshold: test_blocks_skip.py. Rows of 8-bit scores: test_blocks_qk8.py. What is refused:
test_blocks_refused.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import blocks_oracle
import calls
import oracle
from blocks_oracle import BLOCK, Lists, blocks_of, random_lists
from calls import BF16, F32, sdpa
from tolerances import FACTOR, FLOOR_ULP, ulp
from wan_attn.native import op

pytestmark = pytest.mark.usefixtures("native")

ROWS = [row for row in calls.rows() if row is not None and row.takes_block_lists]
each_row = pytest.mark.parametrize("row", ROWS, ids=calls.row_id)


def listed(row: op.KernelInfo, qkv: Any, lists: Lists, **call: Any) -> tuple[Tensor, Tensor]:
    counts, indices = lists.as_tensors()
    return sdpa(*qkv, row=row, block_counts=counts, block_indices=indices, return_lse=True, **call)


def by_torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Torch's own attention over these keys, [rows, D] and [keys, D]; bias: [rows, keys]."""
    return torch.nn.functional.scaled_dot_product_attention(
        q[None, None], k[None, None], v[None, None], attn_mask=bias[None, None], scale=scale
    )[0, 0]


def error_of_torch(qkv: Any, lists: Lists, pools_others: bool, **call: Any) -> float:
    """Its largest error at value's dtype where it is given the listed keys, and the means with the
    logarithm of what they stand for as a bias."""
    worst, dtype = 0.0, qkv[2].dtype

    def head(q: Any, k: Any, v: Any, scale: float, seen: Any, named: Any) -> tuple[Any, Any]:
        nonlocal worst
        out, lse = blocks_oracle.one_head(q, k, v, scale, seen, named, pools_others)
        of_row = np.arange(len(q)) // BLOCK
        bias = np.where(seen & named[of_row][:, np.arange(len(k)) // BLOCK], 0.0, -np.inf)
        for n in range(blocks_of(len(k)) if pools_others else 0):
            mine = slice(n * BLOCK, min((n + 1) * BLOCK, len(k)))
            whole = seen[:, mine].all(axis=1) & ~named[of_row, n]
            k = np.concatenate([k, k[mine].mean(axis=0, keepdims=True)])
            v = np.concatenate([v, v[mine].mean(axis=0, keepdims=True)])
            counted = np.where(whole, np.log(mine.stop - mine.start), -np.inf)
            bias = np.concatenate([bias, counted[:, None]], axis=1)
        rows = np.isfinite(bias).any(axis=1)
        if rows.any():
            x = [torch.from_numpy(a).to(dtype) for a in (q[rows], k, v, bias[rows])]
            got = by_torch(x[0], x[1], x[2], x[3], scale)
            worst = max(worst, float(np.abs(got.double().numpy() - out[rows]).max()))
        return out, lse

    places = iter([(b, h) for b in range(qkv[0].shape[0]) for h in range(qkv[0].shape[2])])
    oracle.attention(
        *qkv,
        head=lambda q, k, v, scale, seen: head(q, k, v, scale, seen, lists.named[next(places)]),
        **call,
    )
    return worst


def check(
    row: op.KernelInfo, qkv: Any, lists: Lists, *, pools_others: bool = False, **call: Any
) -> None:
    """out and lse of this row against float64; the bound: twice torch's error."""
    q, k, v = qkv
    want, want_lse = blocks_oracle.attention(q, k, v, lists, pools_others=pools_others, **call)
    out, lse = listed(row, qkv, lists, pools_others=pools_others, **call)
    sees = np.isfinite(want_lse)
    assert (np.isfinite(lse.numpy()) == sees).all(), "a row sees nothing, or should not"
    assert not out[~torch.from_numpy(sees).transpose(1, 2)].any(), "such a row is 0"
    if not sees.any():
        return
    largest = float(qkv[2].double().abs().max())
    bound = FACTOR * error_of_torch(qkv, lists, pools_others, **call)
    bound += FLOOR_ULP * ulp(qkv[2].dtype, largest)
    assert np.abs(out.double().numpy() - want).max() <= bound
    lse_error = np.abs(np.where(sees, lse.double().numpy() - np.where(sees, want_lse, 0.0), 0.0))
    of_means = 0.02 if qkv[2].dtype == BF16 and pools_others else 2e-5
    assert lse_error.max() <= of_means * max(1.0, np.abs(want_lse[sees]).max())


MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (90, 40)},
    "ragged": {"q_lens": [150, 0], "k_lens": [201, 333]},
    "causal_ragged": {"is_causal": True, "q_lens": [150, 197], "k_lens": [130, 3]},
    "narrow": {"window": (3, 0), "k_lens": [333, 65]},
}


@pytest.mark.parametrize("pools", (False, True), ids=("alone", "pooled"))
@pytest.mark.parametrize("mask", MASKS)
@each_row
def test_random_lists(row: op.KernelInfo, mask: str, pools: bool) -> None:
    """Two samples, four heads for two; lists of every density, and keys for several packed blocks
    in some rows."""
    for seed, density in enumerate((0.0, 0.15, 0.5, 0.9)):
        qkv = calls.operands(2, 197, 333, 4, 2, 40, row.dtypes[-1])
        check(
            row, qkv, random_lists(seed, 2, 4, 197, 333, density), pools_others=pools, **MASKS[mask]
        )


@pytest.mark.parametrize("head_dim", (1, 8, 64, 128, 256))
@pytest.mark.parametrize("scale", (0.3, -0.2, 0.0))
@each_row
def test_sizes_and_scales(row: op.KernelInfo, head_dim: int, scale: float) -> None:
    for dtype in row.dtypes:
        qkv = calls.operands(1, 65, 1300, 1, 1, head_dim, dtype)
        lists = random_lists(head_dim, 1, 1, 65, 1300, 0.4)
        check(row, qkv, lists, pools_others=True, scale=scale)


@pytest.mark.parametrize("seqlen_q", (1, 3, 17, 64, 70))
@pytest.mark.parametrize("seqlen_k", (1, 63, 64, 65, 500))
@each_row
def test_edges(row: op.KernelInfo, seqlen_q: int, seqlen_k: int) -> None:
    qkv = calls.operands(1, seqlen_q, seqlen_k, 3, 3, 16, row.dtypes[0])
    for seed in range(3):
        lists = random_lists(seed, 1, 3, seqlen_q, seqlen_k, 0.5)
        check(row, qkv, lists, pools_others=seed == 1, is_causal=seed == 2)


@each_row
def test_float32_queries_for_half_values(row: op.KernelInfo) -> None:
    q, k, v = calls.operands(1, 100, 200, 2, 1, 32)
    lists = random_lists(1, 1, 2, 100, 200, 0.5)
    for dtype in (d for d in row.dtypes if d != F32):
        mixed = (q, k, v.to(dtype))
        want, _ = blocks_oracle.attention(*mixed, lists)
        out, _ = listed(row, mixed, lists)
        assert out.dtype == F32 and np.abs(out.double().numpy() - want).max() < 0.03


@each_row
def test_an_empty_list(row: op.KernelInfo) -> None:
    """No room for an index, and room that is not used."""
    qkv = calls.operands(2, 130, 200, 2, 2, 32, row.dtypes[0])
    none = Lists(np.zeros((2, 2, 3, 4), dtype=bool))
    for capacity in (0, 5):
        counts, indices = none.as_tensors(capacity)
        assert indices.shape == (2, 2, 3, capacity)
        out, lse = sdpa(*qkv, row=row, block_counts=counts, block_indices=indices, return_lse=True)
        assert not out.any() and (lse == -torch.inf).all()
    check(row, qkv, none, pools_others=True)


@pytest.mark.parametrize("pools", (False, True), ids=("alone", "pooled"))
@pytest.mark.parametrize("seqlen_q", (5, 130, 300))
@each_row
def test_a_full_list_gives_the_bits_of_none(row: op.KernelInfo, seqlen_q: int, pools: bool) -> None:
    """In a call of full lists, of any kind; and head by head, where another head's is not full."""
    for masks in ({}, {"is_causal": True, "k_lens": [700, 77]}, {"window": (40, -1)}):
        qkv = calls.operands(2, seqlen_q, 700, 2, 1, 40, row.dtypes[-1])
        full = random_lists(0, 2, 2, seqlen_q, 700, 1.1)
        want = sdpa(*qkv, row=row, return_lse=True, **masks)
        for got, expected in zip(
            listed(row, qkv, full, pools_others=pools, **masks), want, strict=True
        ):
            assert torch.equal(got, expected)
        full.named[:, 1, :, -1] = False
        out, lse = listed(row, qkv, full, pools_others=pools, **masks)
        if seqlen_q > 32:  # fewer rows are computed otherwise where there are no lists
            assert torch.equal(out[:, :, 0], want[0][:, :, 0])
            assert torch.equal(lse[:, 0], want[1][:, 0])
        assert not torch.equal(out[:, :, 1], want[0][:, :, 1])


def spread(x: Tensor, how: str) -> Tensor:
    """The same numbers through other strides."""
    if how == "transposed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    room = torch.full([2 * size + 1 for size in x.shape], -1, dtype=x.dtype)
    view = room[tuple(slice(1, 1 + 2 * size, 2) for size in x.shape)]
    view.copy_(x)
    return view


@pytest.mark.parametrize("how", ("transposed", "every_other"))
@each_row
def test_strides_of_lists(row: op.KernelInfo, how: str) -> None:
    qkv = calls.operands(2, 200, 300, 3, 1, 16, row.dtypes[0])
    counts, indices = random_lists(7, 2, 3, 200, 300, 0.5).as_tensors()
    want = sdpa(*qkv, row=row, block_counts=counts, block_indices=indices)[0]
    counts, indices = spread(counts, how), spread(indices, how)
    got = sdpa(*qkv, row=row, block_counts=counts, block_indices=indices)[0]
    assert torch.equal(got, want)
    counts, indices = (x[:1, :1].expand(2, 3, *x.shape[2:]) for x in (counts, indices))
    got = sdpa(*qkv, row=row, block_counts=counts, block_indices=indices)[0]
    counts, indices = counts.contiguous(), indices.contiguous()
    want = sdpa(*qkv, row=row, block_counts=counts, block_indices=indices)[0]
    assert torch.equal(got, want)


@each_row
def test_what_lies_behind_a_count_is_never_read(row: op.KernelInfo) -> None:
    qkv = calls.operands(1, 200, 300, 2, 2, 16, row.dtypes[0])
    lists = random_lists(3, 1, 2, 200, 300, 0.5)
    results = []
    for behind in (0, 4, 1 << 30, -(1 << 31)):
        counts, indices = lists.as_tensors(9, behind)
        results.append(sdpa(*qkv, row=row, block_counts=counts, block_indices=indices)[0])
    assert all(torch.equal(x, results[0]) for x in results)


@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
@each_row
def test_blocks_that_are_not_listed_cannot_leak(row: op.KernelInfo, poison: float) -> None:
    """Nothing of them is computed with. Of pooled ones: nothing of the listed ones' means."""
    for dtype in row.dtypes:
        q, k, v = calls.operands(1, 130, 640, 1, 1, 24, dtype)
        lists = random_lists(5, 1, 1, 130, 640, 1.1)
        lists.named[0, 0, :, 3:5] = False
        want = listed(row, (q, k, v), lists)
        k[:, 200:300], v[:, 250:260] = poison, poison
        for got, expected in zip(listed(row, (q, k, v), lists), want, strict=True):
            assert torch.equal(got, expected)


@each_row
def test_a_bad_value_of_a_mean_stays_in_its_channel(row: op.KernelInfo) -> None:
    for dtype in row.dtypes:
        q, k, v = calls.operands(1, 70, 640, 1, 1, 24, dtype)
        lists = random_lists(5, 1, 1, 70, 640, 0.5)
        lists.named[0, 0, 0, 3], lists.named[0, 0, 1, 3] = False, True
        v[:, 210, :, 4] = float("nan")
        out, lse = listed(row, (q, k, v), lists, pools_others=True)
        bad = torch.zeros(24, dtype=torch.bool)
        bad[4] = True
        assert out[..., bad].isnan().all(), "listed or pooled, it counts for every row"
        assert not out[..., ~bad].isnan().any() and lse.isfinite().all()


@each_row
def test_the_mean_of_a_listed_block_is_not_used(row: op.KernelInfo) -> None:
    """Not even where it is NaN, though no row may see the key that makes it so."""
    q, k, v = calls.operands(1, 70, 640, 1, 1, 24, row.dtypes[0])
    lists = random_lists(6, 1, 1, 70, 640, 0.5)
    lists.named[0, 0, :, 9] = True
    masks: dict[str, Any] = {"is_causal": True, "window": (300, -1)}
    want = listed(row, (q, k, v), lists, pools_others=True, **masks)
    k[:, :100], v[:, :100] = float("nan"), float("nan")  # before every row's window
    got = listed(row, (q, k, v), lists, pools_others=True, **masks)
    for a, b in zip(got, want, strict=True):  # summed otherwise beside a NaN
        close = 4e-3 if row.dtypes[0] == BF16 else 1e-5
        torch.testing.assert_close(a, b, rtol=close, atol=close)


@pytest.mark.parametrize("pools", (False, True), ids=("alone", "pooled"))
@each_row
def test_thread_counts_give_the_same_bits(row: op.KernelInfo, pools: bool, threads: None) -> None:
    qkv = calls.operands(2, 333, 301, 4, 2, 40, row.dtypes[-1])
    lists = random_lists(9, 2, 4, 333, 301, 0.4)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        results.append(
            listed(row, qkv, lists, pools_others=pools, is_causal=True, skip_threshold=0.2)
        )
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_rows_agree() -> None:
    """With one another, further than with float64: they round at other places only."""
    qkv = calls.operands(1, 150, 900, 2, 1, 64)
    lists = random_lists(11, 1, 2, 150, 900, 0.3)
    rows = [row for row in ROWS if F32 in row.dtypes]
    results = [listed(row, qkv, lists, pools_others=True)[0] for row in rows]
    assert all((x - results[0]).abs().max() < 2e-6 for x in results)


def test_the_table_says_who_takes_lists() -> None:
    for row in op.kernels():
        assert row.takes_block_lists == (row.device == "cpu")
