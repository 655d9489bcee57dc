# SPDX-License-Identifier: Apache-2.0
"""cases_skip.py - calls with a skip_threshold, alone and with all that a call with lists may have,
and how they are judged: skip_oracle.py says which blocks have to be left out. Without those the
result is as exact as any (cases_listed.py), and the guard's share is what they weigh.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import blocks_oracle
import skip_oracle
from blocks_oracle import BLOCK, Lists, blocks_of
from emu import cases, cases_listed
from emu.cases import Case
from emu.rows import TileListed
from emu.run import Result
from emu.run_listed import run
from oracle import as_float64

THRESHOLDS = (1e-6, 1e-4, 1e-3, 0.01, 0.05, 0.05, 0.3, 1.0)
BAD = ("value nan", "value inf", "key nan", "key inf", "key -inf")
BELOW_FLOATS = 1e-30  # shares of weights that float32 has no normal number for


@dataclass(frozen=True)
class Skip:
    """What a call has beside its Case."""

    threshold: float = 0.05
    density: float | None = None  # of its lists; None: it has none
    form: str = "plain"
    pools_others: bool = False
    sharpness: float = 0.0  # how far apart the blocks' scores are; 0: as the case has them
    alike: float = 0.9  # how much queries agree which blocks matter, 0 to 1
    bad: str = ""  # one number that is not finite, of BAD
    names_blocks: bool = False  # a value is 1 in the place of its block


@dataclass(frozen=True)
class Told:
    """What has become of a call."""

    lost: float
    left_out: int  # blocks, summed over all rows
    is_sure: bool


def rows_of_warp(tile: TileListed) -> int:
    return tile.block_m // tile.num_warps


def _sharpen(case: Case, skip: Skip, query: Tensor, key: Tensor, dice: Any) -> None:
    """Each block of keys gets a direction of its own, and queries share one."""
    head_dim, blocks = query.shape[3], np.arange(key.shape[1]) // BLOCK
    shared = dice.standard_normal((len(query), 1, 1, head_dim))
    of_block = dice.standard_normal((len(key), blocks_of(key.shape[1]), key.shape[2], head_dim))
    mixed = query.double() * (1.0 - skip.alike) + torch.from_numpy(shared) * skip.alike
    query.copy_(mixed * skip.sharpness)
    key.copy_(key.double() * dice.uniform(0.0, 0.5) + torch.from_numpy(of_block[:, blocks]))


def _spoil(skip: Skip, query: Tensor, key: Tensor, value: Tensor, case: Case, dice: Any) -> None:
    """Puts a number that is not finite into a real key or value."""
    where, what = skip.bad.split()
    sample = int(dice.integers(len(key)))
    real = case.k_lens[sample] if case.k_lens else key.shape[1]
    if real:
        head, d = int(dice.integers(key.shape[2])), int(dice.integers(key.shape[3]))
        (value if where == "value" else key)[sample, int(dice.integers(real)), head, d] = float(
            what
        )
        if what == "-inf":
            query[..., d] = 1.0


def operands(case: Case, skip: Skip, tile: TileListed) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = cases.operands(case, tile)
    dice = np.random.default_rng(random.Random(repr((case, skip))).randrange(2**31))
    if skip.sharpness and case.layout != "one sample":
        _sharpen(case, skip, query, key, dice)
    if skip.names_blocks and case.layout != "one sample":
        places = torch.arange(key.shape[1]) // BLOCK % tile.head_dim
        named = torch.nn.functional.one_hot(places, tile.head_dim)[None, :, None].to(value.dtype)
        value.copy_(torch.where(value.isnan(), value, named))
    if skip.bad and case.layout != "one sample":
        _spoil(skip, query, key, value, case, dice)
    return query, key, value


def lists_of(case: Case, skip: Skip) -> Lists:
    return cases_listed.lists_of(case, 1.1 if skip.density is None else skip.density)


def assert_told(told: float, shares: Any, left_out: Any, pools_others: bool) -> None:
    """The guard's share is the largest, a little above it, and 0 if there is none. Means are
    rounded, and with them what the kernel's share is a share of."""
    if not left_out.any():
        assert told == 0.0, f"{told} is lost where nothing may be left out"
        return
    broken = np.isnan(shares).any()  # a row that is NaN has lost anything
    largest = float(np.nanmax(shares)) if not np.isnan(shares).all() else 0.0
    less, more = (0.95, 1.06) if pools_others else (1.0, 1.003)
    most = 1.0 if broken else min(largest * more + 1e-28, 1.0)
    assert largest * less - BELOW_FLOATS <= told <= most, f"{largest} is lost, {told} is told"
    assert told > 0.0


