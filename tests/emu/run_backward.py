# SPDX-License-Identifier: Apache-2.0
"""run_backward.py - a gradient by emulated kernels with torch tensors: all passes, in the order
that csrc/cuda/args_backward.h asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from ctypes import Structure, c_longlong
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu.args import Lengths, View
from emu.args_backward import BackwardArgs, BackwardRowsArgs, BackwardScaleArgs
from emu.build import library
from emu.rows import CSRC, Helper, TileBackward, helpers, tiles_backward
from emu.run import DTYPES, LOG2_E, Memory, Schedule, _bound, _lengths, _view, launch

NUMBER = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NOWHERE = View(None, (c_longlong * 3)(0, 0, 0))
AT_RANDOM = Schedule()
# A kernel, its argument, blocks, tensors; bank conflicts.
Launcher = Callable[[Helper | TileBackward, Structure, int, list[Any]], int]
PARTS = 3  # of v, in which its largest value is sought


@dataclass(frozen=True)
class Pair:
    """The two kernels of a row for one dtype and class of GPU."""

    of_keys: TileBackward
    of_rows: TileBackward

    @property
    def name(self) -> str:
        """sdpa_backward_sm80_bf16_d64_slim."""
        return self.of_rows.name.replace("_dq_", "_")

    @property
    def dtype(self) -> str:
        return self.of_keys.dtype

    @property
    def head_dim(self) -> int:
        return self.of_keys.head_dim

    @property
    def block_m(self) -> int:
        return self.of_rows.block_m

    @property
    def block_n(self) -> int:
        return self.of_keys.block_n


@cache
def pairs() -> tuple[Pair, ...]:
    found: dict[tuple[str, ...], list[TileBackward]] = {}
    for tile in tiles_backward():
        found.setdefault((tile.row, tile.dtype, tile.gpu_class), []).append(tile)
    return tuple(Pair(*sorted(two, key=lambda t: not t.of_keys)) for two in found.values())


@dataclass(frozen=True)
class Gradients:
    """Of query, key and value."""

    grads: tuple[Tensor, Tensor, Tensor]
    bank_conflicts: int
    scales: Tensor | None


@dataclass(frozen=True)
class Call:
    """What forward was called with, and what it left."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None = None
    q_lens: Tensor | None = None
    k_lens: Tensor | None = None
    scale: float | None = None
    is_causal: bool = False
    window: tuple[int, int] = (-1, -1)

    @property
    def bounds(self) -> tuple[int, int]:
        left, right = self.window
        return _bound(left), 0 if self.is_causal else _bound(right)

    @property
    def share(self) -> int:
        return self.query.shape[2] // self.key.shape[2]


def _strides(x: Tensor | None) -> c_longlong * 3:  # type: ignore[valid-type]
    return (c_longlong * 3)(*(x.stride() if x is not None else (0, 0, 0)))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def emulator(csrc: Path = CSRC, schedule: Schedule = AT_RANDOM) -> Launcher:
    def launch_one(kernel: Any, args: Structure, grid: int, tensors: list[Any]) -> int:
        return launch(library(kernel, csrc), args, grid, tensors, schedule)

    return launch_one


