# SPDX-License-Identifier: Apache-2.0
"""test_kernels.py - every row of the kernel table that can run here, forced, against the oracle.

A new row is tested by being in csrc/core/kernels.def; nothing here names one. Where a row declines
a call, the forced call must say so with the row's reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import calls
import oracle
from calls import BF16, DTYPES, F16, F32, MIXED, NAMES, check, operands, poisoned, sdpa
from tolerances import assert_close_to_oracle
from wan_attn.native import op

ROWS = calls.rows()
# Tiles are powers of two up to 256: one, both sides of each, and an odd number between.
# Rows of the CPU compute a few queries in another way (sdpa_few.inc) than whole panels of them.
FEW_AND_MANY = pytest.mark.parametrize("seqlen_q", (5, 65), ids=("few", "many"))
LENGTHS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 101, 127, 128, 129, 255, 256, 257)

pytestmark = pytest.mark.parametrize("row", ROWS, ids=calls.row_id)


def row_dtypes(row: op.KernelInfo | None) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES if dtype in calls.dtypes_for(row)]


def some(
    row: op.KernelInfo | None, **shape: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Operands that this row takes."""
    wanted = shape.pop("head_dim", 64)
    dtype = shape.pop("dtype", row_dtypes(row)[0])
    return operands(head_dim=calls.head_dim_for(row, wanted), dtype=dtype, **shape)


