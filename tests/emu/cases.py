# SPDX-License-Identifier: Apache-2.0
"""cases.py - the calls that every emulated kernel has to answer: some by hand, more by chance."""

from __future__ import annotations

import math
import mmap
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from emu.rows import Tile
from emu.run import DTYPES, Result, Schedule, run
from tolerances import assert_close_to_oracle


@dataclass(frozen=True)
class Case:
    """One call; everything that makes it different from the next."""

    seqlen_q: int
    seqlen_k: int
    batch: int = 1
    heads_q: int = 1
    heads_k: int = 1
    q_lens: tuple[int, ...] | None = None
    k_lens: tuple[int, ...] | None = None
    lens_dtype: str = "int64"
    is_causal: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    layout: str = "contiguous"
    q_is_f32: bool = False
    values: str = "normal"
    split_tiles: int = 0
    return_lse: bool = True
    schedule: Schedule = field(default=Schedule())

    def call(self) -> dict[str, Any]:
        """The oracle's keyword arguments."""
        dtype = getattr(torch, self.lens_dtype)
        lens = [
            None if n is None else torch.tensor(n, dtype=dtype) for n in (self.q_lens, self.k_lens)
        ]
        return {
            **{"q_lens": lens[0], "k_lens": lens[1], "scale": self.scale},
            **{"is_causal": self.is_causal, "window": self.window},
        }


def _surrounded(x: Tensor) -> Tensor:
    """A view into NaN: rows and heads on all sides, 16 bytes of it between the heads."""
    batch, seqlen, heads, head_dim = x.shape
    around = torch.full((batch + 1, seqlen + 3, heads + 1, head_dim + 8), math.nan, dtype=x.dtype)
    view = around[1:, 2 : 2 + seqlen, :heads, 8:]
    view.copy_(x)
    return view


