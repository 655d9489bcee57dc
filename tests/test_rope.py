# SPDX-License-Identifier: Apache-2.0
"""test_rope.py - torch.ops.wan_attn.rms_norm_rope: every row against float64, and against stock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rope_oracle
import wan_attn
from wan_attn.native import bindings, library, rope, rope_in_torch
from wan_attn.native.rope_call import RopeCall

assert wan_attn  # registers the op

OP = torch.ops.wan_attn.rms_norm_rope
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Grids of one batch: one frame; odd sizes; different ones, with a tail behind the shorter.
GRIDS: dict[str, list[list[int]]] = {
    "one_frame": [[1, 5, 7]],
    "odd": [[3, 3, 5]],
    "ragged": [[2, 3, 4], [3, 5, 2], [0, 4, 4]],
    "121_frames": [[31, 2, 3]],
}
SHAPES = ((12, 128), (24, 64), (40, 128), (3, 84), (2, 36), (5, 10), (1, 2))


def rows() -> Iterator[tuple[str, int]]:
    """The rows that this CPU can run, by name; -1 chooses."""
    for index, name in enumerate(rope.kernels()):
        if rope.why_not(torch.device("cpu"), index) is None:
            yield name, index


ROWS = dict(rows()) if library.load() is not None else {}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{
        f"{name}": (lambda *a, _k=index, **o: OP(*a, kernel=_k, **o))
        for name, index in ROWS.items()
    },
    "torch": lambda *a, **o: rope_in_torch.compute(RopeCall(*a, **o)),
}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def half_ulp(dtype: torch.dtype, largest: float) -> float:
    return 2.0 ** math.floor(math.log2(largest)) * torch.finfo(dtype).eps / 2


def grid_tensor(grids: list[list[int]]) -> Tensor:
    return torch.tensor(grids)


@each_function
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("heads,head_dim", SHAPES)
def test_rotation_alone_has_the_bits_of_stock(
    function: Callable[..., Tensor], grids: list[list[int]], heads: int, head_dim: int
) -> None:
    seqlen = max(math.prod(g) for g in grids) + 2
    table = rope_oracle.table(1024, head_dim)
    for dtype, out_dtype in itertools.product(FLOATS, FLOATS):
        x = torch.randn(len(grids), seqlen, heads, head_dim).to(dtype)
        expected = rope_oracle.stock(x, grids=grids).to(out_dtype)
        assert torch.equal(function(x, None, table, grid_tensor(grids), dtype=out_dtype), expected)


@each_function
@pytest.mark.parametrize("heads,head_dim", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_at_most_stocks_and_half_an_ulp(
    function: Callable[..., Tensor], heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    for (name, grids), weight_dtype in zip(
        GRIDS.items(), (torch.float32, dtype, None, dtype), strict=True
    ):
        seqlen = max(math.prod(g) for g in grids) + 2
        x = (3 * torch.randn(len(grids), seqlen, heads, head_dim)).to(dtype)
        weight = None
        if weight_dtype is not None:
            weight = (torch.rand(heads * head_dim) + 0.5).to(weight_dtype)
        exact = rope_oracle.exact(x, weight, grids, eps=1e-6)
        for out_dtype in FLOATS:
            table, where = rope_oracle.table(1024, head_dim), grid_tensor(grids)
            stock = rope_oracle.stock(x, weight, grids, eps=1e-6).to(out_dtype)
            allowed = half_ulp(out_dtype, exact.abs().max().item())
            allowed += (stock.double() - exact).abs().max().item()
            for rounds in (True, False):
                options: dict[str, Any] = {"eps": 1e-6, "dtype": out_dtype, "round_norm": rounds}
                out = function(x, weight, table, where, **options)
                error = (out.double() - exact).abs()
                assert error.max().item() <= allowed, (name, out_dtype, rounds)


@each_function
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_rounding_the_norm_is_what_stock_does(
    function: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """With it nearly every element has stock's bits; without it the error is smaller."""
    x = torch.randn(1, 60, 12, 128).to(dtype)
    weight, grids = (torch.rand(12 * 128) + 0.5).to(dtype), [[3, 4, 5]]
    table, where = rope_oracle.table(64, 128), grid_tensor(grids)
    exact = rope_oracle.exact(x, weight, grids, eps=1e-6)
    stock = rope_oracle.stock(x, weight, grids, eps=1e-6)
    options: dict[str, Any] = {"eps": 1e-6, "dtype": torch.float32}
    as_stock = function(x, weight, table, where, **options)
    once = function(x, weight, table, where, round_norm=False, **options)
    assert (as_stock == stock).float().mean() > 0.99
    assert (once.double() - exact).abs().mean() < 0.01 * (stock.double() - exact).abs().mean()


