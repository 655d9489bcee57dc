# SPDX-License-Identifier: Apache-2.0
"""real.py - Wan's own calls against float64, and offsets that 32 bits do not hold."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_attn.bench import accuracy, kernels, peers
from wan_attn.check.calls import Detail, WrongError, lens_tensor
from wan_attn.check.target import Kernel, Target
from wan_attn.log import dtype_name

PADDING = 77  # keys at the end that are not real
LOSSY_FACTOR = 20.0


@dataclass(frozen=True)
class Case:
    """A real call with NaN behind its keys, its exact result and how far torch is from that."""

    operands: tuple[Tensor, Tensor, Tensor]
    k_lens: tuple[int, ...]
    exact: accuracy.Reference
    torch_error: accuracy.Error


@functools.lru_cache(maxsize=1)
def case(target: Target, name: str, dtype: torch.dtype) -> Case:
    """Rows of every head, against float64 in pieces; the last keys are padding."""
    call = target.sizes.find(name)
    query, key, value = kernels.operands(call, dtype, None, target.device)
    used = max(1, call.seqlen_k - PADDING)
    exact = accuracy.reference(query, key, value, [used] * call.batch)
    torchs = next(p for p in peers.all_peers(target.device) if p.name == peers.BASELINE)
    torch_error = accuracy.error(torchs.run(query, key[:, :used], value[:, :used]), exact)
    key[:, used:] = math.nan
    value[:, used:] = math.nan
    return Case((query, key, value), (used,) * call.batch, exact, torch_error)


def check_wan(target: Target, kernel: Kernel, name: str) -> Detail:
    """One of Wan's calls: error at most twice torch's, and a rounding of the output."""
    dtype = kernel.dtype
    found = case(target, name, dtype)
    out, _ = target.run(kernel.row, found.operands, None, lens_tensor(found.k_lens))
    error = accuracy.error(out, found.exact)
    del out
    # Twice torch's error, as FlashAttention's tests have it; what torch computes exactly may still
    # be rounded to the output's dtype, at the largest value there.
    typical = float(found.exact.out.abs().amax())
    factor = LOSSY_FACTOR if kernel.row.is_lossy else 1.0
    eps = torch.finfo(dtype).eps
    allowed = factor * (2 * found.torch_error.max + 2 * eps * typical)
    allowed_rms = factor * (2 * found.torch_error.relative_rms + eps / 4)
    if not error.max <= allowed:  # NaN is wrong
        raise WrongError(f"max error {error.max:.3e}, allowed {allowed:.3e}")
    if not error.relative_rms <= allowed_rms:
        said = f"relative rms error {error.relative_rms:.3e}, allowed {allowed_rms:.3e}"
        raise WrongError(said)
    return {
        "dtype": dtype_name(dtype),
        "max_error": error.max,
        "torch_max_error": found.torch_error.max,
        "allowed": allowed,
        "relative_rms": error.relative_rms,
        "torch_relative_rms": found.torch_error.relative_rms,
    }


def check_offsets(target: Target, kernel: Kernel, _: str) -> Detail:
    """The last sample of a query and output beyond the limit; then keys whose rows lie far apart.

    Both parts need memory that not every device has.
    """
    case.cache_clear()
    target.drop_memory()
    sizes, done = target.sizes, Detail()
    free = target.free_bytes() or 0
    for is_wanted, part, share in (
        (sizes.far_queries, _far_queries, 2.2),
        (True, _far_keys, 1.1),
    ):
        needed = share * sizes.far * kernel.dtype.itemsize + sizes.far / 2
        if is_wanted and free >= needed:
            done |= part(target, kernel)
        elif is_wanted:
            why = f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
            done |= {f"no{part.__name__}".replace("_", " "): why}
    if not any(isinstance(value, int) for value in done.values()):
        return {"skipped": "; ".join(f"{name}: {why}" for name, why in done.items())}
    return done


def _far_queries(target: Target, kernel: Kernel) -> Detail:
    limit, dtype, device = target.sizes.far, kernel.dtype, target.device
    head_dim = kernel.head_dim_near(128)
    # As few samples as blocks of a card still share well.
    seqlen, heads = (16384, 8) if limit >= 1 << 28 else (128, 4)
    batch = limit // (seqlen * heads * head_dim) + 1
    query = torch.zeros(batch, seqlen, heads, head_dim, dtype=dtype, device=device)
    key, value = (
        torch.randn(batch, 48, heads, head_dim, device=device).to(dtype) for _ in range(2)
    )
    query[-1] = torch.randn(seqlen, heads, head_dim, device=device).to(dtype)
    out, _ = target.run(kernel.row, (query, key, value))
    last = query[-1:].clone(), key[-1:], value[-1:]
    alone, _ = target.run(kernel.row, last)
    if not torch.equal(out[-1:], alone):
        raise WrongError("the last sample differs from the same sample alone")
    return {"elements": query.numel()}


def _far_keys(target: Target, kernel: Kernel) -> Detail:
    """Keys and values whose last row begins beyond the limit."""
    limit, dtype, device, rows = target.sizes.far, kernel.dtype, target.device, 64
    head_dim = kernel.head_dim_near(128)
    stride = limit // (rows - 1) // 64 * 64 + 64
    buffer = torch.empty((rows - 1) * stride + head_dim, dtype=dtype, device=device)
    far = buffer.as_strided((1, rows, 1, head_dim), (1, stride, head_dim, 1))
    near = torch.randn(1, rows, 1, head_dim, device=device).to(dtype)
    far.copy_(near)
    out, _ = target.run(kernel.row, (near, far, far))
    same, _ = target.run(kernel.row, (near, near, near))
    if not torch.equal(out, same):
        raise WrongError("keys far apart give other bits than the same keys side by side")
    return {"row_stride": stride}
