# SPDX-License-Identifier: Apache-2.0
"""backward_oracle.py - gradients of attention in numpy float64, straight from their formulas, and
what torch makes of the same call; shares no code with either.

For each sample and head: cut everything to the real lengths, all weights at once, no blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
from oracle import Array, as_float64, as_lengths
from tolerances import ORDERS, judge

NAMES = ("grad_query", "grad_key", "grad_value")


def one_head(
    q: Array, k: Array, v: Array, do: Array, dlse: Array, scale: float, seen: Any
) -> tuple[Array, Array, Array]:
    """Gradients of q [len_q, D] and of k, v [len_k, D] of one head."""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for i in np.flatnonzero(seen.any(axis=1)):
        s = seen[i]
        with np.errstate(invalid="ignore", over="ignore"):
            scores = scale * (k[s] @ q[i])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            dweights = v[s] @ do[i]
            dscores = weights * (dweights - weights @ dweights + dlse[i])
            dq[i] = scale * (dscores @ k[s])
            dk[s] += scale * np.outer(dscores, q[i])
            dv[s] += np.outer(weights, do[i])
    return dq, dk, dv


def gradients(
    grad_out: Any,
    grad_lse: Any,
    query: Any,
    key: Any,
    value: Any,
    *,
    q_lens: Any = None,
    k_lens: Any = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
) -> tuple[Array, Array, Array]:
    """Those of query, key and value, shaped like these; 0 where nothing is seen."""
    q, k, v, do = (as_float64(x) for x in (query, key, value, grad_out))
    batch, seqlen_q, heads_q, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    dlse = np.zeros((batch, heads_q, seqlen_q)) if grad_lse is None else as_float64(grad_lse)
    results = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    lens_q = as_lengths(q_lens, batch, seqlen_q)
    lens_k = as_lengths(k_lens, batch, k.shape[1])
    for b, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        seen = oracle.visible(len_q, len_k, is_causal, window)
        for h in range(heads_q):
            h_k = h // (heads_q // k.shape[2])
            found = one_head(
                *(q[b, :len_q, h], k[b, :len_k, h_k], v[b, :len_k, h_k], do[b, :len_q, h]),
                *(dlse[b, h, :len_q], scale, seen),
            )
            results[0][b, :len_q, h] += found[0]
            results[1][b, :len_k, h_k] += found[1]
            results[2][b, :len_k, h_k] += found[2]
    return results


def _torch_sample(
    operands: tuple[Tensor, ...], do: Tensor, dlse: Tensor | None, seen: Tensor, scale: float
) -> list[Tensor]:
    """Torch's own gradients for one sample, [1, N, L, D], in value's dtype. Zeros for NaN change no
    finite result: whoever sees one is NaN, and is not compared."""
    q, k, v = (torch.nan_to_num(t, 0.0, 0.0, 0.0).requires_grad_() for t in operands)
    groups = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    mask = None if bool(seen.all()) else seen[None, None]
    rows, scale = (q, scale) if scale >= 0 else (-q, -scale)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    out.backward(torch.nan_to_num(do, 0.0, 0.0, 0.0), retain_graph=True)
    if dlse is not None:
        scores = ((rows.float() @ keys.float().mT) * scale).masked_fill(~seen, -torch.inf)
        torch.logsumexp(scores, dim=-1).backward(dlse)
    return [t.grad[0].transpose(0, 1) for t in (q, k, v) if t.grad is not None]


def of_torch(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q_lens: Any = None,
    k_lens: Any = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    order: int = 0,
) -> tuple[Array, Array, Array]:
    """The same through torch's SDPA at value's dtype. order: as tolerances.torch_sdpa's; here rows
    are shuffled, too."""
    batch, seqlen_q, _, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    results = tuple(np.zeros(x.shape) for x in (query, key, value))
    lens_q, lens_k = as_lengths(q_lens, batch, seqlen_q), as_lengths(k_lens, batch, key.shape[1])
    for b, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        seen = torch.from_numpy(oracle.visible(len_q, len_k, is_causal, window))
        rows = seen.any(dim=1).nonzero()[:, 0]
        if not len(rows):
            continue
        keys, dims = torch.arange(len_k), torch.arange(head_dim)
        if order:
            dice = torch.Generator().manual_seed(order)
            rows, keys, dims = (
                x[torch.randperm(len(x), generator=dice)] for x in (rows, keys, dims)
            )

        def part(x: Tensor, at: Tensor, dims: Tensor = dims, b: int = b) -> Tensor:
            return x[b : b + 1].detach().to(value.dtype)[:, at][..., dims].transpose(1, 2)

        operands = (part(query, rows), part(key, keys), part(value, keys))
        dlse = None if grad_lse is None else grad_lse[b : b + 1].detach()[:, :, rows]
        found = _torch_sample(operands, part(grad_out, rows), dlse, seen[rows][:, keys], scale)
        for result, grad, at in zip(results, found, (rows, keys, keys), strict=True):
            heads = np.arange(grad.shape[1])
            result[b][np.ix_(at.numpy(), heads, dims.numpy())] = as_float64(grad)
    return results[0], results[1], results[2]


def assert_close(
    got: tuple[Tensor, ...],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **call: Any,
) -> None:
    """Each gradient is at most twice as far from float64's as torch's own (see tolerances.py).

    `call`: q_lens, k_lens, scale, is_causal, window.
    """
    inputs = (grad_out, grad_lse, query, key, value)
    want = gradients(*inputs, **call)
    torchs = [of_torch(*inputs, **call, order=order) for order in range(ORDERS)]
    for n, (name, x) in enumerate(zip(NAMES, (query, key, value), strict=True)):
        assert got[n].dtype == x.dtype and got[n].shape == x.shape
        finite = want[n][np.isfinite(want[n])]
        largest = float(np.abs(finite).max()) if finite.size else 0.0
        judge(
            *(name, as_float64(got[n]), want[n], [t[n] for t in torchs]),
            *(value.dtype, largest),
        )
