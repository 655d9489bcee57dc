# SPDX-License-Identifier: Apache-2.0
"""test_blocks_skip.py - a skip_threshold: what is left out is small, and the certificate says so.

Which blocks of keys a kernel has left out is seen in its result: a value is 1 in the place of its
block, so that out holds each block's share of the weights, and 0 for those that were left out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import blocks_oracle
import calls
import oracle
from blocks_oracle import BLOCK, Lists, random_lists
from calls import BF16, F32
from wan_attn.native import bindings, op

pytestmark = pytest.mark.usefixtures("native")

ROWS = [row for row in calls.rows() if row is not None and row.takes_block_lists]
each_row = pytest.mark.parametrize("row", ROWS, ids=calls.row_id)

BELOW_FLOATS = 1e-30  # weights that float32 has no normal number for count as 0


def guarded(
    row: op.KernelInfo, q: Tensor, k: Tensor, v: Tensor, lists: Lists | None = None, **call: Any
) -> tuple[Tensor, Tensor, float]:
    """out, lse and the certificate."""
    if lists is not None:
        call["block_counts"], call["block_indices"] = lists.as_tensors()
    guard = torch.zeros(5, dtype=torch.int32)
    out, lse = bindings.ctypes_sdpa(q, k, v, kernel=row.index, return_lse=True, guard=guard, **call)
    return out, lse, float(guard.view(torch.float32)[4])


def sharp_call(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float]:
    """Small, of random size and sharpness; values name their blocks; and a threshold."""
    rng = np.random.default_rng(seed)
    seqlen_q, seqlen_k = int(rng.integers(1, 130)), int(rng.integers(1, 1000))
    head_dim, sharpness = 16, float(10 ** rng.uniform(-0.5, 1.5))  # as many blocks at most
    alike, of_block = float(rng.uniform(0, 1)), rng.standard_normal((16, head_dim))
    direction = rng.standard_normal(head_dim)  # that queries share more or less
    q = rng.standard_normal((seqlen_q, head_dim)) * (1 - alike) + direction * alike
    k = rng.standard_normal((seqlen_k, head_dim)) * rng.uniform(0, 1)
    k += of_block[np.arange(seqlen_k) // BLOCK]
    v = torch.zeros(1, seqlen_k, 1, head_dim)
    v[0, torch.arange(seqlen_k), 0, torch.arange(seqlen_k) // BLOCK] = 1.0
    x = [torch.from_numpy(x)[None, :, None].to(dtype) for x in (q * sharpness, k)]
    # Out is float32 as query is: it has numbers for small shares too.
    return x[0].float(), x[1], v.to(dtype), float(10 ** rng.uniform(-4, 0))


def true_lost_mass(q: Tensor, k: Tensor, out: Tensor, lists: Lists | None) -> float:
    """The largest share of a row's weights that is of blocks which out does not have."""
    of_key = np.arange(k.shape[1]) // BLOCK
    scores = q[0, :, 0].double().numpy() @ k[0, :, 0].double().numpy().T * q.shape[3] ** -0.5
    if lists is not None:
        of_row = np.arange(q.shape[1]) // BLOCK
        scores = np.where(lists.named[0, 0][of_row][:, of_key], scores, -np.inf)
    top = scores.max(axis=1, keepdims=True)
    sees = np.isfinite(top[:, 0])
    if not sees.any():
        return 0.0
    weight = np.exp(scores[sees] - top[sees])
    weight /= weight.sum(axis=1, keepdims=True)
    has = out[0, :, 0].double().numpy()[sees][:, of_key] > 0.0
    return float(np.where(has, 0.0, weight).sum(axis=1).max())


def certify(row: op.KernelInfo, seed: int) -> float:
    dtype = row.dtypes[seed % len(row.dtypes)]
    q, k, v, threshold = sharp_call(seed, dtype)
    lists = random_lists(seed, 1, 1, q.shape[1], k.shape[1], 0.7) if seed % 3 == 0 else None
    out, _, lost = guarded(row, q, k, v, lists, skip_threshold=threshold)
    true = true_lost_mass(q, k, out, lists)
    # It counts its own roundings: a thousandth, and 2^-100 for each block.
    assert true - BELOW_FLOATS <= lost <= min(1.003 * true + 1e-28, 1.0), seed
    return lost


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.nightly)])
@each_row
def test_the_certificate_is_what_is_lost_and_never_below_it(row: op.KernelInfo, cases: int) -> None:
    found = [certify(row, seed) for seed in range(cases)]
    assert sum(lost > 0.0 for lost in found) > cases / 10, "hardly anything was left out"
    assert sum(0.0 < lost < 0.01 for lost in found) > cases / 100, "hardly anything small"


@each_row
def test_the_certificate_counts_what_a_long_sum_rounds_away(row: op.KernelInfo) -> None:
    """Each of 60,000 blocks weighs just less than what would change the sum of those before."""
    blocks, first, threshold = 60_000, 0.049, 0.05
    small = 0.99 * 2.0**-23 / BLOCK
    k = torch.full(((blocks + 2) * BLOCK,), math.log(small), dtype=torch.float64)
    k[:BLOCK], k[BLOCK : 2 * BLOCK] = 0.0, math.log(first)
    k = k.to(row.dtypes[0])  # 16-bit scores may weigh more; then sums grow as they should
    weight = k.double().exp()
    q, key = torch.ones(1, 1, 1, 1, dtype=k.dtype), k[None, :, None, None]
    _, _, lost = guarded(row, q, key, torch.zeros_like(key), skip_threshold=threshold, scale=1.0)
    assert lost >= float(weight[BLOCK:].sum() / weight.sum())


