# SPDX-License-Identifier: Apache-2.0
"""test_backward.py - every row of the table of backward kernels that can run here, forced, against
float64.

A new row is tested by being in csrc/core/backward_rows.def; nothing here names one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import backward_oracle
import calls
import oracle
from calls import BF16, DTYPES, F32, MIXED, NAMES, operands, poisoned
from wan_attn.native import kernels, op

ROWS = [row for row in kernels.backward_kernels() if calls.can_run(row)]
# Keys are computed in panels of 24 or 48, query rows in blocks of 96 or 192: both sides of each.
LENGTHS = (1, 2, 7, 23, 24, 25, 47, 48, 49, 95, 96, 97, 130, 191, 192, 193, 200, 385, 400)

pytestmark = [
    pytest.mark.parametrize("row", ROWS, ids=calls.row_id),
    pytest.mark.usefixtures("native"),
]


def forward_and_backward(
    row: op.KernelInfo,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    q_lens: list[int] | Tensor | None = None,
    k_lens: list[int] | Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    **options: Any,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value by this row, from what the best forward row leaves."""
    lens = (calls.as_lens(q_lens), calls.as_lens(k_lens))
    options |= {"window_left": window[0], "window_right": window[1]}
    out, lse = torch.ops.wan_attn.sdpa(query, key, value, *lens, return_lse=True, **options)
    inputs = (grad_out, grad_lse, query, key, value, out, lse, *lens)
    return tuple(torch.ops.wan_attn.sdpa_backward(*inputs, kernel=row.index, **options))


def check(
    row: op.KernelInfo,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    **call: Any,
) -> tuple[Tensor, ...]:
    """Runs the call and holds its gradients against the oracle."""
    if grad_out is None:
        grad_out = torch.randn(query.shape).to(query.dtype)
    got = forward_and_backward(row, query, key, value, grad_out, grad_lse, **call)
    backward_oracle.assert_close(got, grad_out, grad_lse, query, key, value, **call)
    return got


def some(row: op.KernelInfo, **shape: Any) -> tuple[Tensor, Tensor, Tensor]:
    return operands(**{"dtype": row.dtypes[0], **shape})


