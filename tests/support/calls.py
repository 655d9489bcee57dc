# SPDX-License-Identifier: Apache-2.0
"""calls.py - builds the calls that tests make: operands in every layout, poisoned padding, rows."""

from __future__ import annotations

import math
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

from tolerances import assert_close_to_oracle
from wan_attn.native import op

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
# (query, key, value): what the contract takes. Wan2.2 itself calls with the first mixed one.
MIXED = ((F32, F32, BF16), (F32, F32, F16), (F32, BF16, BF16), (F16, F32, F16))

NAMES = {F32: "f32", F16: "f16", BF16: "bf16"}


def can_run(row: op.KernelInfo) -> bool:
    """Whether this machine has what the row needs."""
    if row.device == "cpu":
        return set(row.cpu_features) <= set(op.cpu_features())
    if not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability()
    return row.arch_min <= 10 * major + minor <= row.arch_max


def rows() -> list[op.KernelInfo | None]:
    """Every exact row that can run here. Without the native library: None, which is the op as it
    is."""
    if op.binding() == "torch":
        return [None]
    return [row for row in op.kernels() if can_run(row) and not row.is_lossy]


def row_id(row: op.KernelInfo | None) -> str:
    return row.name if row else "torch"


def head_dim_for(row: op.KernelInfo | None, wanted: int) -> int:
    """The head_dim nearest to `wanted` that the row takes."""
    if row is None:
        return wanted
    return min(max(wanted, row.head_dim_min), row.head_dim_max)


def dtypes_for(row: op.KernelInfo | None) -> tuple[torch.dtype, ...]:
    return row.dtypes if row else DTYPES


def operands(
    batch: int = 1,
    seqlen_q: int = 17,
    seqlen_k: int = 33,
    heads_q: int = 2,
    heads_k: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype | tuple[torch.dtype, torch.dtype, torch.dtype] = F32,
    peaky: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random contiguous [batch, seqlen, heads, head_dim] operands; `peaky` scales query."""
    heads_k = heads_q if heads_k is None else heads_k
    of_q, of_k, of_v = dtype if isinstance(dtype, tuple) else (dtype, dtype, dtype)
    return (
        (peaky * torch.randn(batch, seqlen_q, heads_q, head_dim)).to(of_q),
        torch.randn(batch, seqlen_k, heads_k, head_dim).to(of_k),
        torch.randn(batch, seqlen_k, heads_k, head_dim).to(of_v),
    )


def as_lens(lens: list[int] | Tensor | None, dtype: torch.dtype = torch.int64) -> Tensor | None:
    return torch.tensor(lens, dtype=dtype) if isinstance(lens, list) else lens


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    row: op.KernelInfo | None = None,
    q_lens: list[int] | Tensor | None = None,
    k_lens: list[int] | Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """torch.ops.wan_attn.sdpa with the oracle's arguments, on the row's device."""
    device = row.device if row else "cpu"
    out, lse = torch.ops.wan_attn.sdpa(
        query.to(device),
        key.to(device),
        value.to(device),
        as_lens(q_lens),
        as_lens(k_lens),
        window_left=window[0],
        window_right=window[1],
        kernel=row.index if row else -1,
        **options,
    )
    return out.cpu(), lse.cpu()


def check(
    row: op.KernelInfo | None, query: Tensor, key: Tensor, value: Tensor, **call: Any
) -> tuple[Tensor, Tensor]:
    """Runs the call on this row and holds out and lse against the oracle."""
    out, lse = sdpa(query, key, value, row=row, return_lse=True, **call)
    assert_close_to_oracle(out, query, key, value, lse=lse, **call)
    return out, lse


def poisoned(x: Tensor, lens: list[int], poison: float = math.nan) -> Tensor:
    """A copy of [batch, seqlen, ...] with everything behind each sample's length overwritten."""
    x = x.clone()
    for b, n in enumerate(lens):
        x[b, n:] = poison
    return x


def reserve(elements: int, dtype: torch.dtype) -> Tensor | None:
    """Address space without memory behind it: pages appear as they are written. None: not here."""
    no_reserve = 0x4000  # MAP_NORESERVE, which the mmap module does not name before Python 3.13
    if sys.platform != "linux":
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    try:
        space = mmap.mmap(-1, elements * dtype.itemsize, flags)
    except OSError:  # an address-space limit
        return None
    return torch.frombuffer(space, dtype=dtype)


# Layouts: each takes a contiguous tensor and returns the same values, seen through other strides.


def inside_poison(x: Tensor) -> Tensor:
    """A view into a larger buffer whose every other element is NaN."""
    batch, seqlen, heads, head_dim = x.shape
    buffer = torch.full((batch + 1, seqlen + 3, heads + 1, head_dim + 5), math.nan, dtype=x.dtype)
    view = buffer[1:, 2 : 2 + seqlen, :heads, 3 : 3 + head_dim]
    view.copy_(x)
    return view


def from_heads_first(x: Tensor) -> Tensor:
    """[batch, heads, seqlen, head_dim] memory, as torch's own SDPA wants it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def from_batch_second(x: Tensor) -> Tensor:
    """[seqlen, batch, heads, head_dim] memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def every_other_row(x: Tensor) -> Tensor:
    """Row stride twice what it needs to be, NaN between."""
    batch, seqlen, heads, head_dim = x.shape
    buffer = torch.full((batch, 2 * seqlen, heads, head_dim), math.nan, dtype=x.dtype)
    view = buffer[:, ::2]
    view.copy_(x)
    return view


LAYOUTS = (inside_poison, from_heads_first, from_batch_second, every_other_row)


def doubled_last_stride(x: torch.Tensor) -> torch.Tensor:
    """As x, but no two elements of its last dimension side by side."""
    return torch.zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
