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
from wan_attn.request import Request
from wan_attn.select import DISABLED

FLASH, OURS, SDPA, EAGER = "flash_attention_2", "wan_attn", "sdpa", "eager"


def model_parts(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, part) for each part with a configuration of its own, from the outside in."""
    seen: list[Any] = []
    for name, part in model.named_modules():
        its_config = getattr(part, "config", None)
        is_model = hasattr(part, "_from_config") and hasattr(its_config, "_attn_implementation")
        if is_model and not any(its_config is other for other in seen):
            seen.append(its_config)
            yield name or type(part).__name__, part


def choose(
    part: Any = None, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[str, str]:
    """(what a model should get, why not what would come before it).

    Args:
        part: a model; None: any that transformers' attention interface serves.
        device, dtype: where and in what it will run; None: the part's own, or the CPU, float32.
    """
    weight = next(iter(part.parameters()), None) if part is not None else None
    if device is None:
        device = "cpu" if weight is None else weight.device
    if dtype is None:
        dtype = torch.float32 if weight is None else weight.dtype
    reason = _why_not_flash(part, torch.device(device), dtype)
    if reason is None:
        return FLASH, ""
    said = f"{FLASH}: {reason}"
    if part is None or _has_interface(part):
        return OURS, said
    said += f"; {OURS}: its code does not ask transformers' attention interface in this version"
    is_sdpa = getattr(part, "_supports_sdpa", False)
    kept = part.config._attn_implementation
    return (SDPA if is_sdpa and kept != EAGER else kept), said


def _has_interface(part: Any) -> bool:
    """Whether the layers look their function up at each call, rather than being classes of it."""
    modules = {type(module).__module__ for module in part.modules()}
    names = {"ALL_ATTENTION_FUNCTIONS"}
    return any(names & set(vars(sys.modules[name])) for name in modules if name in sys.modules)


def _why_not_flash(part: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    if config.current().disable_flash_attn:
        return DISABLED
    supports = ("_supports_flash_attn", "_supports_flash_attn_2")  # 4.5x and 5.x, 4.49
    if part is not None and not any(getattr(part, name, False) for name in supports):
        return f"{type(part).__name__} does not support it"
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
