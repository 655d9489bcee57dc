# SPDX-License-Identifier: Apache-2.0
"""run_listed.py - a call of an emulated kernel that takes lists of blocks, with torch tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_longlong
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu.args import Args, ListedArgs, Lists, PoolArgs
from emu.build import library
from emu.rows import CSRC, TileListed, helpers
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

AT_RANDOM = Schedule()
BLOCK = 64
Launcher = Callable[[ListedArgs, int, list[Any]], int]


def lists_at(memory: Memory, counts: Tensor, indices: Tensor) -> Lists:
    counts, indices = memory.add("counts", counts), memory.add("indices", indices)
    return Lists(
        *(counts.data_ptr(), indices.data_ptr()),
        *((c_longlong * 3)(*counts.stride()), (c_longlong * 4)(*indices.stride())),
        *(indices.shape[3], 0),
    )


def _survey(
    name: str, x: Tensor, lens: Tensor | None, scale: Tensor | None, to: Tensor, csrc: Path
) -> Tensor:
    """`to` after a pass of pool.cuh over the blocks of K or V."""
    batch, seqlen, heads, head_dim = x.shape
    helper, memory = helpers()[name], Memory()
    x, to = memory.add("x", x), memory.add("to", to, True)
    lens, scale = memory.maybe("lens", lens), memory.maybe("scale", scale)
    args = PoolArgs(
        *(_view(x), _lengths(lens), to.data_ptr()),
        scale.data_ptr() if scale is not None else None,
        *(batch, seqlen, heads, head_dim),
        (torch.float32, torch.float16, torch.bfloat16).index(x.dtype),
        int(to.dtype == torch.bfloat16),
    )
    warps = helper.num_threads // 32
    grid = -(-batch * heads * -(-seqlen // BLOCK) // warps)
    launch(library(helper, csrc), args, grid, memory.tensors)
    return to


def pooled(
    x: Tensor,
    lens: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    csrc: Path = CSRC,
) -> Tensor:
    """What wan_attn_pool makes of K or V: [batch, heads, blocks, head_dim]. Blocks without a real
    key stay NaN, which is not to be read."""
    batch, seqlen, heads, head_dim = x.shape
    to = torch.full((batch, heads, -(-seqlen // BLOCK), head_dim), math.nan, dtype=dtype)
    return _survey("wan_attn_pool", x, lens, scale, to, csrc)


def nonfinite(value: Tensor, lens: Tensor | None, csrc: Path = CSRC) -> Tensor:
    """What wan_attn_find_nonfinite makes of V: [batch, heads, blocks] int32, 0 or 1."""
    batch, seqlen, heads, _ = value.shape
    to = torch.full((batch, heads, -(-seqlen // BLOCK)), -7, dtype=torch.int32)
    return _survey("wan_attn_find_nonfinite", value, lens, None, to, csrc)


def run(
    tile: TileListed,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    counts: Tensor | None,
    indices: Tensor | None,
    pools_others: bool = False,
    skip_threshold: float = 0.0,
    lost_mass: Tensor | None = None,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    return_lse: bool = True,
    schedule: Schedule = AT_RANDOM,
    csrc: Path = CSRC,
    launcher: Launcher | None = None,
) -> Result:
    """As emu.run.run. counts and indices None: no lists. lost_mass: of the guard, one float32,
    which is raised. launcher: runs the kernel; None: emulated."""
    batch, seqlen_q, heads_q, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    v_scale = k_scale = pooled_k = pooled_v = bad = None
    keys, values = key, value
    if tile.pv_sum_f16:
        value, v_scale = scaled(value, LIMIT_SUM_F16)
    if tile.bf16_as_f16:
        (key, k_scale), (value, v_scale) = scaled(key, LIMIT_F16), scaled(value, LIMIT_F16)
    if pools_others:
        pooled_k = pooled(keys, k_lens, k_scale, key.dtype, csrc)
        pooled_v = pooled(values, k_lens, v_scale, value.dtype, csrc)
    if skip_threshold:
        bad = nonfinite(values, k_lens, csrc)
    out = torch.full(query.shape, math.nan, dtype=query.dtype)
    lse = torch.full((batch, heads_q, seqlen_q), math.nan) if return_lse else None
    memory = Memory()
    query, key, value = memory.add("q", query), memory.add("k", key), memory.add("v", value)
    out, lse = memory.add("out", out, True), memory.maybe("lse", lse, True)
    q_lens, k_lens = memory.maybe("q_lens", q_lens), memory.maybe("k_lens", k_lens)
    v_scale, k_scale = memory.maybe("v_scale", v_scale), memory.maybe("k_scale", k_scale)
    pooled_k, pooled_v = memory.maybe("pooled_k", pooled_k), memory.maybe("pooled_v", pooled_v)
    bad, told = memory.maybe("nonfinite", bad), memory.maybe("lost_mass", lost_mass, True)
    call = Args(
        *(_view(query), _view(key), _view(value), _view(out)),
        lse.data_ptr() if lse is not None else None,
        (c_longlong * 3)(*(lse.stride() if lse is not None else (0, 0, 0))),
        *(_lengths(q_lens), _lengths(k_lens)),
        v_scale.data_ptr() if v_scale is not None else None,
        k_scale.data_ptr() if k_scale is not None else None,
        *(0, 0, 1, max(1, -(-key.shape[1] // tile.block_n)), batch, heads_q),
        *(heads_q // key.shape[2], seqlen_q, key.shape[1], -(-seqlen_q // tile.block_m)),
        *(_bound(window[0]), 0 if is_causal else _bound(window[1])),
        *(int(query.dtype == torch.float32), int(out.dtype == torch.float32)),
        max(abs(scale) * LOG2_E, SMALLEST_SCALE),
        0x80008000 if scale < 0 else 0,
    )
    args = ListedArgs(call)
    if counts is not None and indices is not None:
        args.lists = lists_at(memory, counts, indices)
    if pooled_k is not None and pooled_v is not None:
        args.pooled_k, args.pooled_v = pooled_k.data_ptr(), pooled_v.data_ptr()
    if bad is not None:
        args.nonfinite, args.log2_threshold = bad.data_ptr(), math.log2(skip_threshold)
        args.lost_mass = told.data_ptr() if told is not None else None
    grid = call.m_blocks * heads_q * batch
    if launcher is not None:
        conflicts = launcher(args, grid, memory.tensors)
    else:
        conflicts = launch(library(tile, csrc), args, grid, memory.tensors, schedule)
    if lost_mass is not None and told is not None:
        lost_mass.copy_(told)
    return Result(out, lse, conflicts)
