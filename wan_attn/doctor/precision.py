# SPDX-License-Identifier: Apache-2.0
"""precision.py - where 8-bit scores are allowed, and what would compute them on each device."""

from __future__ import annotations

from typing import Any

import torch

from wan_attn.backends import native
from wan_attn.config import Settings
from wan_attn.native.library import QK8
from wan_attn.precision import state
from wan_attn.request import Request
from wan_attn.workloads import WORKLOADS

# mode -> what it allows, as docs/precision.md has it.
ALLOWS = {
    "exact": "nowhere (WAN_ATTN_PRECISION=exact)",
    "balanced": "in self-attention, but for the first and last steps and layers",
    "auto": "in self-attention, but for the first and last steps and layers, while the measured "
    "error is in the budget",
    "fast": "in all but attention to images",
}


def facts(device: str, settings: Settings, request: Request | None = None) -> dict[str, Any]:
    """What 8-bit scores would be computed by, as plain values.

    Its keys: device, mode, guard, budget, kernel (a name or None), reason (why there is none),
    error (what is wrong with the schedule, or None).

    Args:
        request: the call; None: plain self-attention of TI2V-5B in bf16.
    """
    if request is None:
        request = Request.of(
            WORKLOADS["ti2v-5b-720p"], torch.bfloat16, device, qk_dtype=torch.float32
        )
    try:
        reason = native.why_not(request, QK8)
    except RuntimeError as problem:  # a device in trouble
        reason = str(problem)
    return {
        "device": device,
        "mode": settings.precision,
        "guard": settings.guard,
        "budget": settings.precision_budget,
        "kernel": None if reason else native.kernel_name(request, QK8),
        "reason": reason,
        "error": state.schedule_error(settings),
    }


def told(found: dict[str, Any]) -> str:
    """One sentence."""
    if found["error"]:
        return f"WRONG: {found['error']}"
    allowed = ALLOWS[found["mode"]]
    if found["mode"] == "exact":
        could = found["kernel"] or f"no kernel: {found['reason']}"
        return f"{allowed}; if asked for: {could}"
    if found["kernel"] is None:
        return f"no kernel, so that calls are exact: {found['reason']}"
    return f"{found['kernel']}, lossy, {allowed}"
