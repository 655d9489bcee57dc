# SPDX-License-Identifier: Apache-2.0
"""_places.py - tells wan_attn.precision which step and layer a model computes: by its class's
call, or by hooks on one model, and by a hook on each of its blocks. No file is edited.

Where nothing asks for places, a forward costs one look, and no block gets a hook.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch

from wan_attn.precision import place

# tell(model, arguments of its forward by name) -> its timestep; may begin a run.
Tell = Callable[[Any, dict[str, Any]], Any]


def _enter_block(index: int, module: Any, args: Any) -> None:
    """A forward_pre_hook; a function of this module, so that a model with hooks can be pickled."""
    if place.is_told():
        place.layer(index)


class Blocks:
    """The hooks on the blocks of models."""

    def __init__(self) -> None:
        self._handles: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()

    def hook(self, model: Any) -> int | None:
        """Puts a hook on each of model.blocks, once; how many there are, None without any."""
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, torch.nn.ModuleList):
            return None
        if model not in self._handles:
            self._handles[model] = [
                block.register_forward_pre_hook(functools.partial(_enter_block, index))
                for index, block in enumerate(blocks)
            ]
        return len(blocks)

    def release(self, model: Any = None) -> None:
        """Takes them off this model; None: off all."""
        for one in list(self._handles) if model is None else [model]:
            for handle in self._handles.pop(one, []):
                handle.remove()


class ClassPlaces:
    """The call of a class of models, which tells places while this is installed.

    `__call__` and not `forward`: a host may give one model a forward of its own, as Wan2.2 does for
    sequence parallelism, before or after this is installed.

    Args:
        cls: gets a `__call__`, in front of the one that it inherits.
        tell: see Tell.
    """

    def __init__(self, cls: Any, tell: Tell) -> None:
        self.cls, self._blocks = cls, Blocks()
        self._before = vars(cls).get("__call__")
        self._ours = _make_call(cls.__call__, self._blocks, tell)
        cls.__call__ = self._ours

    def remove(self) -> None:
        """Puts back what was there, if it is still ours."""
        self._blocks.release()
        if vars(self.cls).get("__call__") is not self._ours:
            return
        if self._before is None:
            del self.cls.__call__
        else:
            self.cls.__call__ = self._before


def _make_call(original: Any, blocks: Blocks, tell: Tell) -> Any:
    @functools.wraps(original)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not place.is_told():
            return original(model, *args, **kwargs)
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        timestep = tell(model, {**given, **given.get("kwargs", {})})
        if timestep is None:
            return original(model, *args, **kwargs)
        place.enter(model, timestep, blocks.hook(model))
        try:
            return original(model, *args, **kwargs)
        finally:
            place.leave()

    return call


class ModelPlaces:
    """Hooks on one model, which tell places until remove()."""

    def __init__(self, model: Any, tell: Tell) -> None:
        self._blocks = Blocks()
        enter = _Enter(self._blocks, tell, inspect.signature(model.forward))
        self._handles = [
            model.register_forward_pre_hook(enter, with_kwargs=True),
            model.register_forward_hook(_leave, always_call=True),
        ]

    def remove(self) -> None:
        """Takes every hook off."""
        self._blocks.release()
        for handle in self._handles:
            handle.remove()


class _Enter:
    """A forward_pre_hook. A copy of the model, or one that was saved, gets one that does nothing:
    what it knows, it knows of this model."""

    def __init__(self, blocks: Blocks, tell: Tell, signature: inspect.Signature) -> None:
        self._blocks, self._tell, self._signature = blocks, tell, signature

    def __call__(self, model: Any, args: Any, kwargs: Any) -> None:
        if not place.is_told():
            return
        timestep = self._tell(model, self._signature.bind(*args, **kwargs).arguments)
        if timestep is not None:
            place.enter(model, timestep, self._blocks.hook(model))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Nothing:
    def __call__(self, model: Any, args: Any, kwargs: Any) -> None:
        pass


def _leave(model: Any, args: Any, out: Any) -> None:
    if place.is_told():
        place.leave()
