# SPDX-License-Identifier: Apache-2.0
"""cases_rope.py - calls of the CUDA kernels of rms_norm_rope, and what they have to give.

Shared by the emulated sources and the executed PTX. A result is held against float64: its error may
be the one of stock Wan2.2's steps, and half a unit in the last place of the result's dtype. With so
few tokens stock's factor of the norm may be exact by luck: half a float32's unit more for that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import rope_oracle

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Whole 16-byte pieces, and everything else. Slots 1 to 32, powers of two or not.
VECTOR_SIZES = (8, 16, 24, 40, 64, 72, 80, 96, 128, 256)
ANY_SIZES = (1, 2, 3, 5, 8, 10, 20, 36, 63, 66, 84, 100, 128, 255, 256)
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        grids: of each sample; (): no rotation by a grid.
        seqlen: tokens of x.
        table: "grid", "token" (one for all heads of a token), "head", or "none".
        weight: its dtype; None: there is none.
        layout: of x: "dense", "fused" (a part of q, k, v), "heads first", "odd" (nothing aligned),
            "backwards".
        out_layout: the same of out; "in place": out is x.
        size: of the elements of x.
    """

    heads: int = 3
    head_dim: int = 64
    seqlen: int = 5
    batch: int = 1
    grids: tuple[Grid, ...] = ()
    table: str = "none"
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype = torch.bfloat16
    eps: float | None = 1e-6
    weight: torch.dtype | None = torch.float32
    per_head: bool = False
    round_norm: bool = True
    seqlen_offset: int = 0
    table_dtype: torch.dtype = torch.float64
    grid_dtype: torch.dtype = torch.int64
    grid_on_device: bool = False
    layout: str = "dense"
    out_layout: str = "dense"
    size: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        said = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return " ".join(f"{name}={value}" for name, value, usual in said if value != usual)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in these strides, with NaN in between."""
    batch, seqlen, heads, head_dim = x.shape
    if layout == "fused":
        store = torch.full((batch, seqlen, 3, heads, head_dim), math.nan, dtype=x.dtype)
        view = store[:, :, 1]
    elif layout == "heads first":
        view = torch.empty(batch, heads, seqlen, head_dim, dtype=x.dtype).transpose(1, 2)
    elif layout == "odd":
        store = torch.full((batch, seqlen, heads, head_dim + 3), math.nan, dtype=x.dtype)
        view = store[..., 1:-2]
    elif layout == "backwards":
        store = torch.empty(x.numel(), dtype=x.dtype)
        # torch has no negative strides: rows in a store whose samples overlap in the heads.
        view = store.view(seqlen, batch, heads, head_dim).transpose(0, 1)
    else:
        view = torch.empty_like(x, memory_format=torch.contiguous_format)
    return view.copy_(x)


@dataclass
class Operands:
    x: Tensor
    weight: Tensor | None
    table: Tensor | None
    grid_sizes: Tensor | None
    out: Tensor | None

    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.table, self.grid_sizes


def operands(case: Case) -> Operands:
    draw = torch.Generator().manual_seed(case.seed * 7919 + case.heads * 31 + case.head_dim)
    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    x = (case.size * torch.randn(shape, generator=draw)).to(case.dtype)
    weight = None
    if case.weight is not None:
        count = case.head_dim * (1 if case.per_head else case.heads)
        weight = (torch.rand(count, generator=draw) + 0.5).to(case.weight)
    table = grid_sizes = None
    if case.table == "grid":
        most = max(1, *(n for grid in case.grids for n in grid)) + 1
        wide = torch.full((most, case.head_dim + 6), math.nan, dtype=case.table_dtype)
        wide[:, 3:-3] = rope_oracle.table(most, case.head_dim).to(case.table_dtype)
        table = wide[:, 3:-3]
        grid_sizes = torch.tensor(case.grids, dtype=case.grid_dtype)
        if case.grid_on_device:  # with strides of their own
            grid_sizes = grid_sizes.t().contiguous().t()
    elif case.table != "none":
        heads = case.heads if case.table == "head" else 1
        angles = torch.randn(*shape[:2], heads, case.head_dim // 2, generator=draw).double()
        own = torch.stack((angles.cos(), angles.sin()), -1).flatten(-2).to(case.table_dtype)
        table = own.expand(shape)
    out = None
    if case.out_layout != "in place":
        out = laid_out(torch.full(shape, math.nan, dtype=case.out_dtype), case.out_layout)
    return Operands(laid_out(x, case.layout), weight, table, grid_sizes, out)


def _turned(y: Tensor, case: Case, table: Tensor) -> Tensor:
    """y turned by each token's own angles, in float64."""
    pairs = torch.view_as_complex(y.double().unflatten(-1, (-1, 2)).contiguous())
    angles = torch.view_as_complex(table.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles).flatten(-2)


