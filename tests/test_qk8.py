# SPDX-License-Identifier: Apache-2.0
"""test_qk8.py - the rows of 8-bit scores: their integers to the bit, and how far they are off.

Two oracles. qk8_oracle.py has the definition's integers, so a row may differ from it by float32's
rounding alone, whatever the call: that is where lengths, masks, views and heads are tested. From
oracle.py, which is exact, a row is as far as 8 bits are: bounds below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import calls
import oracle
import qk8_oracle
from calls import BF16, DTYPES, F16, F32, MIXED, NAMES, operands, poisoned, sdpa
from tolerances import ulp
from wan_attn.native import op

ROWS = [row for row in op.kernels() if row.is_lossy and calls.can_run(row)]
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 257)

pytestmark = [
    pytest.mark.parametrize("row", ROWS, ids=calls.row_id),
    pytest.mark.usefixtures("native"),
]


def in_integers(row: op.KernelInfo) -> bool:
    """Whether P V is, too."""
    return row.name in ("sdpa_avx2_qk8", "sdpa_avx512_qk8")


def value_error(row: op.KernelInfo, value: Tensor) -> float:
    """What rounding a value to 12 bits takes from it, beside float32's own rounding."""
    return float(value.abs().max()) * (0.5 / 2047 if in_integers(row) else 0.0) + 1e-6


def check(
    row: op.KernelInfo, query: Tensor, key: Tensor, value: Tensor, **call: Any
) -> tuple[Tensor, Tensor]:
    """Runs the call, and holds it against the definition: float32 rounds exponents of up to 100."""
    out, lse = sdpa(query, key, value, row=row, return_lse=True, **call)
    want, want_lse = qk8_oracle.attention(query, key, value, in_integers=in_integers(row), **call)
    finite = np.isfinite(want_lse)
    np.testing.assert_array_equal(oracle.as_float64(lse)[~finite], want_lse[~finite], "lse")
    error = np.abs(oracle.as_float64(lse)[finite] - want_lse[finite]).max(initial=0)
    assert error <= 2e-6 * max(1.0, float(np.abs(want_lse[finite]).max(initial=0)))
    fine = np.isfinite(want)
    np.testing.assert_array_equal(oracle.as_float64(out)[~fine], want[~fine], "out")
    largest = float(np.abs(want[fine]).max(initial=0))
    peak = score_range(query, key, call.get("scale"))
    allowed = 2e-6 * (1.0 + peak) * max(largest, 1e-30) + ulp(out.dtype, largest)
    error = np.abs(oracle.as_float64(out) - want)
    if in_integers(row):
        error -= qk8_oracle.slack(query, key, value, 2e-6 * (1.0 + peak), **call)
    error = error[fine].max(initial=0)
    assert error <= allowed, f"out is {error:.2e} off, allowed {allowed:.2e}"
    return out, lse


def score_range(query: Tensor, key: Tensor, scale: float | None) -> float:
    """How large exponents can become: float32's rounding of them is an error of the weights."""
    q, k = (torch.nan_to_num(x.double(), 0, 0, 0).norm(dim=-1) for x in (query, key))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return float(q.max() * k.max()) * abs(scale) if q.numel() and k.numel() else 0.0


def bound(q: oracle.Array, k: oracle.Array, scale: float) -> oracle.Array:
    """[rows]: by how much a score can be off, proven: each number by half a step, both at once."""
    q8, q_step = qk8_oracle.quantised(q.astype(np.float32))
    centred = (k - qk8_oracle.mean_of(k.astype(np.float32))).astype(np.float32)
    _, k_step = qk8_oracle.quantised(centred)
    root = math.sqrt(q8.shape[1])  # of the depth: rotated rows are this much longer
    half_q, half_k = 0.5 * q_step * root, 0.5 * k_step * root  # the norms of the rounding errors
    longest_k = np.linalg.norm(centred, axis=1).max() * root
    longest_q = np.linalg.norm(q, axis=1) * root
    off = half_q * longest_k + longest_q * half_k.max() + half_q * half_k.max()
    return np.asarray(1.0001 * abs(scale) * off / q8.shape[1])