def test_the_row_takes_what_its_table_entry_says(row: op.KernelInfo) -> None:
    for dtype in row.dtypes:
        for head_dim in (row.head_dim_min, row.head_dim_max):
            check(row, *operands(head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_is_exact(row: op.KernelInfo, length: int) -> None:
    other = LENGTHS[(LENGTHS.index(length) * 5 + 7) % len(LENGTHS)]
    for dtype in row.dtypes:
        for seqlen_q, seqlen_k in ((length, length), (length, other)):
            check(row, *some(row, dtype=dtype, heads_q=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k))


@pytest.mark.parametrize("length", (1, 48, 49, 97, 193))
def test_causal_lengths(row: op.KernelInfo, length: int) -> None:
    """Where the diagonal crosses a tile is where causal goes wrong."""
    for seqlen_q, seqlen_k in ((length, length), (length, 64), (64, length), (length, length + 1)):
        check(row, *some(row, heads_q=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k), is_causal=True)


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 3), (2, 0, 5), (2, 5, 0)])
def test_nothing_to_do(row: op.KernelInfo, batch: int, seqlen_q: int, seqlen_k: int) -> None:
    for dtype in row.dtypes:
        call = some(row, dtype=dtype, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        assert not any(grad.any() for grad in check(row, *call))


@pytest.mark.parametrize("head_dim", (1, 2, 3, 8, 17, 40, 64, 80, 96, 100, 128, 160, 255, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_head_dims(row: op.KernelInfo, head_dim: int, dtype: torch.dtype) -> None:
    call = operands(head_dim=head_dim, dtype=dtype, seqlen_q=65, seqlen_k=35)
    if dtype not in row.dtypes:
        with pytest.raises(RuntimeError, match=f"wan_attn: {row.name}: does not take"):
            check(row, *call)
    else:
        check(row, *call)


@pytest.mark.parametrize(("heads_q", "heads_k"), [(1, 1), (3, 3), (4, 2), (6, 2), (6, 1), (8, 4)])
def test_grouped_heads(row: op.KernelInfo, heads_q: int, heads_k: int) -> None:
    sizes = {"batch": 2, "seqlen_q": 65, "heads_q": heads_q, "heads_k": heads_k}
    for dtype in row.dtypes:
        check(row, *some(row, dtype=dtype, **sizes), is_causal=heads_k == 2)


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(NAMES[t] for t in d))
def test_float32_query_and_key_with_half_value(
    row: op.KernelInfo, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    if dtypes[2] not in row.dtypes:
        pytest.skip(f"{row.name} does not take {NAMES[dtypes[2]]}")
    check(row, *some(row, dtype=dtypes, seqlen_q=33, seqlen_k=70), k_lens=[51])


@pytest.mark.parametrize("layout", calls.LAYOUTS, ids=lambda f: f.__name__)
def test_strided_views(row: op.KernelInfo, layout: Callable[[Tensor], Tensor]) -> None:
    for dtype in row.dtypes:
        call = some(row, batch=2, heads_q=4, heads_k=2, dtype=dtype)
        grad_out = torch.randn(call[0].shape).to(dtype)
        views: Any = [layout(x) for x in (*call, grad_out)]
        got = forward_and_backward(row, *views, is_causal=True)
        plain = forward_and_backward(row, *call, grad_out, is_causal=True)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
        assert all(x.is_contiguous() for x in got)


def test_expanded_gradients(row: op.KernelInfo) -> None:
    """What sum() and mean() hand over: one number, seen everywhere."""
    call = some(row, batch=2)
    one, lse = torch.ones(()).to(call[0].dtype), torch.ones(()).expand(2, 2, 17)
    expanded = forward_and_backward(row, *call, one.expand(call[0].shape), lse)
    plain = forward_and_backward(row, *call, torch.ones_like(call[0]), torch.ones(2, 2, 17))
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


@pytest.mark.parametrize("scale", (-0.7, 0.0, 1.0))
def test_scales(row: op.KernelInfo, scale: float) -> None:
    for dtype in row.dtypes:
        check(row, *some(row, dtype=dtype, seqlen_q=65), scale=scale)


def test_large_scores(row: op.KernelInfo) -> None:
    for dtype in row.dtypes:
        check(row, *some(row, dtype=dtype, seqlen_q=65, seqlen_k=200, peaky=6.0))


@pytest.mark.parametrize("seqlen_q", (1, 3, 12, 13, 24, 25, 32))
def test_large_scores_of_few_rows(row: op.KernelInfo, seqlen_q: int) -> None:
    """Forward sums the scores of few rows in an order of its own: one key has most of the weight,
    and an lse that does not fit the scores is all that its gradients are off by."""
    for dtype in row.dtypes:
        for number in range(6):
            torch.manual_seed(number)
            sizes = {"seqlen_q": seqlen_q, "seqlen_k": 200, "peaky": 12.0, "heads_q": 4}
            mask: dict[str, Any] = {"window": (30, 150)} if number % 2 else {}
            check(row, *some(row, dtype=dtype, heads_k=2, **sizes), **mask)


@pytest.mark.parametrize("scale", (1e39, -1e300))
def test_scales_beyond_float32(row: op.KernelInfo, scale: float) -> None:
    """Infinity times a score or a sum of 0 would be NaN."""
    for dtype in row.dtypes:
        query, key, value = some(row, batch=2, dtype=dtype, seqlen_q=45)
        inputs: Any = (query * 0, key * 0, value, torch.randn(query.shape).to(dtype))
        got = forward_and_backward(row, *inputs, scale=scale, k_lens=[33, 0])
        want = forward_and_backward(row, *inputs, scale=0.0, k_lens=[33, 0])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("scale", (1e10, -1e30))
@pytest.mark.parametrize("seqlen_q", (19, 45))
def test_a_single_key_weighs_1_whatever_its_score(
    row: op.KernelInfo, seqlen_q: int, scale: float
) -> None:
    """Such scores are rounded by more than exp() holds."""
    for dtype in row.dtypes:
        call = some(row, batch=2, dtype=dtype, seqlen_q=seqlen_q, seqlen_k=30)
        grad_out = torch.randn(call[0].shape).to(dtype)
        inputs: Any = (*call, grad_out)
        got = forward_and_backward(row, *inputs, scale=scale, k_lens=[1, 0])
        want = forward_and_backward(row, *inputs, scale=0.0, k_lens=[1, 0])
        assert not got[0].any() and not got[1].any()
        assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("seqlen_q", (3, 45))
def test_keys_far_below_scores_beyond_rounding_get_zeros(row: op.KernelInfo, seqlen_q: int) -> None:
    """The weight of the largest may be anything then; those of the others are 0."""
    for dtype in row.dtypes:
        query, key, value = some(row, dtype=dtype, heads_q=1, seqlen_q=seqlen_q, seqlen_k=30)
        query, grad_out = query[:, :1].expand_as(query), torch.randn(query.shape).to(dtype)
        got = forward_and_backward(row, query, key, value, grad_out, scale=1e10)
        others = torch.ones(30, dtype=torch.bool)
        others[(key[0, :, 0].double() @ query[0, 0, 0].double()).argmax()] = False
        assert not got[1][0, others].any() and not got[2][0, others].any()


@pytest.mark.parametrize("q_lens", (3, 24, 45))
def test_a_key_of_minus_infinity_gets_zeros(row: op.KernelInfo, q_lens: int) -> None:
    """From all rows that see it, which need not fill what is computed together."""
    for dtype in row.dtypes:
        for seqlen_q in (q_lens, 64):
            call = some(row, dtype=dtype, heads_q=1, seqlen_q=seqlen_q, seqlen_k=70)
            call[0][..., 0] = 1.0
            call[1][:, 5, :, 0] = -math.inf
            grad_out = torch.randn(call[0].shape).to(dtype)
            got = forward_and_backward(row, *call, grad_out, q_lens=[q_lens])
            assert not got[1][:, 5].any() and not got[2][:, 5].any()
            assert got[1].isfinite().all() and got[2].isfinite().all()
            assert got[0][:, :q_lens, :, 1:].isfinite().all()


@pytest.mark.parametrize("left", (3, 4))
def test_nan_just_before_the_visible_keys(row: op.KernelInfo, left: int) -> None:
    """Keys are multiplied two at a time where they are bfloat16; the first visible one may be the
    second of such a pair."""
    for dtype in row.dtypes:
        query, key, value = some(row, dtype=dtype, seqlen_q=1, seqlen_k=40)
        key[:, : 39 - left] = value[:, : 39 - left] = math.nan
        check(row, query, key, value, window=(left, 0))


def test_gradient_of_lse(row: op.KernelInfo) -> None:
    for dtype in row.dtypes:
        call = some(row, batch=2, seqlen_q=65, seqlen_k=50, dtype=dtype)
        lens: dict[str, Any] = {"q_lens": [65, 31], "k_lens": [30, 50], "is_causal": True}
        check(row, *call, grad_lse=torch.randn(2, 2, 65), **lens)


@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
def test_padding_is_never_used(row: op.KernelInfo, poison: float) -> None:
    """Rows without a key, too: neither their query, nor their gradient, nor their lse."""
    q_lens, k_lens = [65, 9, 0, 3], [40, 13, 7, 0]
    for dtype in row.dtypes:
        for mask in ({}, {"is_causal": True}, {"window": (5, 3)}):
            clean = some(row, batch=4, seqlen_q=65, seqlen_k=40, dtype=dtype)
            grads = torch.randn(clean[0].shape).to(dtype), torch.randn(4, 2, 65)
            call: dict[str, Any] = {"q_lens": q_lens, "k_lens": k_lens, **mask}
            rows = q_lens[:3] + [0]
            dirty: Any = [
                poisoned(x, n, poison)
                for x, n in zip((*clean, grads[0]), (rows, k_lens, k_lens, rows), strict=True)
            ]
            of_lse = poisoned(grads[1].transpose(1, 2), rows, poison).transpose(1, 2)
            query, key, value, grad_out = dirty
            got = check(row, query, key, value, grad_out, of_lse, **call)
            want = forward_and_backward(row, *clean, *grads, **call)
            for a, b, lens in zip(got, want, (rows, k_lens, k_lens), strict=True):
                assert torch.equal(a, b)
                assert not any(a[n, length:].any() for n, length in enumerate(lens))


def test_padding_of_whole_tiles(row: op.KernelInfo) -> None:
    """Lengths far below the padded ones: whole tiles must be left out, not only tails."""
    q_lens, k_lens = [1, 230, 64], [1, 65, 300]
    query, key, value = some(row, batch=3, seqlen_q=400, seqlen_k=300, heads_q=1)
    dirty = (poisoned(query, q_lens), poisoned(key, k_lens), poisoned(value, k_lens))
    for is_causal in (False, True):
        check(row, *dirty, q_lens=q_lens, k_lens=k_lens, is_causal=is_causal)


def test_nothing_outside_the_mask_is_used(row: op.KernelInfo) -> None:
    """NaN in a key reaches the rows that see it, and what those rows reach; NaN in a row the keys
    that it sees."""
    for dtype in row.dtypes:
        for mask in ({"is_causal": True}, {"window": (4, 2)}):
            seen = torch.from_numpy(oracle.visible(40, 40, **mask))
            for which in range(4):
                call = some(row, seqlen_q=40, seqlen_k=40, heads_q=4, heads_k=2, dtype=dtype)
                inputs = [*call, torch.randn(call[0].shape).to(dtype)]
                inputs[which][:, 21, 1] = math.nan
                got = forward_and_backward(row, *inputs, **mask)
                rows = seen[:, 21] if which in (1, 2) else torch.arange(40) == 21
                keys = seen[rows].any(0)
                head_k = 1 if which in (1, 2) else 0
                of_query = got[0][0, :, 2:] if head_k else got[0][0, :, 1:2]
                assert torch.equal(
                    of_query.isnan().all(-1), rows[:, None].expand_as(of_query[..., 0])
                )
                assert torch.equal(of_query.isnan().any(-1), of_query.isnan().all(-1))
                assert torch.equal(got[1][0, :, head_k].isnan().any(-1), keys)
                assert not got[1][0, :, 1 - head_k].isnan().any()
                assert not got[2][0, :, 1 - head_k].isnan().any()
                # V does not enter the weights, so its own gradient stays.
                expected = keys if which != 2 else torch.zeros(40, dtype=torch.bool)
                assert torch.equal(got[2][0, :, head_k].isnan().any(-1), expected)


RAGGED: tuple[dict[str, Any], ...] = (
    {"q_lens": [140, 23, 1], "k_lens": [151, 51, 30]},
    {"q_lens": [5, 140, 33], "k_lens": [151, 2, 33]},
    {"q_lens": [0, 140, 7], "k_lens": [9, 0, 1]},
    {"k_lens": [151, 16, 117]},
    {"q_lens": [16, 117, 140]},
)
WINDOWS = ((-1, -1), (0, 0), (3, 0), (0, 3), (6, 2), (-1, 4), (4, -1), (33, 17), (2**62, 2**40))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_masks_with_ragged_lengths(
    row: op.KernelInfo, window: tuple[int, int], is_causal: bool
) -> None:
    for number, lens in enumerate(RAGGED):
        dtype = row.dtypes[number % len(row.dtypes)]
        call = some(row, batch=3, seqlen_q=140, seqlen_k=151, heads_q=1, head_dim=24, dtype=dtype)
        check(row, *call, **lens, window=window, is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_any_number_of_threads_gives_the_same_bits(
    row: op.KernelInfo, dtype: torch.dtype, threads: None
) -> None:
    if dtype not in row.dtypes:
        pytest.skip(f"{row.name} does not take {NAMES[dtype]}")
    call = some(row, batch=2, seqlen_q=430, seqlen_k=500, heads_q=4, heads_k=2, dtype=dtype)
    grad_out = torch.randn(call[0].shape).to(dtype)
    masks: tuple[dict[str, Any], ...] = ({}, {"k_lens": [500, 77], "is_causal": True})
    for mask in masks:
        torch.set_num_threads(1)
        want = forward_and_backward(row, *call, grad_out, **mask)
        for count in (1, 2, 3, 5, 8):
            torch.set_num_threads(count)
            got = forward_and_backward(row, *call, grad_out, **mask)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_long_sequences_stay_as_exact(row: op.KernelInfo) -> None:
    if row.name.endswith("ref"):
        pytest.skip("minutes")
    for dtype in row.dtypes:
        check(row, *some(row, heads_q=1, head_dim=32, seqlen_q=2100, seqlen_k=1900, dtype=dtype))


def test_bfloat16_or_float32_gradient_of_the_result(row: op.KernelInfo) -> None:
    """grad_out may have another dtype than out."""
    call = some(row, dtype=BF16 if BF16 in row.dtypes else F32)
    check(row, *call, grad_out=torch.randn(call[0].shape))
