# SPDX-License-Identifier: Apache-2.0
"""run_sm90.py - a call of an emulated Hopper kernel: what the loader does, tensor maps included."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_int, c_longlong, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu.args import Args, View
from emu.build import library
from emu.rows import CSRC
from emu.rows_sm90 import TileSm90
from emu.run import (
    LOG2_E,
    SMALLEST_SCALE,
    UNBOUNDED,
    EmulatorError,
    Memory,
    Result,
    Schedule,
    _bound,
    _lengths,
    _view,
    launch,
)


class Sm90Args(ctypes.Structure):
    """wan_attn_cuda_sm90_args of csrc/cuda/args_sm90.h."""

    _fields_ = [
        *((name, c_ulonglong * 16) for name in ("q", "k", "v", "out")),
        ("call", Args),
        *(("stores_by_tma", c_int), ("unused", c_int * 15)),
        ("padding", c_int * (-(ctypes.sizeof(Args) + 64) % 64 // 4)),
    ]


def aligned_args() -> Sm90Args:
    """At a multiple of 64, as the struct asks for."""
    memory = ctypes.create_string_buffer(ctypes.sizeof(Sm90Args) + 64)
    return Sm90Args.from_buffer(memory, -ctypes.addressof(memory) % 64)


DEFAULT = Schedule()


def takes_tma(x: Tensor) -> bool:
    """What cuTensorMapEncodeTiled asks of base and strides; a stride of 0 is not known to be
    allowed."""
    strides = [x.stride(d) for d in range(3) if x.shape[d] > 1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)


def map_fields(x: Tensor, box_rows: int) -> tuple[list[int], list[int], list[int]]:
    """globalDim, globalStrides and boxDim of the map of one [batch, seqlen, heads, head_dim]
    operand: 64 columns of box_rows rows."""
    batch, seqlen, heads, head_dim = x.shape
    of_one = {1: 2 * x.shape[3], 2: 16, 0: 16}
    strides = [x.stride(d) * 2 if x.shape[d] > 1 else of_one[d] for d in (1, 2, 0)]
    return [head_dim, seqlen, heads, batch], strides, [64, box_rows, 1, 1]


def call_args(
    tile: TileSm90,
    query: Tensor,
    key: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
) -> Args:
    """wan_attn_cuda_args as args_sm90.h asks for them."""
    batch, seqlen_q, heads_q, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    left, right = window
    m_blocks = -(-seqlen_q // tile.block_m)
    m_blocks += -m_blocks % tile.cluster
    return Args(
        *(View(), View(), View(), _view(out)),
        lse.data_ptr() if lse is not None else None,
        (c_longlong * 3)(*(lse.stride() if lse is not None else (0, 0, 0))),
        *(_lengths(q_lens), _lengths(k_lens), None, None),
        *(0, 0, 1, UNBOUNDED // tile.block_n),
        *(batch, heads_q, heads_q // key.shape[2], seqlen_q, key.shape[1], m_blocks),
        *(_bound(left), 0 if is_causal else _bound(right)),
        *(0, int(out.dtype == torch.float32)),
        max(abs(scale) * LOG2_E, SMALLEST_SCALE),
        0x80008000 if scale < 0 else 0,
    )


def encode(kernel: ctypes.CDLL, at: int, x: Tensor, box_rows: int) -> None:
    size, strides, box = map_fields(x, box_rows)
    broken = kernel.emu_encode_tensor_map(
        *(c_void_p(at), c_void_p(x.data_ptr())),
        *((c_longlong * 4)(*size), (c_longlong * 3)(*strides), (c_int * 4)(*box), 1),
    )
    if broken:
        raise EmulatorError(f"tensor map breaks rule {broken}: {x.shape} {x.stride()}")


def run_sm90(
    tile: TileSm90,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = True,
    split_tiles: int = 0,
    schedule: Schedule = DEFAULT,
    csrc: Path = CSRC,
    out: Tensor | None = None,
    **call: Any,
) -> Result:
    """The oracle's arguments. out: where to write, filled with NaN; else a tensor like query."""
    assert split_tiles == 0 and all(takes_tma(x) for x in (query, key, value))
    kernel = library(tile, csrc)
    batch, seqlen_q, heads_q, _ = query.shape
    if out is None:
        out = torch.full(query.shape, math.nan, dtype=query.dtype)
    lse = torch.full((batch, heads_q, seqlen_q), math.nan) if return_lse else None
    memory, given = Memory(), out
    query, key, value = memory.add("q", query), memory.add("k", key), memory.add("v", value)
    out, lse = memory.add("out", out, True), memory.maybe("lse", lse, True)
    for name in ("q_lens", "k_lens"):
        call[name] = memory.maybe(name, call.get(name))
    args = aligned_args()
    args.call = call_args(tile, query, key, out, lse, **call)
    rows = tile.block_n // tile.cluster
    for name, x, box_rows in (("q", query, tile.block_m), ("k", key, rows), ("v", value, rows)):
        encode(kernel, ctypes.addressof(getattr(args, name)), x, box_rows)
    if out.dtype == query.dtype and takes_tma(out):
        encode(kernel, ctypes.addressof(args.out), out, 64)
        args.stores_by_tma = 1
    grid = args.call.m_blocks * heads_q * batch
    conflicts = launch(kernel, args, grid, memory.tensors, schedule)
    return Result(given.copy_(out), lse, conflicts)
