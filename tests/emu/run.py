# SPDX-License-Identifier: Apache-2.0
"""run.py - a call of an emulated kernel with torch tensors: what the loader does on a GPU."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_char_p, c_int, c_longlong, c_ulonglong, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emu.args import Args, Lengths, View
from emu.build import library
from emu.rows import CSRC, Tile

UNBOUNDED = 1 << 29
SMALLEST_SCALE = 1.1754944e-38
LIMIT_SUM_F16, LIMIT_F16 = 1, 15  # of find_scale
LOG2_E = 1.4426950408889634
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


class Tensor_(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("data", c_void_p), ("bytes", c_longlong), ("output", c_int)]


@dataclass(frozen=True)
class Schedule:
    """How the emulated GPU takes its liberties: when copies land, who runs first."""

    landing: int = 2  # 0 early, 1 late, 2 random
    seed: int = 0
    check_order: bool = True


class EmulatorError(AssertionError):
    """What the emulated GPU found wrong with a kernel."""


@dataclass(frozen=True)
class Result:
    out: Tensor
    lse: Tensor | None
    bank_conflicts: int


def _view(x: Tensor) -> View:
    return View(x.data_ptr(), (c_longlong * 3)(x.stride(0), x.stride(1), x.stride(2)))


def _lengths(lens: Tensor | None) -> Lengths:
    if lens is None:
        return Lengths(None, 0, 0, 0)
    return Lengths(lens.data_ptr(), lens.stride(0), int(lens.dtype == torch.int64), 0)


class Memory:
    """The tensors of a launch, copied to places far from each other: what runs over the end of one
    must not depend on the allocator for being found in none. All of the storage behind a view may
    be read, as on a GPU; NaN marks what must not be."""

    GUARD = 1 << 18  # bytes; more than the rows of a block in any test
    LARGEST = 1 << 26  # what is larger stays where it is

    def __init__(self) -> None:
        self.tensors: list[Tensor_] = []
        self._places: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, x: Tensor, output: int = 0) -> Tensor:
        """The view x at its new place; views of one storage stay together."""
        whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
        if whole.data_ptr() not in self._places:
            place = whole
            if len(whole) <= self.LARGEST:
                place = torch.empty(len(whole) + 2 * self.GUARD, dtype=torch.uint8)
                place = place[self.GUARD : self.GUARD + len(whole)].copy_(whole)
            self._places[whole.data_ptr()] = whole, place
            known = Tensor_(name.encode(), place.data_ptr(), len(place), int(output))
            self.tensors += [known] if len(place) else []
        _, place = self._places[whole.data_ptr()]
        begin = place.storage_offset() // x.itemsize + x.storage_offset()
        return place.view(x.dtype).as_strided(x.shape, x.stride(), begin)

    def maybe(self, name: str, x: Tensor | None, output: bool = False) -> Tensor | None:
        return None if x is None else self.add(name, x, output)


def _bound(window: int) -> int:
    return UNBOUNDED if window < 0 else min(window, UNBOUNDED)


def launch(
    kernel: ctypes.CDLL,
    args: ctypes.Structure,
    grid: int,
    memory: list[Tensor_],
    schedule: Schedule = Schedule(),
) -> int:
    """Runs the grid and returns the number of bank conflicts."""
    assert kernel.emu_args_size() == ctypes.sizeof(args)
    message = ctypes.create_string_buffer(1024)
    conflicts = c_ulonglong()
    failed = kernel.emu_launch(
        *(ctypes.byref(args), grid, (Tensor_ * len(memory))(*memory), len(memory)),
        *(schedule.landing, c_ulonglong(schedule.seed), int(schedule.check_order)),
        *(message, len(message), ctypes.byref(conflicts)),
    )
    if failed:
        raise EmulatorError(message.value.decode())
    return conflicts.value


def scaled(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """What the pack kernels make of K or V: f16 values, and the powers of two by which each head
    was divided so that its largest finite number is between 2^(limit - 1) and 2^limit."""
    wide = x.float()
    largest = (
        torch.where(wide.isfinite(), wide.abs(), 0.0).amax(dim=(1, 3))
        if x.numel()
        else (torch.zeros(x.shape[0], x.shape[2]))
    )
    exponent = torch.frexp(largest)[1] - limit  # largest = fraction * 2^exponent, fraction below 1
    scale = torch.where(largest > 0, torch.exp2(exponent.float().clamp(-126, 126)), 1.0)
    return (wide / scale[:, None, :, None]).half(), scale.contiguous()


def run(
    tile: Tile,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    return_lse: bool = True,
    split_tiles: int = 0,
    schedule: Schedule = Schedule(),
    csrc: Path = CSRC,
) -> Result:
    """The oracle's arguments. split_tiles: key tiles of a part; out and lse then have the parts as
    first dimension, in float32."""
    kernel = library(tile, csrc)
    batch, seqlen_q, heads_q, head_dim = query.shape
    seqlen_k = key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    v_scale = k_scale = None
    if tile.pv_sum_f16:
        value, v_scale = scaled(value, LIMIT_SUM_F16)
    if tile.bf16_as_f16:
        (key, k_scale), (value, v_scale) = scaled(key, LIMIT_F16), scaled(value, LIMIT_F16)
    k_tiles = max(1, -(-seqlen_k // tile.block_n))
    splits = -(-k_tiles // split_tiles) if split_tiles else 1
    out_dtype = torch.float32 if split_tiles else query.dtype
    # Filled with NaN: an element that is not written shows.
    out = torch.full((splits, *query.shape), math.nan, dtype=out_dtype)
    lse = torch.full((splits, batch, heads_q, seqlen_q), math.nan) if return_lse else None
    memory = Memory()
    query, key, value = memory.add("q", query), memory.add("k", key), memory.add("v", value)
    out, lse = memory.add("out", out, True), memory.maybe("lse", lse, True)
    q_lens, k_lens = memory.maybe("q_lens", q_lens), memory.maybe("k_lens", k_lens)
    v_scale, k_scale = memory.maybe("v_scale", v_scale), memory.maybe("k_scale", k_scale)
    left, right = window
    args = Args(
        *(_view(query), _view(key), _view(value), _view(out[0])),
        lse.data_ptr() if lse is not None else None,
        (c_longlong * 3)(*(lse.stride()[1:] if lse is not None else (0, 0, 0))),
        *(_lengths(q_lens), _lengths(k_lens)),
        v_scale.data_ptr() if v_scale is not None else None,
        k_scale.data_ptr() if k_scale is not None else None,
        *(out.stride(0), lse.stride(0) if lse is not None else 0),
        *(splits, split_tiles or k_tiles, batch, heads_q),
        *(heads_q // key.shape[2], seqlen_q, seqlen_k, -(-seqlen_q // tile.block_m)),
        *(_bound(left), 0 if is_causal else _bound(right)),
        *(int(query.dtype == torch.float32), int(out_dtype == torch.float32)),
        max(abs(scale) * LOG2_E, SMALLEST_SCALE),
        0x80008000 if scale < 0 else 0,
    )
    grid = args.m_blocks * splits * heads_q * batch
    conflicts = launch(kernel, args, grid, memory.tensors, schedule)
    if split_tiles:
        return Result(out, lse, conflicts)
    return Result(out[0], lse[0] if lse is not None else None, conflicts)