@each_function
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("per_head", (False, True))
def test_norm_alone(function: Callable[..., Tensor], dtype: torch.dtype, per_head: bool) -> None:
    for heads, head_dim in ((1, 1), (3, 5), (12, 128), (2, 256)):
        x = torch.randn(2, 5, heads, head_dim).to(dtype)
        weight = torch.rand(head_dim if per_head else heads * head_dim) + 0.5
        exact = rope_oracle.exact(x, weight, eps=1e-5, per_head=per_head)
        out = function(
            x, weight, eps=1e-5, per_head=per_head, round_norm=False, dtype=torch.float32
        )
        torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-7)


@each_function
def test_special_values_stay_in_their_rows(function: Callable[..., Tensor]) -> None:
    x = torch.randn(1, 12, 3, 36)
    clean = x.clone()
    x[0, 3], x[0, 10, 1, 5], x[0, 11, 2, 7] = math.nan, math.inf, math.nan
    table, where = rope_oracle.table(16, 36), torch.tensor([[2, 2, 2]])
    out = function(x, None, table, where)
    assert out[0, 3].isnan().all()
    assert torch.equal(out[0, 8:].nan_to_num(7.0), x[0, 8:].nan_to_num(7.0)), "the tail is copied"
    expected = function(clean, None, table, where)
    others = [s for s in range(8) if s != 3]
    assert torch.equal(out[0, others], expected[0, others])
    normed = function(x, None, table, where, eps=1e-6)
    assert normed[0, 3].isnan().all() and normed[0, others].isfinite().all()


@each_function
def test_a_part_is_the_same_as_the_part_of_the_whole(function: Callable[..., Tensor]) -> None:
    """Two processes of a sequence-parallel run: each has its rows, and an offset."""
    x, grids = torch.randn(2, 64, 4, 24), torch.tensor([[3, 4, 5], [2, 5, 3]], dtype=torch.int32)
    table, weight = rope_oracle.table(8, 24), torch.rand(96)
    whole = function(x, weight, table, grids, eps=1e-6)
    for first in (0, 20, 32, 61):
        part = function(x[:, first:], weight, table, grids, eps=1e-6, seqlen_offset=first)
        assert torch.equal(part, whole[:, first:])
    far = function(x, None, table, grids, seqlen_offset=1 << 40)
    assert torch.equal(far, x)


def views(x: Tensor) -> Iterator[Tensor]:
    """The same numbers in other strides."""
    batch, seqlen, heads, head_dim = x.shape
    fused = torch.full((batch, seqlen, 3, heads, head_dim), math.nan, dtype=x.dtype)
    fused[:, :, 1] = x
    yield fused[:, :, 1]
    yield x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((batch, seqlen, heads, head_dim + 3), math.nan, dtype=x.dtype)
    wide[..., 1:-2] = x
    yield wide[..., 1:-2]
    yield (
        x.flip(1)
        .contiguous()
        .as_strided(x.shape, (x.stride(0), x.stride(1), x.stride(2), 1))
        .flip(1)
    )


@each_function
def test_strides_do_not_matter(function: Callable[..., Tensor]) -> None:
    x, grids = torch.randn(2, 9, 3, 20).bfloat16(), torch.tensor([[1, 3, 3], [2, 2, 2]])
    table, weight = rope_oracle.table(4, 20), torch.rand(60)
    expected = function(x, weight, table, grids, eps=1e-6)
    for view in views(x):
        assert torch.equal(view, x)
        assert torch.equal(function(view, weight, table, grids, eps=1e-6), expected)
    one = function(x[:1].expand(2, -1, -1, -1), weight, table, grids[:1].expand(2, 3), eps=1e-6)
    assert torch.equal(one[0], expected[0]) and torch.equal(one[1], expected[0])
    spread = torch.full((4, 45), math.nan, dtype=torch.float64)
    spread[:, 2:22] = table
    assert torch.equal(function(x, weight, spread[:, 2:22], grids, eps=1e-6), expected)


@each_function
def test_a_table_of_each_token(function: Callable[..., Tensor]) -> None:
    """As s2v has it, and diffusers: for all heads alike, or for each its own."""
    x, table = torch.randn(2, 9, 3, 20), rope_oracle.table(9, 20)
    grids = torch.tensor([[9, 1, 1], [9, 1, 1]])
    angles = torch.randn(2, 9, 3, 10)
    own = torch.stack((angles.cos(), angles.sin()), -1).flatten(-2)
    turned = torch.view_as_complex(x.double().unflatten(-1, (10, 2)))
    turned = torch.view_as_real(turned * torch.view_as_complex(own.double().unflatten(-1, (10, 2))))
    assert torch.equal(function(x, None, own), turned.flatten(-2).float())
    alike = own[:, :, :1].expand_as(own)
    assert torch.equal(function(x, None, alike), function(x, None, alike.contiguous()))
    table[:, 8:] = torch.tensor([1.0, 0.0]).repeat(6)
    each = table[None, :, None].expand(2, 9, 3, 20)
    assert torch.equal(function(x, None, each), function(x, None, table, grids))


