# SPDX-License-Identifier: Apache-2.0
"""_comfyui_places - ComfyUI's Wan models tell wan_attn.precision their step and layer."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from wan_attn.integrations._places import ClassPlaces
from wan_attn.observe import place

MODULE, CLASS = "comfy.ldm.wan.model", "WanModel"

_installed: dict[Any, ClassPlaces] = {}


def _tell(model: Any, arguments: dict[str, Any]) -> Any:
    """The noise level of this forward; those of all steps are in the same options."""
    options = arguments.get("transformer_options") or {}
    every, now = options.get("sample_sigmas"), options.get("sigmas")
    if not isinstance(every, Tensor) or not isinstance(now, Tensor):
        return arguments.get("timestep")
    if not place.is_begun_with(every):
        place.begin(every[:-1], told_by=every)  # the last one is what the last step ends at
    return now


def install() -> None:
    """Put it in where ComfyUI has loaded its Wan models. Twice is once."""
    cls = getattr(sys.modules.get(MODULE), CLASS, None)
    if isinstance(cls, type) and cls not in _installed and "forward" in vars(cls):
        _installed[cls] = ClassPlaces(cls, _tell)


def remove() -> None:
    """Take it out again."""
    for places in _installed.values():
        places.remove()
    _installed.clear()