def exact(case: Case, given: Operands) -> Tensor:
    """In float64, nothing rounded on the way; angles as the table has them."""
    norm: dict[str, Any] = {"eps": case.eps, "per_head": case.per_head}
    if case.table == "grid" and case.table_dtype == torch.float64:
        return rope_oracle.exact(
            given.x, given.weight, case.grids, seqlen_offset=case.seqlen_offset, **norm
        )
    y = rope_oracle.exact(given.x, given.weight, **norm)
    if given.table is None:
        return y
    if case.table != "grid":
        return _turned(y, case, given.table)
    for b, grid in enumerate(case.grids):
        count = max(0, min(case.seqlen, math.prod(grid) - case.seqlen_offset))
        rows = [_row(given.table, grid, case.seqlen_offset + s) for s in range(count)]
        if rows:
            y[b, :count] = _turned(y[b, :count], case, torch.stack(rows)[:, None])
    return y


def _row(table: Tensor, grid: Grid, t: int) -> Tensor:
    frame, line, column = rope_oracle.axis_pairs(table.shape[1])
    places = (t // (grid[1] * grid[2]), t // grid[2] % grid[1], t % grid[2])
    parts = table.split([2 * frame, 2 * line, 2 * column], dim=1)
    return torch.cat([part[place] for part, place in zip(parts, places, strict=True)])


def stock_error(case: Case, given: Operands, truth: Tensor) -> float:
    """The largest error of stock's norm, float64 rotation and rounding to the out dtype."""
    x, dtype = given.x, case.dtype
    y = x.float()
    if case.eps is not None:
        dims = (-1,) if case.per_head else (-2, -1)
        y = y * torch.rsqrt(y.pow(2).mean(dim=dims, keepdim=True) + case.eps)
        y = y.to(dtype) if case.round_norm else y
        if given.weight is not None:
            weight = given.weight
            y = y * (weight if case.per_head else weight.unflatten(0, x.shape[2:]))
    # From here on nothing but the last two roundings: what is left is the error of y, turned.
    plain = replace(case, eps=None, weight=None)
    turned = exact(plain, replace_x(given, y))
    return float((turned.float().to(case.out_dtype).double() - truth).abs().nan_to_num().max())


def replace_x(given: Operands, x: Tensor) -> Operands:
    return Operands(x, None, given.table, given.grid_sizes, None)


def half_ulp(dtype: torch.dtype, largest: float) -> float:
    least = torch.finfo(dtype).smallest_normal
    return 2.0 ** math.floor(math.log2(max(largest, least))) * torch.finfo(dtype).eps / 2


def check(case: Case, run: Callable[..., Tensor]) -> None:
    """Runs the case and holds it against float64.

    Args:
        run: run_rope.run, or a function with its arguments.
    """
    given = operands(case)
    out = run(
        *given.inputs(),
        eps=case.eps,
        per_head=case.per_head,
        round_norm=case.round_norm,
        seqlen_offset=case.seqlen_offset,
        grid_on_device=case.grid_on_device,
        out=given.out,
        in_place=case.out_layout == "in place",
    )
    truth = exact(case, given)
    assert not out.isnan().any(), f"[{case}]: an element was not written, or is NaN"
    error = (out.double() - truth).abs().max().item()
    largest = truth.abs().max().item()
    allowed = stock_error(case, given, truth) + half_ulp(case.out_dtype, largest)
    allowed += half_ulp(torch.float32, largest) if case.eps is not None else 0.0
    assert error <= allowed, f"[{case}]: off by {error:.3e}, allowed are {allowed:.3e}"


def by_hand() -> Iterator[Case]:
    """Each feature by itself, and the shapes of Wan2.2; both kernels take them."""
    grids: tuple[tuple[Grid, ...], ...] = (
        ((1, 1, 5),), ((1, 2, 2), (2, 1, 3)), ((0, 4, 4), (2, 2, 1)), ((5, 1, 1),)
    )  # fmt: skip
    turn = Case(grids=((2, 2, 1),), table="grid")
    for heads, head_dim in ((12, 128), (24, 128), (40, 128), (24, 64), (1, 256)):
        yield replace(turn, heads=heads, head_dim=head_dim, seqlen=3)
    for dtype in FLOATS:
        for out_dtype in FLOATS:
            yield replace(turn, dtype=dtype, out_dtype=out_dtype, weight=dtype)
            yield replace(turn, dtype=dtype, out_dtype=out_dtype, round_norm=False)
            yield replace(turn, dtype=dtype, out_dtype=out_dtype, eps=None, weight=None)
        yield Case(dtype=dtype, out_dtype=torch.float32, weight=torch.float16, per_head=True)
        yield Case(dtype=dtype, out_dtype=dtype, eps=None, weight=None)
        yield replace(turn, dtype=dtype, out_dtype=dtype, out_layout="in place")
    for of_samples in grids:
        batch = len(of_samples)
        yield replace(turn, grids=of_samples, batch=batch, grid_on_device=True)
        yield replace(turn, grids=of_samples, batch=batch, grid_dtype=torch.int32)
        yield replace(
            turn, grids=of_samples, batch=batch, grid_on_device=True, grid_dtype=torch.int32
        )
    for offset in (1, 3, 4, 1 << 30):
        yield replace(turn, seqlen_offset=offset)
    for table_dtype in (torch.float32, torch.float64):
        yield Case(table="token", table_dtype=table_dtype, batch=2)
        yield replace(turn, table_dtype=table_dtype, out_dtype=torch.float32)
    for size in (1e-18, 1e-8, 1e15):
        yield replace(turn, dtype=torch.float32, out_dtype=torch.float32, size=size)
        yield Case(dtype=torch.float32, out_dtype=torch.bfloat16, size=size, per_head=True)
    for layout in ("fused", "heads first", "backwards"):
        yield replace(turn, layout=layout, batch=2, grids=((2, 2, 1), (1, 1, 3)))
        yield replace(turn, out_layout=layout, batch=2, grids=((2, 2, 1), (1, 1, 3)))


def for_any_alone() -> Iterator[Case]:
    """What rope.cuh does not take."""
    turn = Case(grids=((2, 2, 1),), table="grid")
    for head_dim in ANY_SIZES:
        yield Case(head_dim=head_dim, seqlen=2)
        yield Case(head_dim=head_dim, seqlen=2, per_head=True, dtype=torch.float32)
        if head_dim % 2 == 0:
            yield replace(turn, head_dim=head_dim, out_dtype=torch.float32)
    for dtype in FLOATS:
        yield replace(turn, dtype=dtype, layout="odd", head_dim=36)
        yield replace(turn, dtype=dtype, out_layout="odd", out_dtype=dtype)
        yield Case(table="head", dtype=dtype, table_dtype=torch.float32, eps=None, weight=None)
        yield Case(table="head", dtype=dtype, heads=5)
    yield replace(turn, heads=70, head_dim=256, seqlen=1)


def by_chance(count: int, seed: int, vectors: bool) -> Iterator[Case]:
    """Calls that rope.cuh takes, or (vectors False) any."""
    pick = random.Random(f"{seed} {vectors}")
    for number in range(count):
        head_dim = pick.choice(VECTOR_SIZES if vectors else ANY_SIZES)
        batch = pick.choice((1, 1, 2, 3))
        per_head = pick.random() < 0.25 and (head_dim & (head_dim - 1) == 0 or not vectors)
        tables = ["grid", "grid", "token", "none"] + ([] if vectors else ["head"])
        table = pick.choice(tables) if head_dim % 2 == 0 else "none"
        has_norm = pick.random() < 0.8 or table == "none"
        dtype = pick.choice(FLOATS)
        layouts = ["dense", "fused", "heads first", "backwards"] + ([] if vectors else ["odd"])
        in_place = pick.random() < 0.15
        yield Case(
            heads=pick.choice((1, 2, 3, 4, 5, 7, 12, 13)),
            head_dim=head_dim,
            seqlen=pick.choice((1, 2, 4, 7)),
            batch=batch,
            grids=tuple(
                (pick.randint(0, 3), pick.randint(1, 3), pick.randint(1, 3)) for _ in range(batch)
            ),
            table=table,
            dtype=dtype,
            out_dtype=dtype if in_place else pick.choice(FLOATS),
            eps=pick.choice((1e-6, 1e-5, 0.0)) if has_norm else None,
            weight=pick.choice((None, dtype, *FLOATS)) if has_norm else None,
            per_head=per_head,
            round_norm=pick.random() < 0.7,
            seqlen_offset=pick.choice((0, 0, 1, 5)) if table == "grid" else 0,
            table_dtype=pick.choice((torch.float32, torch.float64, torch.float64)),
            grid_dtype=pick.choice((torch.int32, torch.int64)),
            grid_on_device=pick.random() < 0.5,
            layout=pick.choice(layouts),
            out_layout="in place" if in_place else pick.choice(layouts),
            size=pick.choice((1.0, 1.0, 3.0, 0.01)),
            seed=1000 * seed + number,
        )


def check_rounded_once(run: Callable[..., Tensor]) -> None:
    """A float32 result is the rounded exact one, which differences of nearly equal products make
    hard; the allowed excess over half a unit in the last place is what two floats cannot hold of
    the products."""
    x = torch.randn(1, 16, 4, 128)
    angles = torch.atan2(x[..., 0::2], x[..., 1::2]).double()  # x cos - y sin nearly vanishes
    angles += 1e-3 * torch.randn(angles.shape).double()
    own = torch.stack((angles[:, :, :1].cos(), angles[:, :, :1].sin()), -1).flatten(-2)
    table = own.expand(x.shape)
    truth = _turned(x, Case(), table)
    out = run(x, None, table)
    unit = torch.exp2(torch.floor(torch.log2(truth.abs()))) * 2.0**-23
    off = (out.double() - truth).abs()
    assert (off <= 0.51 * unit + 2.0**-46 * x.abs().max()).all(), "not rounded once"


def check_as_stock(run: Callable[..., Tensor]) -> None:
    """With the norm rounded nearly every element has stock's bits."""
    x = torch.randn(1, 4, 12, 128).bfloat16()
    weight, grids = (torch.rand(12 * 128) + 0.5).bfloat16(), [[1, 2, 2]]
    stock = rope_oracle.stock(x, weight, grids, eps=1e-6)
    table, where = rope_oracle.table(4, 128), torch.tensor(grids)
    out = run(x, weight, table, where, eps=1e-6, dtype=torch.float32)
    assert (out == stock).float().mean() > 0.99, "not rounded as stock does"


def check_infinities(run: Callable[..., Tensor]) -> None:
    """One that is turned stays one, as in stock's arithmetic."""
    x, table = torch.randn(1, 4, 3, 40), rope_oracle.table(4, 40)
    x[0, 1, 0, 0] = math.inf
    out = run(x, None, table, torch.tensor([[4, 1, 1]]))  # frame 1: neither factor is 0
    assert out[0, 1, 0, :2].isinf().all(), "an infinity is NaN"
    assert out.isfinite().sum() == out.numel() - 2, "an infinity has spread"


def check_clamped(run: Callable[..., Tensor]) -> None:
    """Sizes on the device that the table does not have."""
    x, table = torch.randn(1, 6, 2, 16), rope_oracle.table(3, 16)
    out = run(x, None, table, torch.tensor([[9, 1 << 40, 2]]), grid_on_device=True)
    assert torch.equal(out, run(x, None, table, torch.tensor([[3, 3, 2]]))), "not clamped"


def suspicious() -> Iterator[Case]:
    """A few cases that between them meet what could go wrong in both bodies."""
    turn = Case(grids=((2, 2, 1), (1, 1, 3)), table="grid", batch=2, seqlen=6)
    yield replace(turn, dtype=torch.float32, out_dtype=torch.float32)
    yield replace(turn, heads=5, head_dim=128, weight=torch.bfloat16, seqlen_offset=1)
    yield replace(turn, heads=4, head_dim=256, grid_on_device=True, grid_dtype=torch.int32)
    yield replace(turn, grid_on_device=True, dtype=torch.float16, out_dtype=torch.float32)
    yield replace(turn, heads=13, round_norm=False, out_dtype=torch.float32)
    yield Case(per_head=True, heads=6, round_norm=False, out_dtype=torch.float32)
    yield Case(dtype=torch.float32, out_dtype=torch.float32, size=1e-3, heads=12)
    yield replace(turn, out_layout="in place", layout="fused")


def suspicious_for_any() -> Iterator[Case]:
    yield Case(head_dim=63, dtype=torch.float32, out_dtype=torch.float16)
    yield Case(head_dim=100, heads=7, table="head", out_dtype=torch.float32)
    yield Case(head_dim=20, heads=9, layout="odd", dtype=torch.float16)
