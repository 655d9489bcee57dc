# SPDX-License-Identifier: Apache-2.0
"""calls.py - calls of kernels on the machine, with torch tensors: what the loader does on a GPU."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_int, c_longlong, c_ulonglong
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu import run_qk8
from emu.args import Args, ListedArgs, View
from emu.rows import CSRC, Job, TileQk8, TileSm90
from emu.run import (
    LIMIT_F16,
    LIMIT_SUM_F16,
    LOG2_E,
    SMALLEST_SCALE,
    UNBOUNDED,
    Memory,
    Result,
    Schedule,
    _bound,
    _lengths,
    _view,
    scaled,
)
from ptx import maps
from ptx.collect import Compiler, ptx_of
from ptx.machine import Knobs, Program, knobs_of, launch, program


class Sm90Args(ctypes.Structure):
    """wan_attn_cuda_sm90_args of csrc/cuda/args_sm90.h."""

    _fields_ = [
        *((name, c_ulonglong * 16) for name in ("q", "k", "v", "out")),
        ("call", Args),
        *(("stores_by_tma", c_int), ("unused", c_int * 15)),
        ("padding", c_int * (-(ctypes.sizeof(Args) + 64) % 64 // 4)),
    ]


@cache
def _program_of(text: str) -> Program:
    return program(text)


def kernel(job: Job, compiler: Compiler, csrc: Path = CSRC) -> Program:
    """The job's kernel as this compiler makes it. One program for one text: sources at the same
    place may have changed."""
    return _program_of(ptx_of(job, compiler, csrc))


@dataclass(frozen=True)
class Runner:
    """Runs calls of one attention kernel; fits where cases.check wants a function."""

    job: Job
    compiler: Compiler
    csrc: Path = CSRC
    knobs: Knobs | None = None  # None: as the case's schedule has it

    @property
    def tile(self) -> Any:
        return self.job.kernel

    @property
    def program(self) -> Program:
        return kernel(self.job, self.compiler, self.csrc)

    def __call__(self, _tile: Any, *operands: Tensor, **options: Any) -> Result:
        knobs = self.knobs or knobs_of(options.get("schedule", Schedule()))
        options = {name: x for name, x in options.items() if name not in ("schedule", "csrc")}
        if isinstance(self.tile, TileQk8):
            return _run_qk8(self, knobs, *operands, **options)
        run = _run_sm90 if isinstance(self.tile, TileSm90) else _run
        return run(self, knobs, *operands, **options)


def _args(
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor | None,
    m_blocks: int,
    call: dict[str, Any],
) -> Args:
    """wan_attn_cuda_args as args.h asks for them; out and lse have the parts as first dimension."""
    query, key, value = operands
    batch, seqlen_q, heads_q, head_dim = query.shape
    scale = call["scale"] if call["scale"] is not None else head_dim**-0.5
    left, right = call["window"]
    v_scale, k_scale = call.get("v_scale"), call.get("k_scale")
    return Args(
        *(_view(query), _view(key), _view(value), _view(out[0])),
        lse.data_ptr() if lse is not None else None,
        (c_longlong * 3)(*(lse.stride()[1:] if lse is not None else (0, 0, 0))),
        *(_lengths(call["q_lens"]), _lengths(call["k_lens"])),
        v_scale.data_ptr() if v_scale is not None else None,
        k_scale.data_ptr() if k_scale is not None else None,
        *(out.stride(0), lse.stride(0) if lse is not None else 0),
        *(len(out), call["split_tiles"], batch, heads_q),
        *(heads_q // key.shape[2], seqlen_q, key.shape[1], m_blocks),
        *(_bound(left), 0 if call["is_causal"] else _bound(right)),
        *(int(query.dtype == torch.float32), int(out.dtype == torch.float32)),
        max(abs(scale) * LOG2_E, SMALLEST_SCALE),
        0x80008000 if scale < 0 else 0,
    )


_NOTHING: dict[str, Any] = {"q_lens": None, "k_lens": None, "scale": None, "is_causal": False}
_NOTHING |= {"window": (-1, -1)}


def _run(
    runner: Runner,
    knobs: Knobs,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = True,
    split_tiles: int = 0,
    **options: Any,
) -> Result:
    """The oracle's arguments. split_tiles: key tiles of a part; out and lse then have the parts
    as first dimension, in float32."""
    tile, call = runner.tile, {**_NOTHING, **options}
    batch, seqlen_q, heads_q, _ = query.shape
    v_scale = k_scale = None
    if tile.pv_sum_f16:
        value, v_scale = scaled(value, LIMIT_SUM_F16)
    if tile.bf16_as_f16:
        (key, k_scale), (value, v_scale) = scaled(key, LIMIT_F16), scaled(value, LIMIT_F16)
    k_tiles = max(1, -(-key.shape[1] // tile.block_n))
    splits = -(-k_tiles // split_tiles) if split_tiles else 1
    out_dtype = torch.float32 if split_tiles else query.dtype
    # Filled with NaN: an element that is not written shows.
    out = torch.full((splits, *query.shape), math.nan, dtype=out_dtype)
    lse = torch.full((splits, batch, heads_q, seqlen_q), math.nan) if return_lse else None
    memory = Memory()
    operands = (memory.add("q", query), memory.add("k", key), memory.add("v", value))
    out, lse = memory.add("out", out, True), memory.maybe("lse", lse, True)
    extra = {"q_lens": call["q_lens"], "k_lens": call["k_lens"]}
    extra |= {"v_scale": v_scale, "k_scale": k_scale}
    call |= {name: memory.maybe(name, x) for name, x in extra.items()}
    call["split_tiles"] = split_tiles or k_tiles
    args = _args(operands, out, lse, -(-seqlen_q // tile.block_m), call)
    grid = args.m_blocks * splits * heads_q * batch
    launch(
        *(runner.program, args, grid, memory.tensors),
        shared_bytes=tile.smem_bytes,
        threads=32 * tile.num_warps,
        knobs=knobs,
    )
    if split_tiles:
        return Result(out, lse, 0)
    return Result(out[0], lse[0] if lse is not None else None, 0)


def _run_qk8(runner: Runner, knobs: Knobs, *operands: Tensor, **options: Any) -> Result:
    tile = runner.tile

    def launcher(args: Args | ListedArgs, grid: int, tensors: list[Any]) -> int:
        how = {"shared_bytes": tile.smem_bytes, "threads": tile.num_threads, "knobs": knobs}
        launch(runner.program, args, grid, tensors, **how)
        return 0

    return run_qk8.run(tile, *operands, launcher=launcher, **options)


def takes_tma(x: Tensor) -> bool:
    """What the host asks before it makes maps: README.md, "Launch: sdpa_sm90.cuh"."""
    strides = [x.stride(d) for d in range(3) if x.shape[d] > 1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)


def _run_sm90(
    runner: Runner,
    knobs: Knobs,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = True,
    split_tiles: int = 0,
    out: Tensor | None = None,
    **options: Any,
) -> Result:
    """The oracle's arguments. out: where to write, filled with NaN; else a tensor like query."""
    assert split_tiles == 0 and all(takes_tma(x) for x in (query, key, value))
    tile, call = runner.tile, {**_NOTHING, **options}
    batch, seqlen_q, heads_q, _ = query.shape
    given = torch.full(query.shape, math.nan, dtype=query.dtype) if out is None else out
    lse = torch.full((batch, heads_q, seqlen_q), math.nan) if return_lse else None
    memory = Memory()
    query, key, value = memory.add("q", query), memory.add("k", key), memory.add("v", value)
    out, lse = memory.add("out", given, True), memory.maybe("lse", lse, True)
    call |= {name: memory.maybe(name, call[name]) for name in ("q_lens", "k_lens")}
    call["split_tiles"] = UNBOUNDED // tile.block_n
    room = ctypes.create_string_buffer(ctypes.sizeof(Sm90Args) + 64)
    args = Sm90Args.from_buffer(room, -ctypes.addressof(room) % 64)
    m_blocks = -(-seqlen_q // tile.block_m)
    m_blocks += -m_blocks % tile.cluster
    whole = None if lse is None else lse[None]
    args.call = _args((query, key, value), out[None], whole, m_blocks, call)
    args.call.q = args.call.k = args.call.v = View()  # only their maps are read
    args.call.out_split_stride = args.call.lse_split_stride = 0
    rows = tile.block_n // tile.cluster
    for name, x, box_rows in (("q", query, tile.block_m), ("k", key, rows), ("v", value, rows)):
        maps.of_operand(x, box_rows).encode(ctypes.addressof(getattr(args, name)))
    if out.dtype == query.dtype and takes_tma(out):
        maps.of_operand(out, 64).encode(ctypes.addressof(args.out))
        args.stores_by_tma = 1
    launch(
        *(runner.program, args, m_blocks * heads_q * batch, memory.tensors),
        shared_bytes=tile.smem_bytes,
        threads=128 * (1 + tile.consumers),
        knobs=knobs,
    )
    return Result(given.copy_(out), lse, 0)


def with_knobs(runner: Runner, **knobs: int) -> Runner:
    """The same kernel; knobs not named as they are by default."""
    return replace(runner, knobs=Knobs(**knobs))
