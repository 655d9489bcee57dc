# SPDX-License-Identifier: Apache-2.0
"""cases_listed.py - the calls of cases.py with lists of blocks, and how they are judged: as those
without, twice the error of torch's own attention, which gets the same keys as a mask.

Blocks of keys that no list names are NaN. Lists come in every form that a device may be given:
with other strides, with room behind them, in another order, with indices of no block among them,
with counts that cannot be.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import blocks_oracle
import oracle
from blocks_oracle import BLOCK, Lists, blocks_of
from emu import cases
from emu.cases import Case
from emu.rows import TileListed
from emu.run import Result
from emu.run_listed import run
from oracle import Array
from tolerances import ORDERS, _largest_value, _shuffled, judge

FORMS = ("plain", "roomy", "strided", "shuffled", "garbage", "counts")
DENSITIES = (0.0, 0.2, 0.5, 0.5, 0.9, 1.1)
NO_BLOCKS = (-1, -64, 1 << 20, (1 << 31) - 1, -(1 << 31))


def lists_of(case: Case, density: float) -> Lists:
    seed = random.Random(repr(case)).randrange(2**31)
    shape = (case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)
    return blocks_oracle.random_lists(seed, *shape, density)


def as_tensors(lists: Lists, form: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """block_counts and block_indices; forms from "shuffled" on break the contract."""
    dice = np.random.default_rng(seed)
    most, blocks = int(lists.named.sum(-1).max(initial=0)), lists.named.shape[-1]
    counts, indices = lists.as_tensors(None if form == "plain" else most + 3, behind=blocks - 1)
    if form == "strided":
        counts = counts.transpose(0, 2).contiguous().transpose(0, 2)
        indices = indices.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    elif form in ("shuffled", "garbage"):
        for place in np.ndindex(*counts.shape):
            found = indices[place][: int(counts[place])].tolist()
            none = (blocks, *NO_BLOCKS)[: dice.integers(5)]
            extra = found[:1] if form == "shuffled" else none
            found = dice.permutation([*found, *extra][: indices.shape[3]]).tolist()
            indices[place][: len(found)] = torch.tensor(found, dtype=torch.int32)
            counts[place] = len(found)
    elif form == "counts":
        indices = indices[..., :most].contiguous()
        counts[counts == 0] = -(1 << 31)
        counts[counts == most] = (1 << 31) - 1 if most else -1
    return counts, indices


def hide_others(lists: Lists, key: Tensor, value: Tensor) -> None:
    """NaN where no list of a key head's query heads names the block."""
    batch, seqlen, heads, _ = key.shape
    named = lists.named.any(2).reshape(batch, heads, -1, lists.named.shape[3]).any(2)
    hidden = torch.from_numpy(~np.repeat(named, BLOCK, axis=2)[..., :seqlen]).transpose(1, 2)
    key[hidden] = torch.nan
    value[hidden] = torch.nan


def _with_means(
    k: Array, v: Array, seen: Any, named: Any, pools_others: bool
) -> tuple[Array, Array, Array]:
    """Keys, values, and what is added to the scores of each row: -inf where it does not see them.
    The others' means follow the keys, with the logarithm of what they stand for."""
    of_row = np.arange(len(seen)) // BLOCK
    bias = np.where(seen & named[of_row][:, np.arange(len(k)) // BLOCK], 0.0, -np.inf)
    means: list[Any] = [[], [], []]
    for n in range(blocks_of(len(k)) if pools_others else 0):
        mine = slice(n * BLOCK, min((n + 1) * BLOCK, len(k)))
        whole = seen[:, mine].all(axis=1) & ~named[of_row, n]
        counted = np.where(whole, np.log(mine.stop - mine.start), -np.inf)
        for to, one in zip(means, (k[mine].mean(0), v[mine].mean(0), counted), strict=True):
            to.append(one)
    if not means[0]:
        return k, v, bias
    bias = np.concatenate([bias, np.stack(means[2], axis=1)], axis=1)
    return np.concatenate([k, means[0]]), np.concatenate([v, means[1]]), bias


def _either_way(means: Array, seed: int, dtype: torch.dtype) -> Array:
    """Half a unit at most, so that they are rounded up or down: there are few of them, and what is
    judged should not be one lucky rounding (tolerances.py)."""
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(means), 1e-30)))) * torch.finfo(dtype).eps
    return np.asarray(unit * np.random.default_rng(seed).uniform(-0.5, 0.5, means.shape))


def _torch_head(
    operands: list[Array], bias: Array, scale: float, dtype: torch.dtype, order: int
) -> tuple[Array, Array]:
    x = [torch.from_numpy(a).to(dtype) for a in operands]
    mask = torch.from_numpy(bias)
    if order:
        dims, keys = (_shuffled(n, order) for n in (x[0].shape[1], len(x[1])))
        x = [x[0][:, dims], x[1][keys][:, dims], x[2][keys]]
        mask = mask[:, keys]
    if scale < 0:
        x[0], scale = -x[0], -scale
    q, k, v = (a[None, None] for a in x)
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask.to(dtype)[None, None], scale=scale)
    s = torch.logsumexp(x[0].float() @ x[1].float().T * scale + mask.float(), dim=1)
    return oracle.as_float64(o[0, 0]), oracle.as_float64(s)


