# SPDX-License-Identifier: Apache-2.0
"""run_qk8.py - a call of an attention kernel with 8-bit scores, with torch tensors; with lists of
blocks, if the kernel is for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_longlong
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracle
import qk8_oracle
from emu import qk8
from emu.args import Args, ListedArgs, View
from emu.build import library
from emu.qk8 import KEYS, Integers
from emu.rows import CSRC, TileQk8
from emu.run import (
    LIMIT_F16,
    LIMIT_SUM_F16,
    LOG2_E,
    SMALLEST_SCALE,
    Memory,
    Result,
    Schedule,
    _bound,
    _lengths,
    _view,
    launch,
    scaled,
)
from emu.run_listed import lists_at

AT_RANDOM = Schedule()
Launcher = Callable[[Args | ListedArgs, int, list[Any]], int]


def packed(
    query: Tensor,
    key: Tensor,
    *,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    scale: float | None = None,
    **_: Any,
) -> Integers:
    """What the passes make, by numpy alone: test_emu_qk8.py has shown that they do."""
    batch, seqlen_q, heads_q, head_dim = query.shape
    seqlen_k, heads_k = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    tiles = max(1, -(-seqlen_k // KEYS))
    keys = np.zeros((batch, heads_k, tiles, KEYS * (head_dim + 8)), np.int8)
    queries = np.full((batch, heads_q, seqlen_q, head_dim), 0x55, np.int8)
    rows = np.full((batch, heads_q, seqlen_q, 2), math.nan, np.float32)
    places = np.array([qk8.place_of_step(n) for n in range(KEYS)])
    order = qk8.chunk_order(head_dim).numpy()
    with np.errstate(all="ignore"):
        for b in range(batch):
            len_q, len_k = (
                oracle.as_lengths(lens, batch, n)[b]
                for lens, n in ((q_lens, seqlen_q), (k_lens, seqlen_k))
            )
            means = []
            for h in range(heads_k):
                x = oracle.as_float64(key[b, :len_k, h]).astype(np.float32)
                means.append(qk8_oracle.mean_of(x))
                whole: Any = np.zeros((tiles * KEYS, head_dim), np.int64)
                steps = np.zeros(tiles * KEYS, np.float32)
                if len_k:
                    whole[:len_k], steps[:len_k] = qk8_oracle.quantised(x - means[h])
                whole = whole.reshape(tiles, KEYS, head_dim // 16, 16)
                chunks = np.zeros_like(whole)
                chunks[:, np.arange(KEYS)[:, None], order] = whole
                placed = np.zeros((tiles, KEYS), np.float32)
                placed[:, places] = steps.reshape(tiles, KEYS)
                keys[b, h, :, : KEYS * head_dim] = chunks.reshape(tiles, -1)
                keys[b, h, :, KEYS * head_dim : KEYS * (head_dim + 4)] = placed.view(np.int8)
            for h in range(heads_q):
                x = oracle.as_float64(query[b, :len_q, h]).astype(np.float32)
                if not len_q:
                    continue
                sign = np.copysign(np.float32(1.0), np.float32(scale))
                queries[b, h, :len_q], step = qk8_oracle.quantised(sign * x)
                factor = step.astype(np.float64) * (abs(scale) * LOG2_E / head_dim)
                factor = np.where(factor < SMALLEST_SCALE, SMALLEST_SCALE, factor)
                rows[b, h, :len_q, 0] = np.minimum(factor, 2.0**127)
                mean = means[h * heads_k // heads_q].astype(np.float64)
                rows[b, h, :len_q, 1] = scale * (x.astype(np.float64) @ mean)
    nothing = torch.zeros(0)
    packed, rotated, numbers = (torch.from_numpy(x) for x in (keys, queries, rows))
    return Integers(packed, rotated, numbers, nothing, nothing)


def run(
    tile: TileQk8,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    return_lse: bool = True,
    split_tiles: int = 0,
    counts: Tensor | None = None,
    indices: Tensor | None = None,
    schedule: Schedule = AT_RANDOM,
    csrc: Path = CSRC,
    integers: Callable[..., Integers] = packed,
    launcher: Launcher | None = None,
    **lens_and_scale: Any,
) -> Result:
    """The oracle's arguments; split_tiles as emu.run; counts, indices: the lists. launcher: runs
    the kernel; None: emulated."""
    batch, seqlen_q, heads_q, head_dim = query.shape
    made = integers(query, key, wants_lse=True, **lens_and_scale)
    v_scale = None
    if tile.v_is_scaled:
        value, v_scale = scaled(value, LIMIT_SUM_F16 if tile.pv_sum_f16 else LIMIT_F16)
    k_tiles = max(1, -(-key.shape[1] // tile.block_n))
    splits = -(-k_tiles // split_tiles) if split_tiles else 1
    out_dtype = torch.float32 if split_tiles else query.dtype
    out = torch.full((splits, *query.shape), math.nan, dtype=out_dtype)
    lse = torch.full((splits, batch, heads_q, seqlen_q), math.nan) if return_lse else None
    memory = Memory()
    value, out = memory.add("v", value), memory.add("out", out, True)
    keys, queries = memory.add("keys", made.keys), memory.add("queries", made.queries)
    rows, lse = memory.add("rows", made.rows), memory.maybe("lse", lse, True)
    v_scale = memory.maybe("v_scale", v_scale)
    q_lens, k_lens = (memory.maybe(name, lens_and_scale.get(name)) for name in ("q_lens", "k_lens"))
    nowhere = (c_longlong * 3)(0, 0, 0)
    call = Args(
        *(View(queries.data_ptr(), nowhere), View(keys.data_ptr(), nowhere)),
        *(_view(value), _view(out[0])),
        lse.data_ptr() if lse is not None else None,
        (c_longlong * 3)(*(lse.stride()[1:] if lse is not None else (0, 0, 0))),
        *(_lengths(q_lens), _lengths(k_lens)),
        *(v_scale.data_ptr() if v_scale is not None else None, rows.data_ptr()),
        *(out.stride(0), lse.stride(0) if lse is not None else 0),
        *(splits, split_tiles or k_tiles, batch, heads_q),
        *(heads_q // key.shape[2], seqlen_q, key.shape[1], -(-seqlen_q // tile.block_m)),
        *(_bound(window[0]), 0 if is_causal else _bound(window[1])),
        *(0, int(out_dtype == torch.float32), 1.0, 0),
    )
    grid = call.m_blocks * splits * heads_q * batch
    args: Args | ListedArgs = call
    if counts is not None and indices is not None:
        args = ListedArgs(call, lists_at(memory, counts, indices))
    if launcher is not None:
        conflicts = launcher(args, grid, memory.tensors)
    else:
        conflicts = launch(library(tile, csrc), args, grid, memory.tensors, schedule)
    if split_tiles:
        return Result(out, lse, conflicts)
    return Result(out[0], lse[0] if lse is not None else None, conflicts)