def test_the_row_takes_what_its_table_entry_says(row: op.KernelInfo | None, native: str) -> None:
    assert row is not None
    assert row.dtypes and 1 <= row.head_dim_min <= row.head_dim_max
    for dtype in row.dtypes:
        for head_dim in (row.head_dim_min, row.head_dim_max):
            check(row, *operands(head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_is_exact(row: op.KernelInfo | None, length: int) -> None:
    other = LENGTHS[(LENGTHS.index(length) * 5 + 7) % len(LENGTHS)]
    for dtype in row_dtypes(row):
        for seqlen_q, seqlen_k in ((length, length), (length, other)):
            check(row, *some(row, dtype=dtype, heads_q=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k))


@pytest.mark.parametrize("length", (1, 16, 33, 64, 65, 129))
def test_causal_lengths(row: op.KernelInfo | None, length: int) -> None:
    """Where the diagonal crosses a tile is where causal goes wrong."""
    for seqlen_q, seqlen_k in ((length, length), (length, 64), (64, length), (length, length + 1)):
        check(row, *some(row, heads_q=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k), is_causal=True)


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 3), (2, 0, 5), (2, 5, 0)])
def test_nothing_to_do(row: op.KernelInfo | None, batch: int, seqlen_q: int, seqlen_k: int) -> None:
    for dtype in row_dtypes(row):
        call = some(row, dtype=dtype, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        out, lse = check(row, *call)
        assert not out.any()
        assert torch.isneginf(lse).all()


@pytest.mark.parametrize("head_dim", (1, 2, 3, 8, 17, 40, 64, 80, 96, 100, 128, 160, 255, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@FEW_AND_MANY
def test_head_dims(
    row: op.KernelInfo | None, head_dim: int, dtype: torch.dtype, seqlen_q: int
) -> None:
    call = operands(head_dim=head_dim, dtype=dtype, seqlen_q=seqlen_q, seqlen_k=35)
    if row and (dtype not in row.dtypes or calls.head_dim_for(row, head_dim) != head_dim):
        with pytest.raises(RuntimeError, match=f"wan_attn: {row.name}: (takes head_dim|does not)"):
            sdpa(*call, row=row)
    else:
        check(row, *call)


@pytest.mark.parametrize(("heads_q", "heads_k"), [(1, 1), (3, 3), (4, 2), (6, 2), (6, 1), (8, 4)])
@FEW_AND_MANY
def test_grouped_heads(
    row: op.KernelInfo | None, heads_q: int, heads_k: int, seqlen_q: int
) -> None:
    sizes = {"batch": 2, "seqlen_q": seqlen_q, "heads_q": heads_q, "heads_k": heads_k}
    for dtype in row_dtypes(row):
        check(row, *some(row, dtype=dtype, **sizes))


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(NAMES[t] for t in d))
def test_float32_query_and_key_with_half_value(
    row: op.KernelInfo | None, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    if dtypes[2] not in calls.dtypes_for(row):
        pytest.skip(f"{calls.row_id(row)} does not take {NAMES[dtypes[2]]}")
    out, _ = check(row, *some(row, dtype=dtypes, seqlen_q=33, seqlen_k=70), k_lens=[51])
    assert out.dtype == dtypes[0]


@pytest.mark.parametrize("layout", calls.LAYOUTS, ids=lambda f: f.__name__)
def test_strided_views(
    row: op.KernelInfo | None, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for dtype in row_dtypes(row):
        call = some(row, batch=2, heads_q=4, heads_k=2, dtype=dtype)
        views: Any = [layout(x) for x in call]
        assert all(torch.equal(view, x) for view, x in zip(views, call, strict=True))
        out, lse = check(row, *views, is_causal=True)
        plain, plain_lse = sdpa(*call, row=row, is_causal=True, return_lse=True)
        assert torch.equal(out, plain) and torch.equal(lse, plain_lse)
        assert out.is_contiguous()


def test_fused_qkv_views(row: op.KernelInfo | None) -> None:
    for dtype in row_dtypes(row):
        head_dim = calls.head_dim_for(row, 64)
        qkv = torch.randn(2, 37, 3, 3, head_dim).to(dtype)
        check(row, *qkv.unbind(2))
        heads_last = torch.randn(2, 37, 3, 3 * head_dim).to(dtype)  # one head's q, k, v together
        check(row, *heads_last.chunk(3, dim=-1))


def test_expanded_operands(row: op.KernelInfo | None) -> None:
    """Stride 0: one query for every sample (Wan2.2's CLIP pooling), one key head seen as many."""
    query, key, value = some(row, batch=3, seqlen_q=1, heads_q=2)
    check(row, query[:1].expand(3, -1, -1, -1), key, value)
    check(row, query, key[:, :, :1].expand(-1, -1, 2, -1), value[:, :, :1].expand(-1, -1, 2, -1))
    check(row, query, key[:, :1].expand(-1, 20, -1, -1), value[:, :20])


def test_batch_slices_and_odd_addresses(row: op.KernelInfo | None) -> None:
    """Views that begin where no vector load is aligned."""
    for dtype in row_dtypes(row):
        head_dim = calls.head_dim_for(row, 64)
        for shift in (1, 3):
            flat = torch.randn(shift + 3 * 2 * 21 * head_dim).to(dtype)[shift:]
            query, key, value = flat.view(3, 1, 21, 2, head_dim).unbind(0)
            check(row, query, key, value)
        whole = some(row, batch=5, dtype=dtype)
        check(row, *(x[1:4:2] for x in whole))


@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("seqlen_q", (11, 65), ids=("few", "many"))
def test_padding_is_never_used(row: op.KernelInfo | None, poison: float, seqlen_q: int) -> None:
    q_lens, k_lens = [seqlen_q, 9, 0, 3], [40, 13, 7, 0]
    for dtype in row_dtypes(row):
        for mask in ({}, {"is_causal": True}, {"window": (5, 3)}):
            clean = some(row, batch=4, seqlen_q=seqlen_q, seqlen_k=40, dtype=dtype)
            call: dict[str, Any] = {"q_lens": q_lens, "k_lens": k_lens, **mask}
            dirty: Any = [
                poisoned(x, n, poison) for x, n in zip(clean, (q_lens, k_lens, k_lens), strict=True)
            ]
            out, lse = check(row, *dirty, **call)
            want, want_lse = sdpa(*clean, row=row, return_lse=True, **call)
            assert torch.equal(out, want) and torch.equal(lse, want_lse)
            assert not out[2].any() and torch.isneginf(lse[2]).all()
            assert not out[3].any() and torch.isneginf(lse[3]).all()
            assert not out[1, 9:].any() and torch.isneginf(lse[1, :, 9:]).all()


def test_padding_of_whole_tiles(row: op.KernelInfo | None) -> None:
    """Lengths far below the padded ones: whole tiles must be left out, not only tails."""
    q_lens, k_lens = [1, 130, 64], [1, 65, 300]
    query, key, value = some(row, batch=3, seqlen_q=200, seqlen_k=300, heads_q=1)
    dirty = (poisoned(query, q_lens), poisoned(key, k_lens), poisoned(value, k_lens))
    check(row, *dirty, q_lens=q_lens, k_lens=k_lens)
    check(row, *dirty, q_lens=q_lens, k_lens=k_lens, is_causal=True)


def test_keys_outside_the_mask_are_never_used(row: op.KernelInfo | None, native: str) -> None:
    """NaN in a key that only some rows see reaches those rows and no other.

    More than the contract asks, and than torch can do, for which a masked NaN is 0 * NaN.
    """
    for dtype in row_dtypes(row):
        for mask in ({"is_causal": True}, {"window": (4, 2)}):
            for which in (1, 2):
                call = some(row, seqlen_q=40, seqlen_k=40, heads_q=4, heads_k=2, dtype=dtype)
                call[which][:, 21, 1] = math.nan  # the key head of query heads 2 and 3
                out, _ = check(row, *call, **mask)
                seen = torch.from_numpy(oracle.visible(40, 40, **mask))[:, 21, None]
                assert torch.equal(out[0, :, 2:].isnan().all(-1), seen.expand(-1, 2))
                assert torch.equal(out[0].isnan().any(-1).any(-1), seen[:, 0])
                assert not out[:, :, :2].isnan().any()


@FEW_AND_MANY
def test_real_nan_stays_visible(row: op.KernelInfo | None, seqlen_q: int) -> None:
    for dtype in row_dtypes(row):
        for which in range(3):
            at = min(11, seqlen_q - 1) if which == 0 else 11
            call = some(row, seqlen_q=seqlen_q, seqlen_k=70, dtype=dtype)
            call[which][0, at, 1, 0] = math.nan  # one element of one head
            out, _ = check(row, *call, k_lens=[66])
            assert out[:, :, 1].isnan().any(), f"operand {which}: the NaN got lost"
            assert not out[:, :, 0].isnan().any(), f"operand {which}: the other head saw it"
        call = some(row, seqlen_q=seqlen_q, seqlen_k=70, dtype=dtype)
        call[2][0, 11, 1, 0] = math.inf
        out, _ = check(row, *call)
        assert out[0, :, 1, 0].isposinf().all()


@pytest.mark.parametrize("hidden", ((0, 600), (600, 1200), (100, 133), (0, 1199)), ids=str)
@FEW_AND_MANY
def test_keys_whose_scores_are_minus_infinity(
    row: op.KernelInfo | None, hidden: tuple[int, int], seqlen_q: int
) -> None:
    """A key mask that travels in a channel of K, as people smuggle one: whole blocks weigh nothing,
    whichever come first."""
    for dtype in row_dtypes(row):
        query, key, value = some(row, seqlen_q=seqlen_q, seqlen_k=1200, dtype=dtype)
        query[..., 0], key[..., 0] = 1.0, 0.0
        key[:, hidden[0] : hidden[1], :, 0] = -math.inf
        out, lse = check(row, query, key, value)
        assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("bits", (0x7FC00001, 0x7FC0017F, 0x7FC001FF))
def test_any_nan_stays_visible(row: op.KernelInfo | None, bits: int) -> None:
    """A float32 NaN has 2^22 spellings; arithmetic on its bits must not make a number of one."""
    for which in range(3):
        call = some(row, seqlen_q=20, seqlen_k=70, dtype=row_dtypes(row)[0])
        if call[which].dtype != torch.float32:
            pytest.skip("this row takes no float32")
        call[which].view(torch.int32)[0, 11, 1, 0] = bits
        check(row, *call)


RAGGED: tuple[dict[str, Any], ...] = (
    {"q_lens": [40, 23, 1], "k_lens": [51, 51, 30]},  # longer than, as long as, shorter than
    {"q_lens": [5, 40, 33], "k_lens": [51, 2, 33]},
    {"q_lens": [0, 40, 7], "k_lens": [9, 0, 1]},
    {"k_lens": [51, 16, 17]},
    {"q_lens": [16, 17, 40]},
)
WINDOWS = ((-1, -1), (0, 0), (3, 0), (0, 3), (6, 2), (-1, 4), (4, -1), (33, 17), (2**62, 2**40))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_masks_with_ragged_lengths(
    row: op.KernelInfo | None, window: tuple[int, int], is_causal: bool
) -> None:
    for number, lens in enumerate(RAGGED):
        dtype = row_dtypes(row)[number % len(row_dtypes(row))]
        call = some(row, batch=3, seqlen_q=40, seqlen_k=51, heads_q=1, dtype=dtype)
        check(row, *call, **lens, window=window, is_causal=is_causal)


@pytest.mark.parametrize("window", ((0, 0), (64, 0), (20, 70), (100, -1)), ids=str)
def test_windows_over_many_tiles(row: op.KernelInfo | None, window: tuple[int, int]) -> None:
    check(row, *some(row, seqlen_q=200, seqlen_k=260, heads_q=1), window=window)
    check(row, *some(row, seqlen_q=260, seqlen_k=200, heads_q=1), window=window)


def test_rows_without_a_key(row: op.KernelInfo | None) -> None:
    """More queries than keys under a causal mask: the first rows see nothing."""
    for dtype in row_dtypes(row):
        call = some(row, seqlen_q=50, seqlen_k=20, dtype=dtype)
        for mask in ({"is_causal": True}, {"window": (-1, 0)}, {"window": (3, 0)}):
            out, lse = check(row, *call, **mask)
            assert not out[:, :30].any() and torch.isneginf(lse[:, :, :30]).all()
            assert out[:, 30:].any(-1).all() and lse[:, :, 30:].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_length_tensors(row: op.KernelInfo | None, dtype: torch.dtype) -> None:
    """Both integer types, any stride, views and empty ones; they are read, not written."""
    query, key, value = some(row, batch=2)
    want, _ = check(row, query, key, value, q_lens=[5, 17], k_lens=[33, 20])
    q_lens = torch.tensor([5, 99, 17, 99], dtype=dtype)[::2]
    k_lens = torch.tensor([[33, -1], [20, -1]], dtype=dtype)[:, 0]
    out, _ = sdpa(query, key, value, row=row, q_lens=q_lens, k_lens=k_lens)
    assert torch.equal(out, want)
    assert q_lens.tolist() == [5, 17] and k_lens.tolist() == [33, 20]
    same = torch.tensor(20, dtype=dtype).expand(2)
    out, _ = sdpa(query, key, value, row=row, k_lens=same)
    assert torch.equal(out, check(row, query, key, value, k_lens=[20, 20])[0])
    none = torch.zeros(0, dtype=dtype)
    sdpa(query[:0], key[:0], value[:0], row=row, q_lens=none, k_lens=none)


@pytest.mark.parametrize("scale", (-0.3, 0.0, 1e-3, 0.125, 1.0, 40.0))
@FEW_AND_MANY
def test_any_scale_is_exact(row: op.KernelInfo | None, scale: float, seqlen_q: int) -> None:
    for dtype in row_dtypes(row):
        call = some(row, seqlen_q=seqlen_q, seqlen_k=70, dtype=dtype)
        check(row, *call, scale=scale)
        check(row, *call, scale=scale, is_causal=True, k_lens=[20])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("scale", (1e39, -1e300))
@FEW_AND_MANY
def test_scales_beyond_float32(row: op.KernelInfo | None, scale: float, seqlen_q: int) -> None:
    """Infinity times a score of 0 would be NaN."""
    for dtype in row_dtypes(row):
        query, key, value = some(row, seqlen_q=seqlen_q, seqlen_k=70, dtype=dtype)
        out, want = (sdpa(query * 0, key, value, row=row, scale=x)[0] for x in (scale, 0.0))
        assert torch.equal(out, want)


def test_scale_defaults_to_one_over_the_root_of_head_dim(row: op.KernelInfo | None) -> None:
    query, key, value = some(row, head_dim=80)
    by_default, _ = sdpa(query, key, value, row=row)
    explicit, _ = sdpa(query, key, value, row=row, scale=query.shape[3] ** -0.5)
    assert torch.equal(by_default, explicit)


@pytest.mark.parametrize("peaky", (4.0, 30.0, 300.0))
def test_peaky_scores(row: op.KernelInfo | None, peaky: float) -> None:
    """One key takes all the weight, and the running maximum jumps from tile to tile."""
    for dtype in row_dtypes(row):
        check(row, *some(row, seqlen_q=40, seqlen_k=150, dtype=dtype, peaky=peaky))
    query, key, value = some(row, seqlen_q=40, seqlen_k=200)
    rising = torch.linspace(0, 3, 200).view(1, 200, 1, 1)
    check(row, query.abs(), (key.abs() * rising).to(key.dtype), value)
    check(row, query.abs(), (key.abs() * rising.flip(1)).to(key.dtype), value)


@FEW_AND_MANY
def test_one_key_gives_exactly_its_value(row: op.KernelInfo | None, seqlen_q: int) -> None:
    for dtype in row_dtypes(row):
        query, key, value = some(row, seqlen_q=seqlen_q, seqlen_k=1, dtype=dtype, peaky=20.0)
        out, _ = sdpa(query, key, value, row=row)
        assert torch.equal(out, value.expand_as(out))


@FEW_AND_MANY
def test_large_common_offset(row: op.KernelInfo | None, seqlen_q: int) -> None:
    """Scores around 500: exp without the maximum taken off would overflow; lse must carry it."""
    head_dim = calls.head_dim_for(row, 64)
    for dtype in row_dtypes(row):
        query, key, value = some(row, dtype=dtype, seqlen_q=seqlen_q, seqlen_k=90)
        query[..., 0], key[..., 0] = 64.0, 64.0
        _, lse = check(row, query, key, value)
        assert (lse > 0.5 * 4096 * head_dim**-0.5).all()
        query[..., 0] = -64.0
        check(row, query, key, value)


def test_lse_costs_no_bit_of_out(row: op.KernelInfo | None) -> None:
    call = some(row, seqlen_q=40, seqlen_k=70, heads_q=4, heads_k=2)
    with_lse, lse = sdpa(*call, row=row, return_lse=True)
    without, empty = sdpa(*call, row=row)
    assert torch.equal(with_lse, without)
    assert lse.shape == (1, 4, 40) and lse.dtype == F32
    assert empty.shape == (0, 4, 40) and empty.dtype == F32


def test_every_element_of_out_is_written(row: op.KernelInfo | None) -> None:
    """The allocator hands back memory full of NaN; rows without a key must still be zeros."""
    for dtype in row_dtypes(row):
        call = some(row, batch=2, seqlen_q=64, seqlen_k=16, heads_q=1, dtype=dtype)
        for _ in range(3):
            del_me = [torch.full(call[0].shape, math.nan, dtype=call[0].dtype) for _ in range(4)]
            del del_me
            out, _ = sdpa(*call, row=row, q_lens=[3, 60], k_lens=[16, 0], is_causal=True)
            assert not out.isnan().any() and not out[0, 3:].any() and not out[1].any()


def test_two_runs_give_the_same_bits(row: op.KernelInfo | None) -> None:
    for dtype in row_dtypes(row):
        call = some(row, batch=2, seqlen_q=130, seqlen_k=150, dtype=dtype)
        first = sdpa(*call, row=row, k_lens=[150, 77], return_lse=True)
        for _ in range(3):
            again = sdpa(*call, row=row, k_lens=[150, 77], return_lse=True)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_any_number_of_threads_gives_the_same_bits(
    row: op.KernelInfo | None, native: str, threads: None
) -> None:
    call = some(row, batch=2, seqlen_q=70, seqlen_k=90, heads_q=4, heads_k=2)
    torch.set_num_threads(1)
    alone = check(row, *call, k_lens=[90, 41])
    for number in range(2, 9):
        torch.set_num_threads(number)
        together = sdpa(*call, row=row, k_lens=[90, 41], return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), number


def test_a_sample_does_not_depend_on_its_batch(row: op.KernelInfo | None, native: str) -> None:
    query, key, value = some(row, batch=3, seqlen_q=40, seqlen_k=70, heads_q=4)
    out, lse = sdpa(query, key, value, row=row, k_lens=[70, 9, 33], return_lse=True)
    for b, length in enumerate((70, 9, 33)):
        part = slice(b, b + 1)
        alone, alone_lse = sdpa(
            query[part], key[part], value[part], row=row, k_lens=[length], return_lse=True
        )
        assert torch.equal(out[part], alone) and torch.equal(lse[part], alone_lse)
        head, _ = sdpa(
            query[part, :, 2:3], key[part, :length, 2:3], value[part, :length, 2:3], row=row
        )
        assert torch.equal(out[part, :, 2:3], head)


@pytest.mark.parametrize("dim", (0, 1, 2), ids=("batch", "row", "head"))
@FEW_AND_MANY
def test_offsets_beyond_two_to_the_31(row: op.KernelInfo | None, dim: int, seqlen_q: int) -> None:
    """Each operand's last element lies over 2^31 elements from its first.

    The memory is reserved, not used. Views begin 2^31 elements into it, so that an offset that has
    wrapped to a negative one reads zeros instead of crashing.
    """
    head_dim = calls.head_dim_for(row, 8)
    dtype = F16 if F16 in row_dtypes(row) else row_dtypes(row)[0]
    if row and row.device != "cpu":
        pytest.skip("reserving without using is possible on the CPU only")
    memory = calls.reserve(2**32 + 2**16, dtype)
    if memory is None:
        pytest.skip("this system does not lend address space without memory behind it")
    shape = [2, seqlen_q, 2, head_dim]
    stride = [2 * seqlen_q * head_dim, 2 * head_dim, head_dim, 1]
    stride[dim] = 2**31 // (shape[dim] - 1) + head_dim
    views = []
    for number in range(3):
        view = memory.as_strided(shape, stride, 2**31 + 2**14 * number)
        view.copy_(torch.randn(shape))
        views.append(view)
    check(row, *views)


def test_sizes_whose_products_overflow(row: op.KernelInfo | None, native: str) -> None:
    """An expanded tensor may have any size; its workspace once came out small and was overrun."""
    one = torch.zeros(1, 1, 1, 1, dtype=row_dtypes(row)[0])
    for seqlen_k in (512298381738950656, 2**48 + 1, 2**63 - 1):
        key = one.expand(1, seqlen_k, 1, 1)
        with pytest.raises(RuntimeError, match=r"key must have at most 2\^48 elements"):
            sdpa(one, key, key, row=row, k_lens=[5])
    with pytest.raises(RuntimeError, match=r"query must have at most 2\^48 elements"):
        sdpa(one.expand(1, 2**40, 2**9, 1), one, one, row=row)


@FEW_AND_MANY
def test_rows_of_long_sequences(row: op.KernelInfo | None, seqlen_q: int) -> None:
    """Many tiles of keys: errors must not grow with the number of blocks."""
    for dtype in row_dtypes(row):
        query, key, value = some(row, seqlen_q=seqlen_q, seqlen_k=4099, heads_q=1, dtype=dtype)
        check(row, query, key, value)
        check(row, query, key, value + 1)  # a mean of 1: rounding of the sum shows


def test_the_best_row_is_chosen_unless_one_is_forced(row: op.KernelInfo | None) -> None:
    call = some(row)
    by_default, _ = sdpa(*call)
    assert_close_to_oracle(by_default, *call)
    if row is not None and row == ROWS[0] and not row.is_lossy:
        forced, _ = sdpa(*call, row=row)
        assert torch.equal(by_default, forced)


def test_bf16_is_not_computed_with_bf16_sums(row: op.KernelInfo | None) -> None:
    """512 keys of weight 1/512 each: a sum kept in half precision stops growing long before."""
    for dtype in (F16, BF16):
        if dtype in calls.dtypes_for(row):
            query, key, value = some(row, seqlen_q=3, seqlen_k=2048, heads_q=1, dtype=dtype)
            out, _ = check(row, query * 0, key, torch.ones_like(value))
            assert torch.equal(out, torch.ones_like(out))
