# SPDX-License-Identifier: Apache-2.0
"""_transformers_choice - which attention a part of a transformers model should have, and why."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from wan_attn import config
from wan_attn.backends import fa2
from wan_attn.request import DTYPES, Request, gate, refuse
from wan_attn.selection.choose import DISABLED

FLASH, OURS, SDPA, EAGER = "flash_attention_2", "wan_attn", "sdpa", "eager"


def model_parts(model: torch.nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(name, part, the model that it is in) for each part that has a configuration of its own.

    From the outside in. A part need not be a model itself: CLIP's towers are plain modules.
    """
    seen: list[Any] = []
    models: dict[str, Any] = {"": model}
    for name, part in model.named_modules():
        if hasattr(part, "_from_config"):
            models[name] = part
        its_config = getattr(part, "config", None)
        if not hasattr(its_config, "_attn_implementation"):
            continue
        if not any(its_config is other for other in seen):
            seen.append(its_config)
            outer = [m for m in models if m in ("", name) or name.startswith(f"{m}.")]
            yield name or type(part).__name__, part, models[max(outer, key=len)]


def choose(
    part: Any = None,
    model: Any = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[str, str]:
    """(what a model should get, why not what would come before it).

    Args:
        part: a model or a part of one; None: any that transformers' attention interface serves.
        model: the one that `part` is in, which knows what it supports; None: `part`.
        device, dtype: where and in what it will run; None: the part's own, or the CPU, float32.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        refuse("dtype", "a torch.dtype or None", gate.kind_of(dtype))
    try:
        device = None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        refuse("device", "the name of a device that torch has, or None", gate.kind_of(device))
    model = part if model is None else model
    weight = next(iter(part.parameters()), None) if part is not None else None
    if device is None:
        device = "cpu" if weight is None else weight.device
    if dtype is None:
        dtype = torch.float32 if weight is None else weight.dtype
    reason = _why_not_flash(model, torch.device(device), dtype)
    if reason is None:
        return FLASH, ""
    said = f"{FLASH}: {reason}"
    if part is None or _has_interface(part):
        return OURS, said
    said += f"; {OURS}: its code does not ask transformers' attention interface in this version"
    is_sdpa = getattr(model, "_supports_sdpa", False)
    kept = part.config._attn_implementation
    return (SDPA if is_sdpa and kept != EAGER else kept), said


def _has_interface(part: Any) -> bool:
    """Whether the layers look their function up at each call, rather than being classes of it."""
    modules = {type(module).__module__ for module in part.modules()}
    names = {"ALL_ATTENTION_FUNCTIONS"}
    return any(names & set(vars(sys.modules[name])) for name in modules if name in sys.modules)


def _why_not_flash(model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    if config.current().disable_flash_attn:
        return DISABLED
    supports = ("_supports_flash_attn", "_supports_flash_attn_2")  # 4.5x and 5.x, 4.49
    if model is not None and not any(getattr(model, name, False) for name in supports):
        return f"{type(model).__name__} does not support it"
    if dtype not in DTYPES:
        return f"it is {str(dtype).removeprefix('torch.')}"
    # One small call stands for all: what decides is the device, the dtype and the installation.
    like = torch.empty((1, 1, 1, 64), dtype=dtype, device="meta")
    request = Request.from_tensors(like, like, like)
    reason = fa2.why_not(dataclasses.replace(request, device=device))
    if reason is not None:
        return reason
    utils = importlib.import_module("transformers.utils")
    if not utils.is_flash_attn_2_available():
        return "transformers finds it not available"
    return None