def assert_within(
    result: Result, told: float, query: Tensor, value: Tensor, want: Any, pools_others: bool
) -> None:
    """The error is what the certificate allows, whatever was left out: of out the share times the
    spread of the values; of lse its logarithm. Beside it, means are rounded."""
    out, lse = as_float64(result.out), want[1]
    fine = np.isfinite(want[0])
    finite = as_float64(value)[np.isfinite(as_float64(value))]
    if not fine.any() or not finite.size:
        return
    spread, largest = float(finite.max() - finite.min()), float(np.abs(finite).max())
    unit = 0.03 if query.dtype == torch.bfloat16 else 0.004
    error = float(np.abs(out[fine] - want[0][fine]).max())
    assert error <= told * spread + unit * largest, f"out is off by {error}, {told} is told"
    if result.lse is not None:
        fine = np.isfinite(lse)
        less = lse[fine] - as_float64(result.lse)[fine]
        slack = (0.02 if pools_others else 2e-4) * max(
            1.0, float(np.abs(lse[fine]).max(initial=0.0))
        )
        most = np.inf if told >= 1.0 else -np.log1p(-told)
        assert (less >= -slack).all() and (less <= most + slack).all(), "lse"


def judge(
    case: Case, skip: Skip, tile: TileListed, result: Result, told: float, x: Any, lists: Lists
) -> Told:
    query, key, value = x
    call: dict[str, Any] = case.call()
    pools: dict[str, Any] = {"pools_others": skip.pools_others}
    shape = {"block_m": tile.block_m, "rows_of_warp": rows_of_warp(tile)}
    wanted = skip_oracle.skipped(query, key, value, lists, skip.threshold, **shape, **call)
    if wanted.is_sure:
        left_out = wanted.left_out
        more: Any = {**pools, "left_out": left_out}
        cases_listed.assert_close(result, query, key, value, lists, **more, **call)
        shares = skip_oracle.lost_shares(query, key, value, lists, left_out, **pools, **call)
        assert_told(told, shares, left_out, skip.pools_others)
    if skip.bad not in ("key nan", "key inf"):
        want = blocks_oracle.attention(query, key, value, lists, **pools, **call)
        assert_within(result, told, query, value, want, skip.pools_others)
    return Told(told, int(wanted.left_out.sum()), wanted.is_sure)


def check(
    case: Case, skip: Skip, tile: TileListed, runner: Callable[..., Result] = run, **how: Any
) -> Told:
    """Runs the case and holds it against the oracle; an exception names it."""
    query, key, value = operands(case, skip, tile)
    lists, told = lists_of(case, skip), torch.zeros(1)
    if case.layout != "one sample" and not skip.pools_others and skip.density is not None:
        cases_listed.hide_others(lists, key, value)
    options: dict[str, Any] = {"counts": None, "indices": None}
    if skip.density is not None:
        options = dict(zip(options, cases_listed.as_tensors(lists, skip.form), strict=True))
    options |= {**case.call(), "schedule": case.schedule, "return_lse": case.return_lse, **how}
    options |= {"pools_others": skip.pools_others, "skip_threshold": skip.threshold}
    try:
        result = runner(tile, query, key, value, lost_mass=told, **options)
        if case.q_is_f32:  # judge the 16-bit call, as cases.check does
            query, again = query.to(value.dtype), torch.zeros(1)
            rounded = runner(tile, query, key, value, lost_mass=again, **options)
            torch.testing.assert_close(
                result.out.to(rounded.out.dtype), rounded.out, rtol=0, atol=0, equal_nan=True
            )
            assert torch.equal(told, again)
            result = rounded
        assert result.bank_conflicts == 0, f"{result.bank_conflicts} bank conflicts"
        return judge(case, skip, tile, result, float(told), (query, key, value), lists)
    except AssertionError as error:
        raise AssertionError(f"{tile.name} {case} {skip}: {error}") from error


def _skips(case: Case, dice: random.Random) -> Skip:
    density = dice.choice((None, None, 0.5, 0.9, 1.1))
    pools_others = density is not None and dice.random() < 0.4
    # A NaN in V reaches rows that do not see it, where a mask cuts its tile or through a mean.
    bad = BAD if not pools_others and not case.is_causal and case.window == (-1, -1) else BAD[2:]
    return Skip(
        threshold=dice.choice(THRESHOLDS),
        density=density,
        form=dice.choice(cases_listed.FORMS),
        pools_others=pools_others,
        sharpness=dice.choice((0.0, 1.0, 2.0, 4.0, 8.0)),
        alike=dice.uniform(0.9, 1.0),
        bad=dice.choice(bad) if dice.random() < 0.15 else "",
        names_blocks=dice.random() < 0.2,
    )


def by_hand(tile: TileListed) -> Iterator[tuple[Case, Skip]]:
    """Around the edges of tiles."""
    dice = random.Random(f"hand {tile.name}")
    for case in cases.by_hand(tile):
        yield replace(case, split_tiles=0), _skips(case, dice)


def by_chance(tile: TileListed, count: int, seed: int = 0) -> Iterator[tuple[Case, Skip]]:
    """Over up to ten blocks of keys."""
    dice = random.Random(f"chance {tile.name} {seed}")
    for case in cases.by_chance(tile, count, seed):
        more = dice.randrange(2 * BLOCK, 8 * BLOCK)
        lens = None if case.k_lens is None else tuple(n + more for n in case.k_lens)
        case = replace(case, seqlen_k=case.seqlen_k + more, k_lens=lens, split_tiles=0)
        yield case, _skips(case, dice)