def integers_seen(row: op.KernelInfo, head_dim: int, dtype: torch.dtype) -> None:
    """Every integer score of 64 rows and keys, from lse: under a window of one key, lse is integer
    * k_step * factor, where q is orthogonal to K's mean. The mean lies in channels that q lacks,
    and the others' is exactly 0, because keys come in pairs of opposite sign there."""
    half, rows = head_dim // 2, 64
    key = torch.randn(1, rows, 1, head_dim) * torch.logspace(-1, 1, head_dim)
    key[:, 1::2, :, :half] = -key[:, ::2, :, :half]
    query = torch.randn(1, rows, 1, head_dim)
    query[..., half:] = 0.0
    query, key = query.to(dtype), key.to(dtype)
    value = torch.randn(1, rows, 1, head_dim).to(dtype)
    k, q = (oracle.as_float64(x)[0, :, 0].astype(np.float32) for x in (key, query))
    mean = qk8_oracle.mean_of(k)
    assert not mean[:half].any() and mean[half:].all()
    k8, k_step = qk8_oracle.quantised(k - mean)
    q8, q_step = qk8_oracle.quantised(q)
    scale = np.float64(head_dim) ** -0.5 / qk8_oracle.depth_of(head_dim)
    factor = (q_step.astype(np.float64) * scale).astype(np.float32)
    want = ((q8 @ k8.T).astype(np.float32) * k_step).astype(np.float32) * factor[:, None]
    assert np.abs(q8 @ k8.T).max() > 1000, "the integers must be large to be a test"
    alone, rounding = oracle.as_float64(value)[0, :, 0], 0.0
    if in_integers(row):
        alone, rounding = qk8_oracle.rounded_values(alone), torch.finfo(dtype).eps
    for shift in range(rows):
        out, lse = sdpa(query.roll(shift, 1), key, value, row=row, window=(0, 0), return_lse=True)
        np.testing.assert_allclose(oracle.as_float64(out)[0, :, 0], alone, rtol=rounding, atol=0.0)
        diagonal = want[(np.arange(rows) - shift) % rows, np.arange(rows)]
        np.testing.assert_array_equal(lse[0, 0].numpy(), diagonal)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("head_dim", (16, 64, 80, 128, 256))
