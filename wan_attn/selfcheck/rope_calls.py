# SPDX-License-Identifier: Apache-2.0
"""rope_calls.py - the calls of rms_norm_rope that a CUDA row has to get right on a card before it
runs there, with their results in float64; shares no code with a kernel.

Inputs are multiples of 1/32, which every dtype holds exactly. The bound for one element is what its
roundings cost: with a norm y is rounded up to twice to x's dtype, and the result once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from wan_attn import config
from wan_attn.native.kernels import KernelInfo
from wan_attn.selfcheck.reference import draw

Run = Callable[[Mapping[str, Any]], Tensor]  # the op's arguments -> its result

BATCH, SEQLEN, POSITIONS = 2, 21, 6
GRIDS = ((2, 3, 3), (1, 2, 4))  # frames, height, width: behind both there are tokens
EPS = 1e-6
# The largest relative error of a rounding; for float32 of all of them together.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}


@dataclass(frozen=True)
class RopeCase:
    """One call. table: "grid", "token" (the same for all heads), "head", or "" for none."""

    name: str
    heads: int = 3
    head_dim: int = 128
    has_norm: bool = True
    per_head: bool = False
    rounds: bool = True
    weight_like_x: bool = False
    table: str = "grid"
    grid_on_device: bool = False
    offset: int = 0
    out_is_f32: bool = False
    is_unaligned: bool = False  # x begins an element behind where 16 bytes could begin


# Blocks of 96, 64 and of one warp's threads; every kind of table; what only the row for any call
# takes.
CALLS = (
    RopeCase("norm and rotation", heads=24),
    RopeCase("rounded twice", heads=12, weight_like_x=True, grid_on_device=True, offset=3),
    RopeCase("rotation alone", has_norm=False, out_is_f32=True),
    RopeCase("norm of each head", per_head=True, rounds=False, table="token", out_is_f32=True),
    RopeCase("norm alone", heads=5, head_dim=64, table=""),
    RopeCase("unaligned", head_dim=84, is_unaligned=True),
    RopeCase("a table for each head", table="head"),
)


@dataclass(frozen=True)
class Known:
    """A call's operands on the CPU, its result, and what its roundings multiply."""

    x: Tensor
    weight: Tensor | None
    table: Tensor | None
    truth: Tensor
    spread: Tensor  # |y| |cos| + |y'| |sin|, as truth