def _fused(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Slices of one [batch, seqlen, q | k | v heads, head_dim] tensor, as a fused projection makes
    them; what is beyond a shorter operand is NaN."""
    parts = (query, key, value)
    batch, head_dim = query.shape[0], query.shape[3]
    seqlen, heads = max(p.shape[1] for p in parts), [p.shape[2] for p in parts]
    whole = torch.full((batch, seqlen, sum(heads), head_dim), math.nan, dtype=key.dtype)
    views = [v[:, : p.shape[1]] for p, v in zip(parts, whole.split(heads, dim=2), strict=True)]
    for part, view in zip(parts, views, strict=True):
        view.copy_(part)
    return tuple(views)


def _laid_out(case: Case, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    operands = (query, key, value)
    if case.layout == "heads first":
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands)
    if case.layout == "surrounded":
        return tuple(_surrounded(x) for x in operands)
    if case.layout == "fused" and query.dtype == key.dtype:
        return _fused(*operands)
    if case.layout == "one sample":
        return tuple(x[:1].expand(x.shape[0], -1, -1, -1) for x in operands)
    return operands


VALUES = ("normal", "normal", "peaky", "one hot", "rising", "biased", "outliers")


def _values(case: Case, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Turns standard normal operands into something harder, in place."""
    where = random.Random(repr(case)).randrange(max(1, key.shape[1]))
    if case.values == "peaky":
        query *= 6.0
    elif case.values == "one hot":  # one key is ahead of all others by 226, for every row
        query.fill_(1.0)
        key *= 0.05
        key[:, where : where + 1] = 226.0 * query.shape[3] ** -0.5
    elif case.values == "one hot each":  # the same, but in sample b it is key b
        query.fill_(1.0)
        key *= 0.05
        for b in range(len(key)):
            key[b, b % key.shape[1]] = 226.0 * query.shape[3] ** -0.5
    elif case.values == "rising":  # the maximum moves with almost every tile
        query.abs_()
        key.abs_().mul_(torch.linspace(0.0, 3.0, key.shape[1]).view(1, -1, 1, 1))
    elif case.values == "biased":
        key += 3.0
        value += 2.0
    elif case.values == "outliers":
        value[..., ::17] *= 100.0


def operands(case: Case, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of this case, NaN behind the real lengths and around the views."""
    made = torch.Generator().manual_seed(random.Random(repr(case)).randrange(2**31))
    shapes = ((case.seqlen_q, case.heads_q), *(((case.seqlen_k, case.heads_k),) * 2))
    query, key, value = (
        torch.randn(case.batch, n, h, tile.head_dim, generator=made) for n, h in shapes
    )
    _values(case, query, key, value)
    dtype = DTYPES[tile.dtype]
    query = query if case.q_is_f32 else query.to(dtype)
    laid = _laid_out(case, query, key.to(dtype), value.to(dtype))
    for x, lens in zip(laid, (case.q_lens, case.k_lens, case.k_lens), strict=True):
        for b, n in enumerate(lens or ()):
            if case.layout != "one sample":
                x[b, n:] = math.nan
    return laid  # type: ignore[return-value]


def reserved(elements: int, dtype: torch.dtype) -> Tensor | None:
    """Address space without memory behind it: pages appear as they are written. None: not here."""
    no_reserve = 0x4000  # MAP_NORESERVE, which the mmap module does not name before Python 3.13
    if sys.platform != "linux":
        return None
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags), dtype=dtype)
    except OSError:  # an address-space limit
        return None


def merged(parts: Result) -> tuple[Tensor, Tensor]:
    """One result from those of the parts, in float64: what the merge of a split has to give."""
    assert parts.lse is not None
    lse = parts.lse.double()
    total = torch.logsumexp(lse, dim=0)
    weight = torch.where(lse == -math.inf, 0.0, torch.exp(lse - total)).permute(0, 1, 3, 2)
    return (weight[..., None] * parts.out.double()).sum(0), total


def check(case: Case, tile: Tile, runner: Callable[..., Result] = run, **how: Any) -> None:
    """Runs the case and holds it against the oracle; an exception names it."""
    query, key, value = operands(case, tile)
    options = {**case.call(), "schedule": case.schedule, **how}
    options |= {"split_tiles": case.split_tiles, "return_lse": case.return_lse}
    try:
        result = runner(tile, query, key, value, **options)
        if case.q_is_f32:
            # The sums are those of the 16-bit call, only rounded less on their way out. With few
            # keys torch's are exact, and would forbid even that P is rounded: judge that call.
            query = query.to(value.dtype)
            rounded = runner(tile, query, key, value, **options)
            assert torch.equal(result.out.to(rounded.out.dtype), rounded.out)
            result = rounded
        out, lse = result.out, result.lse
        if case.split_tiles:
            out, lse = merged(result)
            out, lse = out.to(query.dtype), lse.float()
        assert_close_to_oracle(out, query, key, value, lse=lse, **case.call())
        assert result.bank_conflicts == 0, f"{result.bank_conflicts} bank conflicts"
    except AssertionError as error:
        raise AssertionError(f"{tile.name} {case}: {error}") from error


def check_one_key(tile: Tile, runner: Callable[..., Result] = run) -> None:
    """Whatever its score, it gives its value to the bit."""
    query, key, value = operands(Case(40, 1, values="peaky"), tile)
    assert torch.equal(runner(tile, query, key, value).out, value.expand(-1, 40, -1, -1))


def check_schedules(tile: Tile, runner: Callable[..., Result] = run) -> None:
    """No order of warps, blocks and copies changes a bit."""
    case = Case(tile.block_m + 1, 3 * tile.block_n - 7, q_lens=(tile.block_m,), is_causal=True)
    given = operands(case, tile)
    first = runner(tile, *given, **case.call())
    for landing in range(3):
        again = runner(tile, *given, **case.call(), schedule=Schedule(landing, landing + 9))
        assert torch.equal(first.out, again.out)
        assert first.lse is not None and again.lse is not None
        assert torch.equal(first.lse, again.lse)


def by_hand(tile: Tile) -> Iterator[Case]:
    """Around the edges of tiles, and one of each kind."""
    m, n = tile.block_m, tile.block_n
    for seqlen_k in (1, 15, n - 1, n, n + 1, 2 * n - 1, 2 * n + 8, 3 * n):
        yield Case(m + 1, seqlen_k)
    for seqlen_q in (1, 7, 16, 17, m - 1, m):
        yield Case(seqlen_q, n + 5)
    for lens in ((0, 33), (33, 0), (0, 0), (1, 1), (20, n), (40, n + 1), (m - 1, 1)):
        q_lens, k_lens = (lens[0], 2), (lens[1], n + 3)
        yield Case(m, n + 9, batch=2, q_lens=q_lens, k_lens=k_lens)
        yield Case(m, n + 9, batch=2, q_lens=q_lens, k_lens=k_lens, is_causal=True)
    for window in ((0, 0), (5, 0), (0, 7), (n, 3), (2 * n, -1), (-1, n), (n + 1, n + 1)):
        yield Case(m + 3, 3 * n + 5, window=window)
        yield Case(2 * m - 1, n + 1, window=window)
    for length in (1, n - 1, n, n + 1, 2 * n):
        yield Case(length, length, is_causal=True)
    yield Case(3 * n, n, is_causal=True)  # the first rows see nothing
    for layout in ("heads first", "surrounded", "fused", "one sample"):
        for q_is_f32 in (False, True):
            yield Case(20, n + 4, 2, 4, 2, layout=layout, q_is_f32=q_is_f32)
    for scale in (-0.3, 0.0, 1e-3, 1.0, -2.0):
        yield Case(18, n + 7, scale=scale)
        yield Case(18, n + 7, scale=scale, is_causal=True)
    for values in ("peaky", "one hot", "rising", "biased", "outliers"):
        yield Case(m, 3 * n - 2, values=values)
        yield Case(17, 2 * n, values=values, is_causal=True)
    for split_tiles in (1, 2):
        yield Case(9, 3 * n + 2, 2, 2, 1, split_tiles=split_tiles)
        yield Case(m + 1, 3 * n, split_tiles=split_tiles, is_causal=True)
        yield Case(9, 3 * n, 2, k_lens=(n, 2 * n + 1), split_tiles=split_tiles)
    yield Case(20, n, 2, k_lens=(n - 3, 5), lens_dtype="int32")
    yield Case(20, n, return_lse=False)


def by_chance(tile: Tile, count: int, seed: int = 0) -> Iterator[Case]:
    """`count` cases in which everything may meet everything."""
    dice = random.Random(f"{tile.name} {seed}")
    m, n = tile.block_m, tile.block_n

    def length(block: int, most: float) -> int:
        near = dice.randrange(1, max(2, int(most))) * block // 2 + dice.randrange(-2, 3)
        return max(1, dice.choice((near, dice.randrange(1, int(most * block / 2) + 1))))

    def lens(padded: int, batch: int) -> tuple[int, ...] | None:
        if dice.random() < 0.5:
            return None
        return tuple(dice.randrange(padded + 1) for _ in range(batch))

    for _ in range(count):
        batch, heads_k = dice.choice(((1, 1), (1, 1), (2, 1), (1, 2)))
        case = Case(length(m, 3), length(n, 5), batch, heads_k * dice.choice((1, 1, 2)), heads_k)
        window = (dice.randrange(-1, 2 * n), dice.randrange(-1, 2 * n))
        yield replace(
            case,
            q_lens=lens(case.seqlen_q, batch),
            k_lens=lens(case.seqlen_k, batch),
            lens_dtype=dice.choice(("int32", "int64")),
            is_causal=dice.random() < 0.3,
            window=dice.choice(((-1, -1), (-1, -1), window)),
            scale=dice.choice((None, None, None, -0.1, 0.2)),
            layout=dice.choice(("contiguous", "heads first", "surrounded", "fused")),
            q_is_f32=dice.random() < 0.25,
            values=dice.choice(VALUES),
            split_tiles=dice.choice((0, 0, 0, 0, 1, 2)),
            schedule=Schedule(dice.randrange(3), dice.randrange(1000)),
        )