def test_integer_scores_are_the_definitions(
    row: op.KernelInfo, head_dim: int, dtype: torch.dtype
) -> None:
    integers_seen(row, calls.head_dim_for(row, head_dim), dtype)


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length(row: op.KernelInfo, length: int) -> None:
    other = LENGTHS[(LENGTHS.index(length) * 5 + 7) % len(LENGTHS)]
    for seqlen_q, seqlen_k in ((length, length), (length, other)):
        call = operands(heads_q=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        check(row, *call)
        check(row, *call, is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("head_dim", (1, 2, 3, 17, 40, 64, 80, 100, 128, 160, 255, 256))
def test_head_dims(row: op.KernelInfo, head_dim: int, dtype: torch.dtype) -> None:
    for seqlen_q in (5, 65):
        check(row, *operands(head_dim=head_dim, dtype=dtype, seqlen_q=seqlen_q, seqlen_k=35))


@pytest.mark.parametrize(("heads_q", "heads_k"), [(3, 3), (4, 2), (6, 1), (8, 4)])
def test_grouped_heads_and_lengths(row: op.KernelInfo, heads_q: int, heads_k: int) -> None:
    call = operands(batch=3, seqlen_q=40, seqlen_k=70, heads_q=heads_q, heads_k=heads_k)
    for mask in ({}, {"is_causal": True}, {"window": (5, 3)}, {"window": (30, -1)}):
        check(row, *call, q_lens=[40, 7, 0], k_lens=[70, 33, 21], **mask)
        check(row, *call, k_lens=[0, 1, 70], **mask)


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(NAMES[t] for t in d))
def test_mixed_dtypes(row: op.KernelInfo, dtypes: tuple[torch.dtype, ...]) -> None:
    out, _ = check(row, *operands(dtype=dtypes, seqlen_q=33, seqlen_k=70), k_lens=[51])  # type: ignore[arg-type]
    assert out.dtype == dtypes[0]


@pytest.mark.parametrize("scale", (-0.3, 0.0, 1e-3, 1.0))
def test_scales(row: op.KernelInfo, scale: float) -> None:
    for seqlen_q in (5, 65):
        call = operands(seqlen_q=seqlen_q, seqlen_k=70)
        check(row, *call, scale=scale)
        check(row, *call, scale=scale, is_causal=True, k_lens=[20])


@pytest.mark.parametrize("layout", calls.LAYOUTS, ids=lambda f: f.__name__)
def test_views_give_the_bits_of_copies(
    row: op.KernelInfo, layout: Callable[[Tensor], Tensor]
) -> None:
    for dtype in DTYPES:
        call = operands(batch=2, seqlen_q=40, seqlen_k=70, heads_q=4, heads_k=2, dtype=dtype)
        plain = sdpa(*call, row=row, is_causal=True, return_lse=True)
        views = sdpa(*map(layout, call), row=row, is_causal=True, return_lse=True)
        assert all(map(torch.equal, plain, views))


@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
def test_padding_is_never_used(row: op.KernelInfo, poison: float) -> None:
    q_lens, k_lens = [65, 9, 0, 3], [40, 13, 7, 0]
    for mask in ({}, {"is_causal": True}, {"window": (5, 3)}):
        clean = operands(batch=4, seqlen_q=65, seqlen_k=40)
        call: dict[str, Any] = {"q_lens": q_lens, "k_lens": k_lens, **mask}
        dirty: Any = [
            poisoned(x, n, poison) for x, n in zip(clean, (q_lens, k_lens, k_lens), strict=True)
        ]
        out, lse = check(row, *dirty, **call)
        want = sdpa(*clean, row=row, return_lse=True, **call)
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
        assert not out[2].any() and torch.isneginf(lse[2]).all()


@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
def test_who_sees_a_bad_key_is_nan_and_nobody_else(row: op.KernelInfo, poison: float) -> None:
    """A mean that took the poison in would spread it over every row."""
    for seqlen in (12, 90):
        query, key, value = operands(heads_q=1, seqlen_q=seqlen, seqlen_k=seqlen)
        key[0, seqlen // 2, 0, 3] = poison
        out, lse = check(row, query, key, value, is_causal=True)
        assert not out[:, : seqlen // 2].isnan().any() and out[:, seqlen // 2 :].isnan().all()
        query[0, 2, 0, 1] = poison
        out, lse = check(row, query, key, value, window=(0, 0))
        bad = sorted({2, seqlen // 2})
        assert lse[0, 0].isnan().nonzero().flatten().tolist() == bad
        assert out[0, :, 0].isnan().any(dim=1).nonzero().flatten().tolist() == bad


@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
def test_a_bad_value_stays_in_its_channel(row: op.KernelInfo, poison: float) -> None:
    """The block of keys that it lies in is weighed otherwise, and the others are not. A key in the
    first block is far ahead of those in the last one, so that their weights shrink."""
    for seqlen, at in ((90, 70), (300, 70), (300, 290)):
        query, key, value = operands(heads_q=1, seqlen_q=seqlen, seqlen_k=seqlen)
        key[0, 5] *= 4
        value[0, at, 0, 3] = poison
        for mask in ({}, {"is_causal": True}):
            out, lse = check(row, query, key, value, **mask)
            assert not out[0, at:, 0, 3].isfinite().any() and lse.isfinite().all()
            assert out[..., 4:].isfinite().all() and out[..., :3].isfinite().all()
            assert out[0, :at, 0, 3].isfinite().all() == bool(mask)


def test_small_and_large_numbers(row: op.KernelInfo) -> None:
    """Zero rows, numbers below every step, the largest of float16 and of bfloat16."""
    for factor, dtype in ((0.0, F32), (1e-35, F32), (1e-42, F32), (1e4, F16), (1e15, BF16)):
        query, key, value = operands(seqlen_q=40, seqlen_k=70, dtype=dtype)
        out, _ = check(row, query, (key.float() * factor).to(dtype), value, scale=1e-6)
        assert out.isfinite().all()
        out, _ = check(row, (query.float() * factor).to(dtype), key, value, scale=1e-6)
        assert out.isfinite().all()
    query, key, value = operands(seqlen_q=40, seqlen_k=70)
    query[:, 3], key[:, 7] = 0.0, 0.0
    out, _ = check(row, query, key, value)
    atol = value_error(row, value)
    np.testing.assert_allclose(out[:, 3].numpy(), value.mean(dim=1).numpy(), atol=atol)


def test_one_key_and_equal_keys_are_exact(row: op.KernelInfo) -> None:
    """In integers: to float32's rounding, or that of the values."""
    for seqlen_q in (5, 65):
        query, key, value = operands(seqlen_q=seqlen_q, seqlen_k=1)
        out, _ = sdpa(20 * query, key, value, row=row)
        rounding = 2.0**-23 if in_integers(row) else 0.0
        np.testing.assert_allclose(out.numpy(), value.expand_as(out), rtol=rounding, atol=0.0)
    query, key, value = operands(seqlen_q=40, seqlen_k=64)
    same = key[:, :1].expand(-1, 64, -1, -1)
    out, _ = sdpa(query, same, value, row=row)
    check(row, query, same, value)
    mean, atol = value.mean(1, keepdim=True), value_error(row, value)
    np.testing.assert_allclose(out.numpy(), mean.expand_as(out), atol=atol)


@pytest.mark.parametrize("offset", (0.0, 8.0, 64.0))
def test_a_common_part_of_all_keys_costs_nothing(row: op.KernelInfo, offset: float) -> None:
    """It would take the integers' range; lse has it back."""
    query, key, value = operands(seqlen_q=64, seqlen_k=300)
    shifted = key + offset * torch.randn(1, 1, 2, 64)
    out, lse = check(row, query, shifted, value)
    want, want_lse = oracle.attention(query, shifted, value)
    assert np.linalg.norm(out.numpy() - want) <= 0.011 * np.linalg.norm(want)
    assert np.abs(lse.numpy() - want_lse).max() <= 0.03


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("head_dim", (64, 128))
def test_error_on_normal_numbers(row: op.KernelInfo, head_dim: int, dtype: torch.dtype) -> None:
    """Relative L2 of 1.1 % at most, what bfloat16 rounds aside; and nothing on average."""
    call = operands(seqlen_q=128, seqlen_k=1500, heads_q=2, head_dim=head_dim, dtype=dtype)
    out, lse = sdpa(*call, row=row, return_lse=True)
    want, want_lse = oracle.attention(*call)
    error = oracle.as_float64(out) - want
    assert np.linalg.norm(error) <= 0.011 * np.linalg.norm(want)
    assert abs(error.mean()) <= 0.001 * np.abs(want).mean()
    assert np.abs(lse.numpy() - want_lse).max() <= 0.01


@pytest.mark.parametrize("peaky", (1.0, 3.0, 10.0))
def test_no_error_is_beyond_the_proven_bound(row: op.KernelInfo, peaky: float) -> None:
    """Each score is off by at most `bound`, e; then each weight by a factor of exp(2e) at most."""
    query, key, value = operands(seqlen_q=64, seqlen_k=200, heads_q=1, peaky=peaky)
    key[..., 5] *= 12
    out, lse = sdpa(query, key, value, row=row, return_lse=True)
    want, want_lse = oracle.attention(query, key, value)
    q, k, v = (oracle.as_float64(x)[0, :, 0] for x in (query, key, value))
    off = bound(q, k, 0.125)
    assert (np.abs(lse.numpy()[0, 0] - want_lse[0, 0]) <= off + 1e-4).all()
    spread = np.abs(v - want[0, :, :1]).max()
    largest = np.expm1(2 * off) * spread + 1e-5
    if in_integers(row):  # each weight is half of one off, while they sum to more than WEIGHT_ONE
        largest += 200 * 0.5 / qk8_oracle.WEIGHT_ONE * spread + value_error(row, value)
    assert (np.abs(out.numpy() - want)[0, :, 0].max(axis=1) <= largest).all()


def test_two_runs_and_any_number_of_threads_give_the_same_bits(
    row: op.KernelInfo, threads: None
) -> None:
    call = operands(batch=2, seqlen_q=70, seqlen_k=190, heads_q=4, heads_k=2)
    torch.set_num_threads(1)
    alone = sdpa(*call, row=row, k_lens=[190, 41], return_lse=True)
    for number in (1, 2, 3, 7):
        torch.set_num_threads(number)
        together = sdpa(*call, row=row, k_lens=[190, 41], return_lse=True)
        assert all(map(torch.equal, alone, together)), number


def test_a_sample_does_not_depend_on_its_batch(row: op.KernelInfo) -> None:
    query, key, value = operands(batch=3, seqlen_q=40, seqlen_k=70, heads_q=4)
    out, lse = sdpa(query, key, value, row=row, k_lens=[70, 9, 33], return_lse=True)
    for b, length in enumerate((70, 9, 33)):
        part = slice(b, b + 1)
        alone = sdpa(
            *(x[part, :, 2:3] for x in (query, key[:, :length], value[:, :length])),
            row=row,
            return_lse=True,
        )
        assert torch.equal(out[part, :, 2:3], alone[0])
        assert torch.equal(lse[part, 2:3], alone[1])


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 3), (2, 0, 5), (2, 5, 0)])
def test_nothing_to_do(row: op.KernelInfo, batch: int, seqlen_q: int, seqlen_k: int) -> None:
    out, lse = check(row, *operands(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k))
    assert not out.any() and torch.isneginf(lse).all()
