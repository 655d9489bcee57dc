# SPDX-License-Identifier: Apache-2.0
"""place.py - where in a denoising run a call stands: its step, layer, expert and kind.

Hosts tell it: begin() at the start of a run, enter() and leave() around a model's forward, layer()
before each block. Nothing is guessed: what no host tells is None. Knows no schedule.

One state per thread, as a pipeline runs in one. `is_wanted` says whether anything reads it: hosts
ask that first, so that an exact run costs them one look.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan_attn import config
from wan_attn.request import gate, refuse
from wan_attn.workloads import IMAGE_TOKENS

KINDS = ("self", "text", "image")

Grid = tuple[int, int, int]
"""Frames, rows and columns."""

is_wanted = False
_wanted_by: set[str] = set()


class Place(NamedTuple):
    """Where a call stands. Counts from 0; None is not known.

    Attributes:
        kind: "self" where there are as many keys as queries; "image" for CLIP's 257 tokens, and
            where the host says so; else "text".
        step, steps: which one of how many.
        layer, layers: likewise.
        expert: 0 is the model that ran first in this run: of Wan2.2's A14B the one for high noise.
        run: which one of this thread.
        grid: frames, rows and columns of the tokens of a self-attention, as they lie one after the
            other; what stands behind them are others.
    """

    kind: str
    step: int | None = None
    steps: int | None = None
    layer: int | None = None
    layers: int | None = None
    expert: int | None = None
    run: int = 0
    grid: Grid | None = None

    @property
    def at_step(self) -> str:
        """Behind a layer's name: ", step 3"; "" where it is not known."""
        return "" if self.step is None else f", step {self.step}"


class _Here(threading.local):
    kind: str | None = None
    step: int | None = None
    steps: int | None = None
    layer: int | None = None
    layers: int | None = None
    expert: int | None = None
    grid: Grid | None = None
    run: int = 0
    timesteps: tuple[float, ...] = ()
    last: float | None = None  # timestep that a forward had, since the run began
    begun: weakref.ref[Tensor] | None = None

    def __init__(self) -> None:
        self.experts: list[weakref.ref[Any]] = []


_here = _Here()


def forget() -> None:
    """Stand nowhere, as a new thread does."""
    _here.__dict__.clear()
    _here.__init__()  # type: ignore[misc]


def here(seqlen_q: int, seqlen_k: int) -> Place:
    """The place of a call that this thread makes now."""
    h, kind = _here, _here.kind
    if kind is None:
        kind = "self" if seqlen_q == seqlen_k else "text"
        if seqlen_k == IMAGE_TOKENS and seqlen_q != seqlen_k:
            kind = "image"
    return Place(kind, h.step, h.steps, h.layer, h.layers, h.expert, h.run, h.grid)


def begin(timesteps: Sequence[float] | Tensor, told_by: Tensor | None = None) -> None:
    """A run with these timesteps begins: what its model will be given, from noise to picture.

    Where they begin below the last one that was seen, they continue that run, as the second sampler
    of ComfyUI does for A14B's second model.

    Args:
        told_by: what is_begun_with() will know it by; None: `timesteps`.
    """
    if told_by is None and isinstance(timesteps, Tensor):
        told_by = timesteps
    h = _here
    h.begun = None if told_by is None else weakref.ref(told_by)
    if isinstance(timesteps, Tensor):
        timesteps = timesteps.tolist()
    h.timesteps = tuple(float(t) for t in timesteps)
    h.steps = len(h.timesteps) or None
    if h.last is None or not h.timesteps or h.timesteps[0] >= h.last:
        _begin_anew()
    h.step = h.last = None


def _begin_anew() -> None:
    _here.run += 1
    _here.experts.clear()


def is_begun_with(timesteps: Any) -> bool:
    """Whether begin() was last told by this very tensor: a scheduler makes one for each run."""
    return _here.begun is not None and _here.begun() is timesteps


