# SPDX-License-Identifier: Apache-2.0
"""tolerances.py - how close is close enough: twice the error of torch's own SDPA at that dtype.

The rule of the field (FlashAttention's tests): against float64, our error may be twice torch's.
Torch's error is measured for the very same call, one sample at a time, with an explicit mask, and
four times: as the call is, and with keys and head_dim shuffled. Those are the same sums rounded in
another order, so that a call with few numbers is not judged by one lucky rounding. The floor, for
calls that torch computes exactly, is two units in the last place of the output dtype at the largest
value.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import oracle

FACTOR = 2.0
FLOOR_ULP = 2.0
ORDERS = 4


def ulp(dtype: torch.dtype, at: float) -> float:
    """The distance between neighbours of `dtype` at this magnitude."""
    info = torch.finfo(dtype)
    if at <= 0.0 or not math.isfinite(at):
        return float(info.smallest_normal) * float(info.eps)
    return max(2.0 ** math.floor(math.log2(at)), float(info.smallest_normal)) * float(info.eps)


def _torch_sample(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch's SDPA and log-sum-exp for one sample, [1, N, L, D], in v's dtype."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    # Torch lets a masked NaN through as 0 * NaN. Zeros instead change no finite result: whoever
    # sees the NaN is NaN, and is not compared.
    q, k = (torch.nan_to_num(t, 0.0, math.inf, -math.inf) for t in (q, k))
    v = torch.nan_to_num(v, 0.0, 0.0, 0.0)
    if scale < 0:  # exact, and spares us what some of torch's kernels make of a negative scale
        q, scale = -q, -scale
    mask = None if bool(seen.all()) else seen[None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    lse = torch.logsumexp(scores.masked_fill(~seen, -math.inf), dim=-1)
    return out, lse


def _shuffled(n: int, order: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(order))


def torch_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    q_lens: Any = None,
    k_lens: Any = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    order: int = 0,
) -> tuple[oracle.Array, oracle.Array]:
    """The same call through torch's SDPA at value's dtype; rows without a key stay 0 and -inf.

    order: 0: sums as they come; else keys and head_dim in one of the other orders, the same result.
    """
    batch, seqlen_q, heads_q, head_dim = query.shape
    seqlen_k = key.shape[1]
    out = np.zeros(query.shape)
    lse = np.full((batch, heads_q, seqlen_q), -np.inf)
    lens_q = oracle.as_lengths(q_lens, batch, seqlen_q)
    lens_k = oracle.as_lengths(k_lens, batch, seqlen_k)
    for b, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        seen = torch.from_numpy(oracle.visible(len_q, len_k, is_causal, window))
        rows = seen.any(dim=1)
        if not bool(rows.any()):
            continue
        q = query[b : b + 1, :len_q].detach().to("cpu", value.dtype).transpose(1, 2)[:, :, rows]
        k = key[b : b + 1, :len_k].detach().to("cpu", value.dtype).transpose(1, 2)
        v = value[b : b + 1, :len_k].detach().cpu().transpose(1, 2)
        seen = seen[rows]
        if order:
            dims, keys = (_shuffled(n, order) for n in (head_dim, len_k))
            q, k, v, seen = q[..., dims], k[..., keys, :][..., dims], v[:, :, keys], seen[:, keys]
        o, s = _torch_sample(q, k, v, seen, head_dim**-0.5 if scale is None else scale)
        real = np.flatnonzero(rows.numpy())
        out[b, real] = oracle.as_float64(o[0].transpose(0, 1))
        lse[b][:, real] = oracle.as_float64(s[0])
    return out, lse


def _largest_value(value: torch.Tensor, k_lens: Any) -> float:
    """Largest finite |value| among the real keys: padding may hold anything."""
    lens = oracle.as_lengths(k_lens, value.shape[0], value.shape[1])
    real = [value[b, :n].detach().double().abs().flatten() for b, n in enumerate(lens)]
    everything = torch.cat(real) if real else torch.zeros(0)
    everything = everything[everything.isfinite()]
    return float(everything.max()) if everything.numel() else 0.0


def _first(where: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(n) for n in np.argwhere(where)[0])


def _rms(x: oracle.Array) -> float:
    return float(np.sqrt(np.mean(x**2))) if x.size else 0.0


def judge(
    name: str,
    got: oracle.Array,
    want: oracle.Array,
    torch_says: list[oracle.Array],
    dtype: torch.dtype,
    largest: float,
) -> None:
    """Fails unless |got - want| is small, with NaN and infinities in the same places."""
    assert got.shape == want.shape, f"{name} has shape {got.shape}, expected {want.shape}"
    fine = np.isfinite(want)
    np.testing.assert_array_equal(got[~fine], want[~fine], f"{name}: NaN and infinities")
    lost = fine & ~np.isfinite(got)
    assert not lost.any(), f"{name} must be finite at {_first(lost)}, got {got[_first(lost)]}"
    if not fine.any():
        return
    error = np.zeros_like(want)
    error[fine] = np.abs(got[fine] - want[fine])
    theirs = [np.abs(t[fine & np.isfinite(t)] - want[fine & np.isfinite(t)]) for t in torch_says]

    worst_of_torch = max(float(e.max()) if e.size else 0.0 for e in theirs)
    floor = FLOOR_ULP * ulp(dtype, largest)
    allowed = FACTOR * worst_of_torch + floor
    place = np.unravel_index(int(error.argmax()), error.shape)
    assert error.max() <= allowed, (
        f"{name} is wrong by {error.max():.3e} at {tuple(int(n) for n in place)}, "
        f"allowed {allowed:.3e} = {FACTOR:g} * torch's {worst_of_torch:.3e} + {floor:.3e}"
    )
    # The largest error hides a small mistake in many numbers; their mean square does not.
    rms, rms_of_torch, rms_floor = (
        _rms(error[fine]),
        max(_rms(e) for e in theirs),
        FLOOR_ULP * ulp(dtype, _rms(want[fine])),
    )
    assert rms <= FACTOR * rms_of_torch + rms_floor, (
        f"{name} has an RMS error of {rms:.3e}, "
        f"allowed {FACTOR:g} * torch's {rms_of_torch:.3e} + {rms_floor:.3e}"
    )


def assert_close_to_oracle(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    lse: torch.Tensor | None = None,
    **call: Any,
) -> None:
    """out (and lse, if given) are as exact as torch's own SDPA times two (see this file's head).

    `call`: q_lens, k_lens, scale, is_causal, window. Rows without a key must be 0 and -inf.
    """
    assert out.dtype == query.dtype, f"out must have query's {query.dtype}, got {out.dtype}"
    want, want_lse = oracle.attention(query, key, value, **call)
    torchs = [torch_sdpa(query, key, value, **call, order=order) for order in range(ORDERS)]
    got = oracle.as_float64(out)
    wrong = np.isneginf(want_lse).transpose(0, 2, 1)[..., None] & (got != 0)
    assert not wrong.any(), f"out must be 0 in a row without a key, is not at {_first(wrong)}"
    largest = _largest_value(value, call.get("k_lens"))
    judge("out", got, want, [o for o, _ in torchs], query.dtype, largest)
    if lse is not None:
        assert lse.dtype == torch.float32, f"lse must be float32, got {lse.dtype}"
        got, finite = oracle.as_float64(lse), want_lse[np.isfinite(want_lse)]
        largest = max(1.0, float(np.abs(finite).max())) if finite.size else 1.0
        judge("lse", got, want_lse, [s for _, s in torchs], torch.float32, largest)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error, L2, in float64."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())
