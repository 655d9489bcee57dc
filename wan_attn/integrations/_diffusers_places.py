# SPDX-License-Identifier: Apache-2.0
"""_diffusers_places - diffusers' Wan models tell wan_attn.precision their step and layer."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from wan_attn.integrations._places import ModelPlaces, patches
from wan_attn.observe import place

_watched: weakref.WeakKeyDictionary[Any, ModelPlaces] = weakref.WeakKeyDictionary()


def watch(model: Any, owner: Any) -> None:
    """Let this model tell its places, if it is a transformer. Twice is once.

    Args:
        owner: the pipeline that it is of, whose scheduler knows the timesteps; or the model.
    """
    has_timestep = "timestep" in inspect.signature(model.forward).parameters
    if has_timestep and hasattr(model, "blocks"):
        release(model)
        _watched[model] = ModelPlaces(model, _Told(owner), _grid)


def release(model: Any) -> None:
    """Take the hooks off."""
    if model in _watched:
        _watched.pop(model).remove()


def _grid(model: Any, arguments: dict[str, Any]) -> place.Grid | None:
    shape = getattr(arguments.get("hidden_states"), "shape", ())
    return patches(shape, getattr(getattr(model, "config", None), "patch_size", None))


class _Told:
    """A model's timestep; a list of timesteps of the scheduler's that is new begins a run."""

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)

    def __call__(self, model: Any, arguments: dict[str, Any]) -> Any:
        scheduler = getattr(self._owner(), "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not None and not place.is_begun_with(timesteps):
            place.begin(timesteps)
        return arguments.get("timestep")


def kind(word: str | None) -> None:
    """What the next calls of this thread are; None: told by their lengths."""
    if place.is_told():
        place.kind(word)
