# SPDX-License-Identifier: Apache-2.0
"""rope.py - what norms and rotates q and k on each device, and why not our kernels."""

from __future__ import annotations

from typing import Any

import torch

from wan_attn.config import Settings
from wan_attn.console import without_name
from wan_attn.native import op, rope


def facts(device: str, settings: Settings) -> dict[str, Any]:
    """Which of our kernels takes the norm and the rotation on the device, as plain values.

    Its keys: device, kernel (a name or None), reason (why there is none), kernels (each row's name
    and its own reason or None).
    """
    where = torch.device(device)
    off = None
    if op.binding() == "torch":
        off = f"the native library is not used: {op.binding_reason()}"
    elif settings.rope == "off":
        off = "WAN_ATTN_ROPE=off"
    rows = [
        {"name": name, "reason": off or without_name(rope.why_not(where, row), name)}
        for row, name in enumerate(rope.kernels())
    ]
    kernel = next((row["name"] for row in rows if row["reason"] is None), None)
    why = None if kernel else off or rope.why_not(where)
    return {"device": device, "kernel": kernel, "reason": why, "kernels": rows}


def told(found: dict[str, Any], dtype: str) -> str:
    """One sentence about a call whose value has this dtype."""
    if found["kernel"] is None:
        return f"the model's own steps: {found['reason']}"
    return (
        f"{found['kernel']}, one pass over q and one over k, where patch() or enable() finds them; "
        f"they leave it in {dtype}, so that attention converts nothing"
    )