@each_row
def test_the_error_is_within_the_certificate(row: op.KernelInfo) -> None:
    """|out - exact| <= lost * the spread of the values, whatever else the call has."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        dtype = row.dtypes[seed % len(row.dtypes)]
        q, k, v = calls.operands(2, 150, 700, 4, 2, 24, dtype, peaky=float(rng.choice([1, 4, 12])))
        lists = random_lists(seed, 2, 4, 150, 700, 0.6)
        masks: dict[str, Any] = {"is_causal": bool(rng.integers(2))}
        k_lens = torch.tensor([700, int(rng.integers(0, 700))])
        pools = bool(rng.integers(2))
        want, _ = blocks_oracle.attention(
            q, k, v, lists, pools_others=pools, k_lens=k_lens, **masks
        )
        out, _, lost = guarded(
            row, q, k, v, lists, skip_threshold=0.05, pools_others=pools, k_lens=k_lens, **masks
        )
        spread = float(v.double().max() - v.double().min())
        rounding = 2e-5 if dtype == F32 else 0.06
        assert np.abs(out.double().numpy() - want).max() <= lost * spread + rounding


def one_block_matters(row: op.KernelInfo, score: float) -> list[Tensor]:
    """q, k and v: scores of the first block of 16, and of 0 behind; values name their blocks."""
    q, k, v = torch.zeros(1, 64, 1, 16), torch.zeros(1, 1024, 1, 16), torch.zeros(1, 1024, 1, 16)
    q[..., 0], k[:, :BLOCK, :, 0] = 4.0, score
    v[0, torch.arange(1024), 0, torch.arange(1024) // BLOCK] = 1.0
    return [x.to(row.dtypes[0]) for x in (q, k, v)]


@each_row
def test_it_leaves_out_what_it_says(row: op.KernelInfo) -> None:
    """One block of 16 matters: the others go, and their share is what the scores say."""
    x = one_block_matters(row, 40.0)
    out, lse, lost = guarded(row, x[0], x[1], x[2], skip_threshold=0.01)
    assert (out[..., 0] == 1.0).all() and not out[..., 1:].any()
    share = 15 * np.exp(-40.0)
    assert share <= lost <= 1.002 * share
    assert torch.allclose(lse, torch.tensor(40.0 + np.log(BLOCK), dtype=F32))
    out, _, lost = guarded(row, x[0], x[1], x[2], skip_threshold=0.0)
    assert out[..., 1:].all() and lost == 0.0, "off is off"
    assert guarded(row, x[0], x[1], x[2], skip_threshold=1e-18)[2] == 0.0


@each_row
def test_a_threshold_that_leaves_out_nothing(row: op.KernelInfo) -> None:
    """All weights are equal: nothing may go, whatever the threshold."""
    q, k, v = calls.operands(1, 100, 900, 2, 2, 32, row.dtypes[0])
    k[...] = 0.5
    want = oracle.attention(q, k, v)[0]
    out, _, lost = guarded(row, q, k, v, skip_threshold=1.0)
    assert lost == 0.0
    assert np.abs(out.double().numpy() - want).max() < (0.01 if row.dtypes[0] == BF16 else 1e-5)


@pytest.mark.parametrize("where", ("value", "key"))
@each_row
def test_what_is_not_finite_is_never_left_out(row: op.KernelInfo, where: str) -> None:
    x = one_block_matters(row, 20.0)
    x[2 if where == "value" else 1][0, 700, 0, 3] = float("nan")
    out, _, _ = guarded(row, x[0], x[1], x[2], skip_threshold=0.5)
    assert out[..., 3].isnan().all()


@each_row
def test_a_block_that_a_row_sees_in_part_is_kept(row: op.KernelInfo) -> None:
    """Its bound would be of keys that the row does not have; here all keys but the first block's
    weigh next to nothing."""
    x = one_block_matters(row, 20.0)
    out, _, lost = guarded(row, x[0], x[1], x[2], skip_threshold=0.5, is_causal=True)
    assert (out[0, 1:, 0, 15] > 0).all(), "the diagonal's block"
    assert not out[..., 1:15].any() and lost > 0


@each_row
def test_the_guard_keeps_the_largest_and_old_ones_go_on(row: op.KernelInfo) -> None:
    q, k, v = one_block_matters(row, 20.0)
    guard = torch.zeros(6, dtype=torch.int32)
    seen = []
    for threshold in (0.5, 1e-12, 0.0):
        bindings.ctypes_sdpa(q, k, v, kernel=row.index, skip_threshold=threshold, guard=guard[:5])
        seen.append(float(guard.view(torch.float32)[4]))
    assert seen[0] > 0.0 and seen == [seen[0]] * 3
    small = torch.zeros(6, dtype=torch.int32)
    bindings.ctypes_sdpa(q, k, v, kernel=row.index, skip_threshold=0.5, guard=small[:4])
    assert small[:4].any() and not small[4:].any()
