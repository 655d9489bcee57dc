# SPDX-License-Identifier: Apache-2.0
"""places.py - Wan2.2's models tell wan_attn.precision their step, layer and expert."""

from __future__ import annotations

import functools
import sys
from typing import Any

from wan_attn.integrations import _rebind
from wan_attn.integrations._places import ClassPlaces, patches
from wan_attn.observe import place

MODELS = (
    "modules.model.WanModel",
    "modules.s2v.model_s2v.WanModel_S2V",
    "modules.animate.model_animate.WanAnimateModel",
)
"""Their forward has `t`, the timestep, and they have `blocks`."""

SCHEDULERS = (
    "utils.fm_solvers.FlowDPMSolverMultistepScheduler",
    "utils.fm_solvers_unipc.FlowUniPCMultistepScheduler",
)
"""Their set_timesteps() begins a run."""


def _timestep(model: Any, arguments: dict[str, Any]) -> Any:
    return arguments.get("t")


def _grid(model: Any, arguments: dict[str, Any]) -> place.Grid | None:
    """Of the latents, a list of [channels, frames, rows, columns], if all have one shape. What S2V
    puts behind them, its reference and motion, are others."""
    shapes = {tuple(getattr(latents, "shape", ())) for latents in arguments.get("x", ())}
    return patches(shapes.pop(), getattr(model, "patch_size", None)) if len(shapes) == 1 else None


class PlacePatch:
    """What tells places; the session's lock is held around every method."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._models: dict[type, ClassPlaces] = {}
        self._schedulers: dict[type, tuple[Any, Any]] = {}  # what was there, ours

    def sync(self) -> None:
        """Bring all that is loaded into the patched state; idempotent."""
        for name in MODELS:
            cls = self._class(name)
            if cls is not None and "forward" in vars(cls) and cls not in self._models:
                self._models[cls] = ClassPlaces(cls, _timestep, _grid)
        for name in SCHEDULERS:
            cls = self._class(name)
            if cls is not None and "set_timesteps" in vars(cls) and cls not in self._schedulers:
                original = vars(cls)["set_timesteps"]
                self._schedulers[cls] = (original, _make_set_timesteps(original))
                setattr(cls, "set_timesteps", self._schedulers[cls][1])  # noqa: B010

    def _class(self, name: str) -> type | None:
        module, _, attribute = f"{self._package}.{name}".rpartition(".")
        loaded = sys.modules.get(module)
        if loaded is None or _rebind.is_initialising(loaded):
            return None
        cls = vars(loaded).get(attribute)
        return cls if isinstance(cls, type) else None

    def restore(self) -> None:
        """Put back what is still ours."""
        for places in self._models.values():
            places.remove()
        for cls, (original, ours) in self._schedulers.items():
            if vars(cls).get("set_timesteps") is ours:
                setattr(cls, "set_timesteps", original)  # noqa: B010
        self._models.clear()
        self._schedulers.clear()


def _make_set_timesteps(original: Any) -> Any:
    @functools.wraps(original)
    def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(scheduler, *args, **kwargs)
        if place.is_told():
            place.begin(scheduler.timesteps)
        return result

    return set_timesteps