def enter(model: object, timestep: Any, layers: int | None, grid: Grid | None = None) -> None:
    """A forward of this model begins. The two forwards of guidance have the same timestep, and are
    one step.

    Args:
        timestep: a number or a tensor, of which the largest counts: image-to-video gives the tokens
            of its image 0. On a device reading it waits for that, once a forward.
        grid: of its tokens.
    """
    t = float(timestep.detach().max()) if isinstance(timestep, Tensor) else float(timestep)
    h = _here
    before, step = h.step, _step_of(t)
    if step is None:
        h.timesteps, h.steps = (), None  # of another run, whose begin nobody told
        is_new = before is not None and h.last is not None and t > h.last
        step = 0 if is_new or before is None else before + (t != h.last)
    else:
        is_new = before is not None and step < before
    h.step = step
    if is_new:
        _begin_anew()
    h.last, h.layer, h.layers, h.grid = t, None, layers, grid
    h.expert = _number(model)


def _step_of(t: float) -> int | None:
    """The step of this timestep; a host may have rounded it to 16 bits."""
    told = _here.timesteps
    if not told:
        return None
    nearest = min(range(len(told)), key=lambda i: abs(told[i] - t))
    return nearest if abs(told[nearest] - t) <= 0.005 * abs(told[nearest]) else None


def _number(model: object) -> int:
    known = _here.experts
    for index, reference in enumerate(known):
        if reference() is model:
            return index
    gone = next((i for i, reference in enumerate(known) if reference() is None), len(known))
    known[gone : gone + 1] = [weakref.ref(model)]
    return gone


def leave() -> None:
    """The forward has ended: calls outside of it, as those of encoders, have no layer."""
    h = _here
    h.layer = h.layers = h.kind = h.expert = h.grid = None


def layer(index: int | None) -> None:
    """The block of this number runs next."""
    _here.layer = index


def kind(word: str | None) -> None:
    """What the next calls are; None: told by their lengths."""
    _here.kind = word


def want(who: str, is_asked: bool) -> None:
    """Whether this reader of places reads them from now on."""
    global is_wanted
    (_wanted_by.add if is_asked else _wanted_by.discard)(who)
    is_wanted = bool(_wanted_by)


def is_told() -> bool:
    """Whether hosts should tell: somebody reads it, and no compiler is tracing, which would build
    one layer's number into the graph of all."""
    return is_wanted and not torch.compiler.is_compiling()


@contextmanager
def at(
    *,
    step: int | None = None,
    steps: int | None = None,
    layer: int | None = None,
    layers: int | None = None,
    expert: int | None = None,
    kind: str | None = None,
    grid: Grid | None = None,
) -> Iterator[None]:
    """Within it, the calls of this thread stand here: for models that no host of ours knows.

    Args:
        step, steps, layer, layers, expert, kind, grid: as in Place; None: as it was before.

    Raises:
        RuntimeError: an argument is no such thing.
    """
    numbers = {"step": step, "steps": steps, "layer": layer, "layers": layers, "expert": expert}
    given: dict[str, Any] = {
        name: gate.integer(name, number, at_least=0)
        for name, number in numbers.items()
        if number is not None
    }
    if kind is not None and (not isinstance(kind, str) or kind not in KINDS):
        refuse("kind", f"None or one of {', '.join(KINDS)}", gate.kind_of(kind))
    h, names = _here, ("step", "steps", "layer", "layers", "expert", "kind", "grid")
    before = {name: getattr(h, name) for name in names}
    if kind is not None:
        given["kind"] = kind
    if grid is not None:
        sizes = grid if isinstance(grid, tuple | list) else ()
        if len(sizes) != 3:
            refuse("grid", "None or (frames, rows, columns)", gate.kind_of(grid))
        given["grid"] = tuple(gate.integer("grid", size, at_least=1) for size in sizes)
    for name, value in given.items():
        setattr(h, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(h, name, value)


config.memory(forget)
