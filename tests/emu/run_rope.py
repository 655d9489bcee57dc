# SPDX-License-Identifier: Apache-2.0
"""run_rope.py - a call of an emulated kernel of rms_norm_rope with torch tensors: what the loader
does on a GPU (csrc/cuda/host/rope.c), written a second time."""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import Structure, c_float, c_int, c_longlong
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu.args import RopeArgs, View
from emu.build import library
from emu.rows import CSRC, RopeKernel, rope_kernels
from emu.run import Memory, Schedule, Tensor_, launch
from wan_attn.native.rope_call import RopeCall

NUMBER = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WORDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
VECTORS, WIDTH, MOST_THREADS, MOST_GRIDS = 4, 8, 512, 64

ANY_ORDER = Schedule()

# start(kernel, args, grid, tensors): runs it.
Start = Callable[[RopeKernel, Structure, int, list[Tensor_]], object]


def fits_vectors(
    x: Tensor, out: Tensor, weight: Tensor | None, table: Tensor | None, per_head: bool, norm: bool
) -> bool:
    """Whether rope.cuh takes the call; every call fits rope_any.cuh."""
    head_dim, slots = x.shape[3], x.shape[3] // WIDTH
    if head_dim % WIDTH or slots * -(-x.shape[2] // VECTORS) > MOST_THREADS:
        return False
    if norm and per_head and slots & (slots - 1):
        return False
    if table is not None and table.dim() == 4 and table.stride(2) != 0 and x.shape[2] > 1:
        return False
    for t in (x, out):
        strides = [t.stride(d) for d in range(3) if t.shape[d] > 1]
        if t.data_ptr() % 16 or any(s * t.element_size() % 16 for s in strides):
            return False
    return weight is None or weight.data_ptr() % 16 == 0


def _pair(x: float) -> Any:
    high = torch.tensor(x, dtype=torch.float64).float().item()
    return (c_float * 2)(high, x - high)


def _view(x: Tensor) -> View:
    return View(x.data_ptr(), (c_longlong * 3)(*x.stride()[:3]))


def _numbers(
    x: Tensor, weight: Tensor | None, eps: float | None, per_head: bool, rounds: bool
) -> dict[str, Any]:
    """What does not depend on where tensors lie."""
    heads, head_dim = x.shape[2:]
    slots = max(1, head_dim // WIDTH)
    rounds = rounds and eps is not None and x.dtype != torch.float32
    return {
        "inverse_size": _pair(1.0 / (head_dim * (1 if per_head else heads))),
        "eps": _pair(eps or 0.0),
        **{"seqlen": x.shape[1], "num_heads": heads, "head_dim": head_dim},
        "weight_head_stride": 0 if per_head else head_dim,
        **{"x_dtype": NUMBER[x.dtype], "has_norm": int(eps is not None)},
        **{"is_per_head": int(per_head), "rounds_n": int(rounds)},
        "rounds_y": int(rounds and weight is not None and weight.dtype == x.dtype),
        "slots": slots,
        "num_groups": -(-heads // VECTORS),
        "slot_factor": -(-65536 // slots),
    }


def run(
    *operands: Any,
    grid_on_device: bool = False,
    by_vectors: bool | None = None,
    out: Tensor | None = None,
    in_place: bool = False,
    schedule: Schedule = ANY_ORDER,
    csrc: Path = CSRC,
    arch: int | None = None,
    start: Start | None = None,
    **options: Any,
) -> Tensor:
    """The op's arguments.

    Args:
        by_vectors: rope.cuh or rope_any.cuh; None: as the loader chooses.
        out: where to write; None: a new tensor filled with NaN.
        in_place: out is x, of which a copy is made for it.
        start: runs a kernel; None: on the emulated GPU.
    """
    call, memory = RopeCall(*operands, **options), Memory()
    x, weight, table, grid_sizes = call[:4]
    if in_place:
        x = out = memory.add("x", x, 2)
    else:
        given = torch.full(x.shape, math.nan, dtype=call.dtype or x.dtype) if out is None else out
        x, out = memory.add("x", x), memory.add("out", given, 1)
    weight, table = memory.maybe("weight", weight), memory.maybe("table", table)
    args = RopeArgs(x=_view(x), out=_view(out), out_dtype=NUMBER[out.dtype], **_numbers(
        x, weight, call.eps, call.per_head, call.round_norm))  # fmt: skip
    args.seqlen_offset = call.seqlen_offset
    if weight is not None:
        args.weight, args.weight_dtype = weight.data_ptr(), NUMBER[weight.dtype]
    if table is not None:
        strides = [table.stride(0)] * 2 + [0] if table.dim() == 2 else list(table.stride()[:3])
        strides[2] *= x.shape[2] > 1  # a dimension of size 1 is never walked along
        args.table = View(table.data_ptr(), (c_longlong * 3)(*strides))
        args.table_is_f64 = int(table.dtype == torch.float64)
    if grid_sizes is not None:
        assert table is not None
        args.has_grid, args.positions = 1, table.shape[0]
        args.grid_is_i64 = int(grid_sizes.dtype == torch.int64)
        if grid_on_device:
            grid_sizes = memory.add("grid_sizes", grid_sizes)
            args.grid_sizes = grid_sizes.data_ptr()
            args.grid_strides = (c_longlong * 2)(*grid_sizes.stride())
        else:
            for b, sizes in enumerate(grid_sizes.tolist()):
                args.grids[b] = (c_int * 3)(*sizes)
    fits = fits_vectors(x, out, weight, table, call.per_head, call.eps is not None)
    is_vector = fits if by_vectors is None else by_vectors
    assert fits or not is_vector
    name = WORDS[x.dtype] if is_vector else "any"
    kernel = rope_kernels()[f"rms_norm_rope_{name}_sm75"]
    threads = args.slots * args.num_groups if is_vector else kernel.num_threads
    args.num_threads = -(-threads // 32) * 32
    grid = x.shape[0] * x.shape[1]
    if start is not None:
        start(kernel, args, grid, memory.tensors)
    else:
        conflicts = launch(library(kernel, csrc, arch), args, grid, memory.tensors, schedule)
        # Slots that are no power of two meet in a bank where a warp begins its second head.
        if not is_vector or args.slots & (args.slots - 1) == 0:
            assert conflicts == 0, f"{conflicts} bank conflicts"
    return out
