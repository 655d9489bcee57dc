# SPDX-License-Identifier: Apache-2.0
"""_comfyui_places - ComfyUI's Wan models tell wan_attn.precision their step and layer."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from wan_attn.integrations._places import ClassPlaces, patches
from wan_attn.observe import place

MODULE, CLASS = "comfy.ldm.wan.model", "WanModel"

WHO = "a node of ComfyUI's"  # to place.want(): whoever holds its model does not say when it goes

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


def _grid(model: Any, arguments: dict[str, Any]) -> place.Grid | None:
    """Of the latents in whole patches, with the frames that are put behind them. A reference stands
    before them: then the grid is not known."""
    shapes = [getattr(arguments.get(name), "shape", None) for name in ("x", "time_dim_concat")]
    patch = getattr(model, "patch_size", None)
    if shapes[0] is None or patch is None or arguments.get("reference_latent") is not None:
        return None
    padded = [_whole(shape[-3:], patch) for shape in shapes if shape is not None]
    frames = sum(sizes[0] for sizes in padded)
    return patches((frames, *padded[0][1:]), patch)


def _whole(sizes: Any, patch: Any) -> list[int]:
    """Frames, rows and columns, padded up to whole patches."""
    return [-(-int(size) // int(part)) * int(part) for size, part in zip(sizes, patch, strict=True)]


def install() -> None:
    """Put it in where ComfyUI has loaded its Wan models. Twice is once."""
    cls = getattr(sys.modules.get(MODULE), CLASS, None)
    if isinstance(cls, type) and cls not in _installed and "forward" in vars(cls):
        _installed[cls] = ClassPlaces(cls, _tell, _grid)


def remove() -> None:
    """Take it out again."""
    place.want(WHO, False)
    for places in _installed.values():
        places.remove()
    _installed.clear()