@lru_cache(maxsize=2 * len(CALLS))
def known(call: RopeCase) -> Known:
    """The same for the same call."""
    generator = torch.Generator("cpu").manual_seed(call.heads * 1000 + call.head_dim)
    shape = (BATCH, SEQLEN, call.heads, call.head_dim)
    x, weight, table = draw(generator, *shape), None, None
    y = x.double()
    if call.has_norm:
        count = call.head_dim * (1 if call.per_head else call.heads)
        weight = 1 + draw(generator, count) / 4
        dims = (-1,) if call.per_head else (-2, -1)
        each = weight if call.per_head else weight.view(call.heads, call.head_dim)
        y = y / torch.sqrt(y.pow(2).mean(dim=dims, keepdim=True) + EPS) * each.double()
    truth, spread = y, y.abs()
    if call.table:
        heads = call.heads if call.table == "head" else 1
        rows = (POSITIONS, 1, 1) if call.table == "grid" else (BATCH, SEQLEN, heads)
        angles = 3 * draw(generator, *rows, call.head_dim // 2).double()
        table = torch.stack((angles.cos(), angles.sin()), -1).flatten(-2)
        table = table[:, 0, 0] if call.table == "grid" else table
        own = _of_tokens(call, table) if call.table == "grid" else table
        truth, spread = _turned(y, own)
    if call.table in ("token", "head"):
        assert table is not None
        table = table.expand(shape)
    return Known(x, weight, table, truth, spread)


def _turned(y: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    a, b = y[..., 0::2], y[..., 1::2]
    c, s = table[..., 0::2], table[..., 1::2]
    truth = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    a, b, c, s = a.abs(), b.abs(), c.abs(), s.abs()
    return truth, torch.stack((a * c + b * s, b * c + a * s), -1).flatten(-2)


def _of_tokens(call: RopeCase, table: Tensor) -> Tensor:
    """The separable table written out for each token, [batch, seqlen, 1, head_dim]."""
    out = torch.zeros(BATCH, SEQLEN, 1, call.head_dim, dtype=torch.float64)
    out[..., 0::2] = 1.0  # behind the grid: not turned
    lines = 2 * (call.head_dim // 6)
    frames = call.head_dim - 2 * lines
    for b, (frame_count, height, width) in enumerate(GRIDS):
        for s in range(max(0, min(SEQLEN, frame_count * height * width - call.offset))):
            t = s + call.offset
            frame, line, column = t // (height * width), t // width % height, t % width
            out[b, s, 0, :frames] = table[frame, :frames]
            out[b, s, 0, frames : frames + lines] = table[line, frames : frames + lines]
            out[b, s, 0, frames + lines :] = table[column, frames + lines :]
    return out


def arguments(call: RopeCase, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The op's, on this device."""
    made = known(call)
    x = made.x.to(device, dtype)
    if call.is_unaligned:
        x = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].view(x.shape).copy_(x)
    given: dict[str, Any] = {"x": x, "eps": EPS if call.has_norm else None}
    if made.weight is not None:
        given["weight"] = made.weight.to(device, dtype if call.weight_like_x else torch.float32)
    if made.table is not None:
        given["table"] = made.table.to(device)
        if call.table == "token":  # .to() has written it out for every head
            given["table"] = made.table[:, :, :1].to(device).expand(x.shape)
    if call.table == "grid":
        # The CPU by name: the program may have another default device.
        where = device if call.grid_on_device else torch.device("cpu")
        given["grid_sizes"] = torch.tensor(GRIDS, device=where)
        given["seqlen_offset"] = call.offset
    given |= {"per_head": call.per_head, "round_norm": call.rounds}
    given["dtype"] = torch.float32 if call.out_is_f32 else dtype
    return given


def difference(call: RopeCase, dtype: torch.dtype, out: Tensor) -> str | None:
    """What is beyond its bound, in words; None: nothing."""
    made = known(call)
    of_y = ROUNDING[dtype] if call.has_norm and call.rounds else 0.0
    bound = made.spread * (2 * of_y + ROUNDING[torch.float32])
    bound = (bound + made.truth.abs() * ROUNDING[out.dtype]) * (1 + 2.0**-6)  # of their products
    got = out.to("cpu", torch.float64)
    is_wrong = ~((got - made.truth).abs() <= bound)  # NaN is wrong
    if not bool(is_wrong.any()):
        return None
    at = tuple(int(n) for n in is_wrong.nonzero()[0])
    return (
        f"{call.name}: out{list(at)} is {float(got[at]):g} instead of {float(made.truth[at]):g},"
        f" {int(is_wrong.sum())} of {is_wrong.numel()} elements are wrong"
    )


def first_wrong(run: Run, device: torch.device, dtype: torch.dtype) -> str | None:
    """What `run` gets wrong in the first two calls, in words; None: nothing."""
    for call in CALLS[:2]:
        found = difference(call, dtype, run(arguments(call, dtype, device)))
        if found is not None:
            return found
    return None


class Card(Protocol):
    """What a proof's calls run on; see proof_calls.Card."""

    def device(self) -> torch.device:
        """Where operands must be."""

    def rope_why_not(self, row: KernelInfo, given: Mapping[str, Any]) -> str | None:
        """Why the row does not take this call by design; None: it does."""

    def rope(self, row: KernelInfo, given: Mapping[str, Any]) -> Tensor:
        """torch.ops.wan_attn.rms_norm_rope with this row and no other."""

    def captured(self, attend: Callable[[], Any]) -> Callable[[], Any] | None:
        """The call as a graph, to be replayed; None: there are no graphs."""


def wrong(card: Card, row: KernelInfo, dtype: torch.dtype) -> str | None:
    """What this row gets wrong on this card, in words; None: nothing.

    Raises:
        RuntimeError: what a call raised.
    """
    taken = None
    for call in CALLS:
        given = arguments(call, dtype, card.device())
        if card.rope_why_not(row, given) is not None:
            continue
        taken = taken or call
        # The first result is still held: the second cannot lie in its memory and look written.
        first, second = card.rope(row, given), card.rope(row, given)
        found = difference(call, dtype, first) or difference(call, dtype, second)
        if found is None and not torch.equal(first, second):
            found = f"{call.name}: the same call gave other bits the second time"
        if found is not None:
            return found
    return "it takes none of the calls" if taken is None else _graph(card, row, taken, dtype)


def _graph(card: Card, row: KernelInfo, call: RopeCase, dtype: torch.dtype) -> str | None:
    """A captured call is replayed with other contents in the same memory."""
    given = arguments(call, dtype, card.device())
    real = given["x"]
    given["x"] = torch.zeros_like(real)  # in strides of its own, which the row takes as well
    replay = card.captured(lambda: card.rope(row, given))
    if replay is None:
        return None
    given["x"].copy_(real)
    found = difference(call, dtype, replay())
    return None if found is None else f"graph: {found}"


_verdicts: dict[tuple[torch.device, torch.dtype], str | None] = {}
_lock = threading.Lock()


def verdict(run: Run, device: torch.device, dtype: torch.dtype) -> str | None:
    """first_wrong(), asked once in a process for each device and dtype of x; None also while a CUDA
    graph is being captured, when the device may not be waited for, and under
    WAN_ATTN_SELF_CHECK=0."""
    key = (device, dtype)
    if key not in _verdicts:
        if not config.current().self_check or torch.cuda.is_current_stream_capturing():
            return None
        with _lock:
            if key not in _verdicts:
                _verdicts[key] = first_wrong(run, device, dtype)
    return _verdicts[key] if config.current().self_check else None


def forget() -> None:
    """Check again, as a new process would."""
    with _lock:
        _verdicts.clear()


config.memory(forget)