def by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Lists,
    order: int,
    pools_others: bool = False,
    left_out: Any = None,
    **call: Any,
) -> tuple[Array, Array]:
    """Torch's own attention, head by head, with the lists in its mask. A mask hides no infinity
    from it, so that for rows that see none they are 0."""
    dtype, places = value.dtype, iter(np.ndindex(query.shape[0], query.shape[2]))

    def head(q: Array, k: Array, v: Array, scale: float, seen: Any) -> tuple[Array, Array]:
        place = next(places)
        named = lists.named[place]
        if left_out is not None:
            seen = seen & ~blocks_oracle.keys_of(left_out[place], seen.shape)
        out, lse = np.zeros((len(q), v.shape[1])), np.full(len(q), -np.inf)
        k, v, bias = _with_means(k, v, seen, named, pools_others)
        sees = np.isfinite(bias)
        if order:
            for keys_and_means in (k, v):
                means = keys_and_means[seen.shape[1] :]
                means += _either_way(means, order, dtype)
        infinite = (np.isinf(k) | np.isinf(v)).any(axis=1)
        sees_infinite = (sees & infinite).any(axis=1)
        for rows, inf in ((sees.any(axis=1) & ~sees_infinite, 0.0), (sees_infinite, np.inf)):
            if rows.any():
                x = [np.nan_to_num(a, posinf=inf, neginf=-inf) for a in (q[rows], k, v)]
                out[rows], lse[rows] = _torch_head(x, bias[rows], scale, dtype, order)
        return out, lse

    return oracle.attention(query, key, value, head=head, **call)


def assert_close(
    result: Result, query: Tensor, key: Tensor, value: Tensor, lists: Lists, **call: Any
) -> None:
    want, want_lse = blocks_oracle.attention(query, key, value, lists, **call)
    torchs = [by_torch(query, key, value, lists, order, **call) for order in range(ORDERS)]
    got = oracle.as_float64(result.out)
    wrong = np.isneginf(want_lse).transpose(0, 2, 1)[..., None] & (got != 0)
    assert not wrong.any(), "a row that sees no key is not 0"
    largest = _largest_value(value, call.get("k_lens"))
    judge("out", got, want, [o for o, _ in torchs], query.dtype, largest)
    if result.lse is not None:
        finite = want_lse[np.isfinite(want_lse)]
        largest = max(2.0, float(np.abs(finite).max())) if finite.size else 2.0
        # An error of lse is a relative one of the weights' sum, however small lse is; and exp2
        # alone is off by two units, for all weights alike where a list leaves few.
        away = np.where(want_lse < 0.0, -2.0, 2.0)
        says = [s + away for _, s in torchs]
        got_lse = oracle.as_float64(result.lse) + away
        judge("lse", got_lse, want_lse + away, says, torch.float32, largest)


def check(
    case: Case,
    tile: TileListed,
    density: float,
    form: str = "plain",
    pools_others: bool = False,
    runner: Callable[..., Result] = run,
    **how: Any,
) -> None:
    """Runs the case and holds it against the oracle; an exception names it."""
    query, key, value = cases.operands(case, tile)
    lists = lists_of(case, density)
    if case.layout != "one sample" and not pools_others:
        hide_others(lists, key, value)
    counts, indices = as_tensors(lists, form)
    options = {**case.call(), "schedule": case.schedule, "return_lse": case.return_lse, **how}
    options |= {"counts": counts, "indices": indices, "pools_others": pools_others}
    try:
        result = runner(tile, query, key, value, **options)
        if case.q_is_f32:  # judge the 16-bit call, as cases.check does
            query = query.to(value.dtype)
            rounded = runner(tile, query, key, value, **options)
            torch.testing.assert_close(
                result.out.to(rounded.out.dtype), rounded.out, rtol=0, atol=0, equal_nan=True
            )
            result = rounded
        more = {"pools_others": pools_others}
        assert_close(result, query, key, value, lists, **more, **case.call())
        assert result.bank_conflicts == 0, f"{result.bank_conflicts} bank conflicts"
    except AssertionError as error:
        raise AssertionError(
            f"{tile.name} {case} {density} {form} {pools_others}: {error}"
        ) from error


Listed = tuple[Case, float, str, bool]


def _with_lists(found: Iterator[Case], seed: str) -> Iterator[Listed]:
    dice = random.Random(seed)
    for case in found:
        density, form, pools = dice.choice(DENSITIES), dice.choice(FORMS), dice.random() < 0.4
        yield replace(case, split_tiles=0), density, form, pools


def by_hand(tile: TileListed) -> Iterator[Listed]:
    return _with_lists(cases.by_hand(tile), f"hand {tile.name}")


def by_chance(tile: TileListed, count: int, seed: int = 0) -> Iterator[Listed]:
    return _with_lists(cases.by_chance(tile, count, seed), f"chance {tile.name} {seed}")
