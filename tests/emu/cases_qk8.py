# SPDX-License-Identifier: Apache-2.0
"""cases_qk8.py - the calls of cases.py for kernels with 8-bit scores, and how they are judged.

Integer scores are defined to the bit, so that a kernel may differ from their float64 softmax by
what it rounds after them alone: P to 16 bits, V where scaled to f16 it is subnormal, sums that are
kept in f16, and float32. The bound is made of those roundings, each counted from the very weights
and values of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import oracle
import qk8_oracle
from blocks_oracle import BLOCK, Lists
from emu.cases import Case, merged, operands
from emu.rows import TileQk8
from emu.run import LIMIT_F16, LIMIT_SUM_F16, Result, scaled
from emu.run_qk8 import run
from oracle import Array
from tolerances import ulp

HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
STEPS_OF_SUM = 16  # keys after which a sum in f16 is rounded; Ampere's are after 8, too
FACTOR = 2.0


def weights(
    q: Array, k: Array, scale: float, seen: np.ndarray[Any, np.dtype[np.bool_]]
) -> tuple[Array, Array, Array]:
    """Of the defined scores: weights [len_q, len_k], 0 where not seen; lse; sizes [len_q] of what
    lse is the sum of."""
    p, lse, size = np.zeros(seen.shape), np.full(len(q), -np.inf), np.zeros(len(q))
    rows = np.flatnonzero(seen.any(axis=1))
    if not len(rows):
        return p, lse, size
    with np.errstate(all="ignore"):
        mean = qk8_oracle.mean_of(k.astype(np.float32))
        k8, k_step = qk8_oracle.quantised(k.astype(np.float32) - mean)
        sign = np.copysign(np.float32(1.0), np.float32(scale))
        q8, q_step = qk8_oracle.quantised(sign * q.astype(np.float32))
        unscaled = ((q8 @ k8.T).astype(np.float32) * k_step).astype(np.float64)
        factor = q_step.astype(np.float64) * abs(scale) / qk8_oracle.depth_of(q.shape[1])
        scores = unscaled * np.minimum(factor, 2.0**127)[:, None]
        of_mean = scale * (q @ mean.astype(np.float64))
        sizes = abs(scale) * (np.abs(q) @ np.abs(mean.astype(np.float64)))
        for i in rows:
            s = scores[i, seen[i]]
            w = np.exp(s - s.max())
            p[i, seen[i]] = w / w.sum()
            lse[i] = s.max() + np.log(w.sum()) + of_mean[i]
            size[i] = np.abs(s).max() + sizes[i]
    return p, lse, size


class Judge:
    """The oracle's `head`, which also keeps by how much each number may be off.

    Args:
        lists: of blocks, which leave keys out; K's mean is that of all.
    """

    def __init__(self, tile: TileQk8, lists: Lists | None = None) -> None:
        self.tile = tile
        # The oracle asks for head after head.
        self.named = (
            None if lists is None else iter(lists.named.reshape(-1, *lists.named.shape[2:]))
        )
        self.most: list[Array] = []  # of each head: largest error of its numbers
        self.usual: list[Array] = []  # their mean square, if roundings are independent
        self.sizes: list[Array] = []

    def _moved(self, v: Array) -> Array:
        """By how much scaling has moved each number of V."""
        if not self.tile.v_is_scaled:
            return np.zeros_like(v)
        limit = LIMIT_SUM_F16 if self.tile.pv_sum_f16 else LIMIT_F16
        halves, scale = scaled(torch.from_numpy(v)[None, :, None], limit)
        return np.abs(oracle.as_float64(halves * scale.double())[0, :, 0] - v)

    def __call__(self, q: Array, k: Array, v: Array, scale: float, seen: Any) -> Any:
        if self.named is not None:
            of_row, of_key = np.arange(len(q)) // BLOCK, np.arange(len(k)) // BLOCK
            seen = seen & next(self.named)[of_row][:, of_key]
        p, lse, size = weights(q, k, scale, seen)
        out = np.zeros((len(q), v.shape[1]))
        for i in np.flatnonzero(seen.any(axis=1)):
            out[i] = p[i, seen[i]] @ v[seen[i]]
        self.sizes.append(size)
        v = np.where(np.isfinite(v), v, 0.0)
        in_f16 = self.tile.dtype == "F16" or self.tile.gpu_class != "WIDE"
        of_p = HALF_UNIT[torch.float16 if in_f16 else torch.bfloat16]
        sums = np.abs(p) @ np.abs(v)
        # float32: exponents of this size are rounded, and so are exp2 and the sums.
        exponents = 1.5e-6 * (1.0 + size)[:, None]
        of_v = p @ self._moved(v)
        most = (of_p + exponents) * sums + of_v
        usual = of_p**2 / 3 * (p**2 @ v**2) + (exponents * sums) ** 2 + of_v**2
        if self.tile.pv_sum_f16:
            unit = HALF_UNIT[torch.float16]
            for begin in range(0, len(k), self.tile.block_n):
                end = min(begin + self.tile.block_n, len(k))
                for stop in range(begin + STEPS_OF_SUM, end + STEPS_OF_SUM, STEPS_OF_SUM):
                    part = p[:, begin : min(stop, end)] @ v[begin : min(stop, end)]
                    most += unit * np.abs(part)
                    usual += (unit * part) ** 2 / 3
        self.most.append(most)
        self.usual.append(usual)
        return out, lse


def check_result(
    tile: TileQk8,
    result: Result,
    query: Any,
    key: Any,
    value: Any,
    lists: Lists | None = None,
    **call: Any,
) -> None:
    """Holds out and lse against the definition."""
    judge = Judge(tile, lists)
    want, want_lse = oracle.attention(query, key, value, **call, head=judge)
    got = oracle.as_float64(result.out)
    batch, _, heads = query.shape[:3]
    bounds = [np.zeros_like(want) for _ in range(2)]
    sizes = np.zeros_like(want_lse)
    for number in range(batch * heads):
        b, h = divmod(number, heads)
        rows = len(judge.sizes[number])
        bounds[0][b, :rows, h], bounds[1][b, :rows, h] = judge.most[number], judge.usual[number]
        sizes[b, h, :rows] = judge.sizes[number]
    fine = np.isfinite(want)
    bounds = [np.where(fine, bound, 0.0) for bound in bounds]
    np.testing.assert_array_equal(got[~fine], want[~fine], "out: NaN and infinities")
    error = np.where(fine, got - np.where(fine, want, 0.0), 0.0)
    assert np.isfinite(error).all(), "out must be finite where the definition is"
    empty = np.isneginf(want_lse).transpose(0, 2, 1)[..., None]
    assert not (empty & (got != 0)).any(), "out must be 0 in a row without a key"
    unit = np.vectorize(lambda x: ulp(query.dtype, x))(np.abs(np.where(fine, want, 0.0)))
    over = np.abs(error) - (FACTOR * bounds[0] + unit)
    assert over.max(initial=-1.0) <= 0, f"out is wrong by {np.abs(error).max():.3e}"
    rms = float(np.sqrt(np.mean(error**2))) if error.size else 0.0
    usual = float(np.sqrt(np.mean(bounds[1] + unit**2 / 3))) if error.size else 0.0
    assert rms <= FACTOR * usual + 1e-30, f"out is wrong by {rms:.3e} RMS, allowed 2 * {usual:.3e}"
    if result.lse is None:
        return
    got_lse = oracle.as_float64(result.lse)
    known = np.isfinite(want_lse)
    np.testing.assert_array_equal(got_lse[~known], want_lse[~known], "lse")
    off = np.abs(got_lse[known] - want_lse[known])
    assert (off <= 1e-6 * (1.0 + sizes[known])).all(), f"lse is wrong by {off.max():.3e}"


def check_largest_sums(tile: TileQk8, **how: Any) -> None:
    """Every weight is the largest, and so is every value: sums in f16 must hold that."""
    query, key, value = operands(Case(20, 3 * tile.block_n), tile)
    query, value = torch.zeros_like(query), torch.full_like(value, 1.9921875)
    out = run(tile, query, key, value, **how).out
    assert torch.equal(out, value[:, :20]), f"out is wrong: {out.flatten()[0]}"


def check(case: Case, tile: TileQk8, runner: Callable[..., Result] = run, **how: Any) -> None:
    """Runs the case and holds it against the definition; an exception names it."""
    query, key, value = operands(case, tile)
    options = {**case.call(), "schedule": case.schedule, **how}
    options |= {"split_tiles": case.split_tiles, "return_lse": case.return_lse}
    try:
        result = runner(tile, query, key, value, **options)
        if case.split_tiles:
            out, lse = merged(result)
            result = Result(out.to(query.dtype), lse.float(), result.bank_conflicts)
        check_result(tile, result, query, key, value, **case.call())
        assert result.bank_conflicts == 0, f"{result.bank_conflicts} bank conflicts"
    except AssertionError as error:
        raise AssertionError(f"{tile.name} {case}: {error}") from error