@each_function
def test_nothing_in_nothing_out(function: Callable[..., Tensor]) -> None:
    table = rope_oracle.table(4, 8)
    for shape in ((0, 3, 2, 8), (2, 0, 2, 8)):
        grids = torch.ones(shape[0], 3, dtype=torch.int64)
        assert function(torch.zeros(shape), None, table, grids, eps=0.1).shape == shape


def test_threads_do_not_change_the_bits(native: str) -> None:
    x, grids = torch.randn(2, 100, 3, 64), torch.tensor([[4, 5, 5], [3, 5, 5]])
    table, before = rope_oracle.table(8, 64), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(OP(x, torch.ones(192), table, grids, eps=1e-6))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_same_bits_through_ctypes(native: str) -> None:
    x, grids = torch.randn(2, 30, 3, 64).half(), torch.tensor([[2, 3, 5], [1, 5, 5]])
    table, weight = rope_oracle.table(8, 64).float(), torch.rand(192)
    options: dict[str, Any] = {"eps": 1e-6, "seqlen_offset": 3, "dtype": torch.bfloat16}
    ours, other = (
        OP(x, weight, table, grids, **options),
        rope.by_ctypes(x, weight, table, grids, **options),
    )
    assert ours.dtype == other.dtype == torch.bfloat16
    assert torch.equal(ours, other)


def in_c(x: Tensor, out: Tensor, /, **changed: Any) -> tuple[int, str]:
    """The C function itself: its status and message."""
    params = rope._params(RopeCall(x, eps=1e-6))
    params.out = bindings.describe(out)
    for name, value in changed.items():
        setattr(params, name, value)
    error = library.Error()
    status = library.lib().wan_attn_rms_norm_rope(params, None, error)
    return status, error.text()


@pytest.mark.parametrize("index", ROWS.values(), ids=ROWS)
def test_in_place(index: int) -> None:
    for dtype in FLOATS:
        x = torch.randn(2, 20, 3, 20).to(dtype)
        expected = OP(x, eps=1e-6, kernel=index)
        view = torch.zeros(2, 20, 4, 20, dtype=dtype)[:, :, 1:]
        view.copy_(x)
        assert in_c(view, view, kernel=index) == (library.OK, "")
        assert torch.equal(view, expected)


def test_memory_is_looked_at_before_anything_is_written(native: str) -> None:
    x = torch.randn(1, 4, 2, 8)
    both = torch.zeros(1, 5, 2, 8)
    assert in_c(both[:, :-1], both[:, 1:])[1].startswith("out must be x itself or share no memory")
    half = x.view(torch.bfloat16)[..., :8]
    assert in_c(x, half)[1].startswith("out must be x itself or share no memory with x")
    assert in_c(x, x[:, :1].expand(1, 4, 2, 8))[1].startswith("out must have each element in a")
    assert in_c(x, torch.zeros(4))[1].startswith("out must be [batch, seqlen, heads, head_dim]")
    assert in_c(x, torch.zeros(1, 4, 2, 6))[1].startswith("out must be shaped like x")
    assert in_c(x, x, struct_size=8)[1].startswith("params.struct_size must be")
    odd = bindings.describe(x)
    odd.data += 1
    assert "multiple of its element's 4 bytes" in in_c(x, torch.zeros_like(x), x=odd)[1]
    odd.data = 0
    assert in_c(x, torch.zeros_like(x), x=odd)[1] == "x must point to memory, got NULL"
    weight = bindings.describe(both.flatten()[:16])
    assert in_c(x, both[:, :4], weight=weight)[1].startswith("out must share no memory with weight")
    error = library.Error()
    assert library.lib().wan_attn_rms_norm_rope(None, None, error) == library.INVALID_ARGUMENT
    assert error.text() == "params must be a pointer, got NULL"
    # A stride that is never walked along may be any number.
    odd = bindings.describe(x)
    odd.stride[0] = -(1 << 63)
    out = torch.zeros_like(x)
    assert in_c(x, out, x=odd) == (library.OK, "")
    assert torch.equal(out, OP(x, eps=1e-6))