def _helper(name: str, args: Structure, warps: int, memory: Memory, launcher: Launcher) -> None:
    assert launcher(helpers()[name], args, -(-warps // 4), memory.tensors) == 0


def row_numbers(
    call: Call, with_sizes: bool, csrc: Path = CSRC, launcher: Launcher | None = None
) -> tuple[Tensor, Tensor | None]:
    """What wan_attn_backward_rows makes: rows, sizes."""
    batch, seqlen_q, heads, head_dim = call.query.shape
    rows = torch.full((batch, heads, seqlen_q, 4), math.nan)
    sizes = torch.full((batch, heads, seqlen_q), math.nan) if with_sizes else None
    memory = Memory()
    out, dout = memory.add("out", call.out), memory.add("dout", call.grad_out)
    lse, dlse = memory.add("lse", call.lse), memory.maybe("dlse", call.grad_lse)
    q_lens, k_lens = memory.maybe("q_lens", call.q_lens), memory.maybe("k_lens", call.k_lens)
    rows, sizes = memory.add("rows", rows, True), memory.maybe("sizes", sizes, True)
    args = BackwardRowsArgs(
        *(_view(out), _view(dout), _address(lse), _address(dlse), _strides(lse), _strides(dlse)),
        *(_lengths(q_lens), _lengths(k_lens), _address(rows), _address(sizes)),
        *(batch, heads, seqlen_q, call.key.shape[1], head_dim, *call.bounds),
        *(NUMBER[call.out.dtype], NUMBER[call.grad_out.dtype]),
    )
    _helper(
        *("wan_attn_backward_rows", args, batch * heads * seqlen_q, memory),
        launcher or emulator(csrc),
    )
    return rows, sizes


def largest_of(x: Tensor, lens: Tensor | None) -> Tensor:
    """What wan_attn_measure makes of v: test_emu_helpers.py has shown that it does."""
    largest = torch.zeros(x.shape[0], x.shape[2], PARTS)
    for b in range(x.shape[0]):
        real = x[b].float().abs() if lens is None else x[b, : int(lens[b])].float().abs()
        real = torch.where(real.isfinite(), real, 0.0)
        for part in range(PARTS):
            if len(real[part::PARTS]):
                largest[b, :, part] = real[part::PARTS].amax(dim=(0, 2))
    return largest


def scales_of(
    call: Call, rows: Tensor, sizes: Tensor, launcher: Launcher
) -> tuple[Tensor, Tensor | None]:
    """What wan_attn_backward_scale makes: scales, dout_scale."""
    batch, seqlen_q, heads, _ = call.query.shape
    heads_k = heads // call.share
    scales = torch.full((batch, heads_k, 4), math.nan)
    converts = call.grad_out.dtype != call.value.dtype
    dout_scale = torch.full((batch, heads), math.nan) if converts else None
    memory = Memory()
    largest = memory.add("largest", largest_of(call.value, call.k_lens))
    rows, sizes = memory.add("rows", rows), memory.add("sizes", sizes)
    q_lens = memory.maybe("q_lens", call.q_lens)
    scales = memory.add("scales", scales, True)
    dout_scale = memory.maybe("dout_scale", dout_scale, True)
    args = BackwardScaleArgs(
        *(_address(rows), _address(sizes), _address(largest), _lengths(q_lens)),
        *(_address(scales), _address(dout_scale)),
        *(batch, heads, call.share, seqlen_q, PARTS),
    )
    _helper("wan_attn_backward_scale", args, batch * heads_k, memory, launcher)
    return scales, dout_scale


def _in_16_bits(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """What wan_attn_convert makes of an operand that needs it, by torch."""
    if x.dtype == dtype and x.data_ptr() % 16 == 0 and not any(s % 8 for s in x.stride()[:3]):
        return x
    return (x.float() / scale[:, None, :, None]).to(dtype) if scale is not None else x.to(dtype)


def run(
    pair: Pair,
    call: Call,
    *,
    schedule: Schedule = AT_RANDOM,
    csrc: Path = CSRC,
    launcher: Launcher | None = None,
) -> Gradients:
    """Every pass but for those that test_emu_helpers.py tests. launcher: None is the emulator."""
    launcher = launcher or emulator(csrc, schedule)
    dtype = DTYPES[pair.dtype]
    is_f16 = dtype == torch.float16
    rows, sizes = row_numbers(call, is_f16, launcher=launcher)
    scales = dout_scale = None
    if is_f16:
        assert sizes is not None
        scales, dout_scale = scales_of(call, rows, sizes, launcher)
    dout = _in_16_bits(call.grad_out, dtype, dout_scale)
    given = [_in_16_bits(x, dtype) for x in (call.query, call.key, call.value)]
    likes = (call.query, call.key, call.value)
    grads = [torch.full(x.shape, math.nan, dtype=x.dtype) for x in likes]
    memory = Memory()
    views = [memory.add(f"operand {n}", x) for n, x in enumerate((*given, dout))]
    rows, scales = memory.add("rows", rows), memory.maybe("scales", scales)
    q_lens, k_lens = memory.maybe("q_lens", call.q_lens), memory.maybe("k_lens", call.k_lens)
    conflicts = 0
    for tile, mine in ((pair.of_keys, (1, 2)), (pair.of_rows, (0,))):
        tensors = Memory()
        tensors.tensors = list(memory.tensors)
        results = [NOWHERE] * 3
        for n in mine:
            grads[n] = tensors.add(f"gradient {n}", grads[n], True)
            results[n] = _view(grads[n])
        args = _args(tile, call, views, results, (_lengths(q_lens), _lengths(k_lens)))
        args.rows, args.scales = _address(rows), _address(scales)
        heads = (call.key if tile.of_keys else call.query).shape[2]
        grid = args.blocks * heads * args.batch
        conflicts += launcher(tile, args, grid, tensors.tensors)
    return Gradients((grads[0], grads[1], grads[2]), conflicts, scales)


def _args(
    tile: TileBackward,
    call: Call,
    operands: Sequence[Tensor],
    results: Sequence[View],
    lens: tuple[Lengths, Lengths],
) -> BackwardArgs:
    """All but rows and scales."""
    batch, seqlen_q, heads_q, head_dim = call.query.shape
    seqlen_k = call.key.shape[1]
    blocks = -(-(seqlen_k if tile.of_keys else seqlen_q) // tile.block_m)
    scale = head_dim**-0.5 if call.scale is None else call.scale
    return BackwardArgs(
        *(*map(_view, operands), *results, None, None, *lens),
        *(batch, heads_q, call.share, seqlen_q, seqlen_k, blocks, *call.bounds),
        *(int(x.dtype == torch.float32) for x in (call.query, call.key, call.value)),
        *(scale, scale * LOG2_E),
    )
