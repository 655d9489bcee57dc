# SPDX-License-Identifier: Apache-2.0
"""_comfyui_sparse - blocks left out of the attention of one model of ComfyUI's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from wan_attn.integrations import _comfyui_places as _places
from wan_attn.observe import place
from wan_attn.sparse import Use, use
from wan_attn.sparse.wishes import MODES

AS_SET = "as set"
"""What the node calls: as WAN_ATTN_SPARSE says."""

INPUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sparse": (
        [AS_SET, *MODES],
        {
            "default": AS_SET,
            "tooltip": "Whether blocks of keys may be left out of this model's self-attention, "
            "which is faster and not exact. `as set` is what WAN_ATTN_SPARSE says.",
        },
    ),
    "budget": (
        "FLOAT",
        {
            **{"default": 0.05, "min": 0.001, "max": 0.5, "step": 0.001},
            "tooltip": "The relative error that leaving blocks out may make in a layer.",
        },
    ),
}
"""The node's optional inputs."""


def of_model(mode: str | None, budget: float) -> Use | None:
    """What within() takes; None: nothing of its own.

    Raises:
        RuntimeError: there is no such mode or budget.
    """
    if mode is None or mode == AS_SET:
        return None
    used = use(mode, budget=budget)
    used.end()
    place.want(_places.WHO, True)
    return used


def within(used: Use | None, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Call the function with blocks left out as one model wants it."""
    if used is None:
        return function(*args, **kwargs)
    used.begin()
    try:
        return function(*args, **kwargs)
    finally:
        used.end()
