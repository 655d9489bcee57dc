# SPDX-License-Identifier: Apache-2.0
"""cases_backward.py - the gradients that every emulated row has to find: the calls of cases.py,
with gradients of out and lse, and NaN wherever nothing may be used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import backward_oracle
import oracle
from emu import cases
from emu.cases import Case
from emu.run import DTYPES, Schedule
from emu.run_backward import Call, Gradients, Pair, row_numbers, run


def _gradients_of_results(case: Case, query: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """grad_out and grad_lse: by the dice of the case of another size, dtype or layout."""
    dice = random.Random(repr(case))
    made = torch.Generator().manual_seed(dice.randrange(2**31))
    batch, seqlen_q, heads, _ = query.shape
    grad_out = torch.randn(query.shape, generator=made) * dice.choice((1.0, 1.0, 1e-3, 30.0))
    grad_out = grad_out.to(torch.float32 if case.q_is_f32 else dtype)
    if dice.random() < 0.3:  # one number for all heads and rows of a sample
        grad_out = grad_out[:, :1, :1].expand(query.shape)
    # torch_sdpa's gradient of lse is float32, and so is that of one weight of 1: what follows from
    # a single 16-bit dS, which no FlashAttention keeps in more bits, would be held against that.
    if dice.random() < 0.5 or case.values == "one hot":
        return grad_out, None
    grad_lse = torch.randn(batch, seqlen_q, heads, generator=made).transpose(1, 2)
    return grad_out, grad_lse


def _poison(call: Call) -> Call:
    """The same call with NaN in each row that sees no key, and in each key that no row sees."""
    batch, seqlen_q, _, _ = call.query.shape
    lens_q = oracle.as_lengths(call.q_lens, batch, seqlen_q)
    lens_k = oracle.as_lengths(call.k_lens, batch, call.key.shape[1])
    grad_out = call.grad_out.clone()
    grad_lse = None if call.grad_lse is None else call.grad_lse.clone()
    for b, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        seen = torch.from_numpy(oracle.visible(len_q, len_k, call.is_causal, call.window))
        blind = torch.ones(seqlen_q, dtype=torch.bool)
        blind[:len_q] = ~seen.any(dim=1)
        unseen = torch.ones(call.key.shape[1], dtype=torch.bool)
        unseen[:len_k] = ~seen.any(dim=0)
        for x in (call.query, call.out, grad_out):
            x[b, blind] = math.nan
        for x in (call.key, call.value):
            x[b, unseen] = math.nan
        for numbers in (call.lse, grad_lse):
            if numbers is not None:
                numbers[b, :, blind] = math.nan
    return replace(call, grad_out=grad_out, grad_lse=grad_lse)


def call_of(case: Case, pair: Pair) -> Call:
    """Its operands, and what an exact forward pass leaves, rounded."""
    query, key, value = cases.operands(case, pair)  # type: ignore[arg-type]
    dtype = DTYPES[pair.dtype]
    out, lse = oracle.attention(query.to(dtype), key, value, **case.call())
    grads = _gradients_of_results(case, query, dtype)
    left = torch.from_numpy(out).to(query.dtype), torch.from_numpy(lse).float()
    call = Call(query, key, value, *left, *grads, **case.call())
    return call if case.layout == "one sample" else _poison(call)


def exact(call: Call) -> tuple[Tensor, ...]:
    """In float64."""
    how: dict[str, Any] = {"q_lens": call.q_lens, "k_lens": call.k_lens, "scale": call.scale}
    how |= {"is_causal": call.is_causal, "window": call.window}
    inputs = (call.grad_out, call.grad_lse, call.query, call.key, call.value)
    return tuple(map(torch.from_numpy, backward_oracle.gradients(*inputs, **how)))


def _noise(call: Call) -> tuple[Tensor, Tensor]:
    """What is left of dq and dk where exact dP is delta: dP is head_dim float32 sums, delta one
    rounding, each off by at most 2^-24 of a sum that is on its way to dP and strays from there by
    the root of the squares of dout v. Roundings are as often up as down, so their squares add
    up; those of a row's keys and of a key's rows do, too. A row with one key has none of it.
    Measured: up to 0.4 of this."""
    batch, seqlen_q, heads, head_dim = call.query.shape
    scale = head_dim**-0.5 if call.scale is None else call.scale
    q, k, v, dout = (
        x.double().nan_to_num() for x in (call.query, call.key, call.value, call.grad_out)
    )
    of_q, of_k = torch.zeros_like(q), torch.zeros_like(k)
    lens_q = oracle.as_lengths(call.q_lens, batch, seqlen_q)
    lens_k = oracle.as_lengths(call.k_lens, batch, k.shape[1])
    for b, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        seen = torch.from_numpy(oracle.visible(len_q, len_k, call.is_causal, call.window))
        seen &= (seen.sum(dim=1) > 1)[:, None]
        for h in range(heads):
            of = h // call.share
            keys, values = k[b, :len_k, of], v[b, :len_k, of]
            scores = (scale * q[b, :len_q, h] @ keys.T).masked_fill(~seen, -math.inf)
            weights = scores.softmax(dim=1).nan_to_num()
            of_row = dout[b, :len_q, h]
            sums = (of_row @ values.T).abs() + (of_row**2 @ values.T**2).sqrt()
            squares = (weights * sums * 2.0**-24 * scale) ** 2 * (head_dim + 1)
            of_q[b, :len_q, h] = squares @ keys**2
            of_k[b, :len_k, of] += squares.T @ q[b, :len_q, h] ** 2
    return of_q.sqrt(), of_k.sqrt()


def _without_noise(call: Call, got: Gradients) -> tuple[Tensor, ...]:
    """Where one key has all the weight, dq and dk are 0, and both we and torch have noise: whose is
    larger is luck. So what is no more than noise counts as 0."""
    want = exact(call)
    grads = list(got.grads)
    if all(want[n].abs().amax() >= 1e-20 for n in range(2)):
        return tuple(grads)
    for n, noise in enumerate(_noise(call)):
        if want[n].abs().amax() < 1e-20:
            grads[n] = grads[n].masked_fill(grads[n].double().abs() <= noise, 0.0)
    return tuple(grads)


def check_call(call: Call, got: Gradients) -> None:
    how: dict[str, Any] = {"q_lens": call.q_lens, "k_lens": call.k_lens, "scale": call.scale}
    how |= {"is_causal": call.is_causal, "window": call.window}
    inputs = (call.grad_out, call.grad_lse, call.query, call.key, call.value)
    backward_oracle.assert_close(_without_noise(call, got), *inputs, **how)
    assert got.bank_conflicts == 0, f"{got.bank_conflicts} bank conflicts"


def check(case: Case, pair: Pair, **how: Any) -> None:
    """Runs the case and holds it against the oracle; an exception names it."""
    try:
        call = call_of(case, pair)
        check_call(call, run(pair, call, **{"schedule": case.schedule, **how}))
    except AssertionError as error:
        raise AssertionError(f"{pair.name} {case}: {error}") from error


def by_hand(pair: Pair) -> Iterator[Case]:
    """Those of cases.py; a split over keys and a call without lse are no gradients' business."""
    for case in cases.by_hand(pair):  # type: ignore[arg-type]
        if not case.split_tiles and case.return_lse:
            yield case
    m, n = pair.of_keys.block_m, pair.of_rows.block_n
    for seqlen_k in (m - 1, m, m + 1, 2 * m + 3):  # blocks of keys, several tiles of rows each
        yield Case(3 * n + 5, seqlen_k, 1, 2, 1)
        yield Case(3 * n + 5, seqlen_k, 2, 4, 2, is_causal=True)
        yield Case(2 * n + 1, seqlen_k, window=(n // 2, n // 4))


def by_chance(pair: Pair, count: int, seed: int = 0) -> Iterator[Case]:
    for case in cases.by_chance(pair, count, seed):  # type: ignore[arg-type]
        yield replace(case, split_tiles=0)


def check_schedules(pair: Pair) -> None:
    """No order of warps, blocks and copies changes a bit."""
    for case in (
        Case(pair.block_m + 1, 3 * pair.of_keys.block_m - 7, 1, 2, 1, is_causal=True),
        Case(70, 90, 2, 2, 2, q_lens=(70, 33), k_lens=(90, 61)),
    ):
        call = call_of(case, pair)
        first = run(pair, call)
        for landing in range(3):
            again = run(pair, call, schedule=Schedule(landing, landing + 9))
            for a, b in zip(first.grads, again.grads, strict=True):
                assert torch.equal(a, b)


def check_zeros(pair: Pair, **how: Any) -> None:
    """What a row or key that meets others has of NaN and infinity does not reach the gradients of
    those in its block that meet nobody: they are 0."""
    above = replace(call_of(Case(40, 20, is_causal=True), pair), grad_lse=None)
    above.key[0, 3, 0, 5] = math.nan  # seen by the last 20 rows; the first 20 see nothing
    query_grad = run(pair, above, **how).grads[0]
    assert query_grad[:, 20:].isnan().any()
    assert (query_grad[:, :20] == 0).all(), "a row without keys has a gradient"
    beyond = replace(call_of(Case(20, 40, window=(2, 2)), pair), grad_lse=None)
    grad_out = beyond.grad_out.clone()
    grad_out[0, 7, 0, 5] = math.inf  # seen by keys 25 to 29; keys 0 to 17 are seen by no row
    beyond.query[0, 9, 0, 1] = math.nan
    _, key_grad, value_grad = run(pair, replace(beyond, grad_out=grad_out), **how).grads
    for grad in (key_grad, value_grad):
        assert not grad[:, 18:].isfinite().all()
        assert (grad[:, :18] == 0).all(), "a key that no row sees has a gradient"


def check_outliers(pair: Pair, **how: Any) -> None:
    """One large number of grad_out and one of V set a head's power of two in float16. Others' dS
    must not lose bits by it. By dq of these alone: the largest error is the one row's."""
    call = call_of(Case(33, 256), pair)
    made = torch.Generator().manual_seed(5)
    grad_out = torch.randn(call.query.shape, generator=made).to(call.value.dtype)
    query, key, value = (
        torch.randn(x.shape, generator=made).to(x.dtype) for x in (call.query, call.key, call.value)
    )
    grad_out[0, 0, 0, 3], value[0, 5, 0, 7] = 16000.0, 50.0
    out, lse = (torch.from_numpy(x) for x in oracle.attention(query, key, value))
    call = Call(query, key, value, out.to(query.dtype), lse.float(), grad_out)
    want, got = exact(call)[0][:, 1:], run(pair, call, **how).grads[0][:, 1:].double()
    error = float((got - want).norm() / want.norm())
    assert error < 6e-4, f"an error of {error:.1e}"


def check_finite_sizes(pair: Pair, **how: Any) -> None:
    """A sum of |grad_out| beyond float32 is its end: infinite, it would be left out."""
    call = call_of(Case(5, 9, q_is_f32=True), pair)
    call = replace(call, grad_out=torch.full(call.query.shape, 3e38), grad_lse=None)
    _, sizes = row_numbers(call, True, **how)
    assert sizes is not None and (sizes == torch.tensor(3.4e38)).all(), "infinite"


def check_delta(pair: Pair, **how: Any) -> None:
    """Rounded once: what float32 would lose on the way shifts all of a row's dP."""
    call = replace(call_of(Case(64, 90), pair), grad_lse=None)
    made = torch.Generator().manual_seed(9)
    grad_out = torch.randn(call.query.shape, generator=made).to(DTYPES[pair.dtype])
    rows, _ = row_numbers(replace(call, grad_out=grad_out), pair.dtype == "F16", **how)
    want = (grad_out.double() * call.out.double()).sum(-1).transpose(1, 2)
    error = (rows[..., 1].double() - want).abs()
    assert (error <= 2.0**-24 * want.abs() * 1.001).all(), f"off by {error.max():.1e}"
