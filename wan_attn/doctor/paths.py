# SPDX-License-Identifier: Apache-2.0
"""paths.py - backends and kernel rows, usable here or why not; what Wan2.2 would run on."""

from __future__ import annotations

from typing import Any

import torch

from wan_attn.backends import REGISTRY
from wan_attn.config import Settings
from wan_attn.console import without_name
from wan_attn.doctor import memory
from wan_attn.log import DTYPES, dtype_name
from wan_attn.native import op
from wan_attn.request import Request
from wan_attn.selection.choose import compute_dtype, select
from wan_attn.tuning import words
from wan_attn.workloads import MODELS, WORKLOADS, Workload

# The calls that decide how long a video takes, and the one with another head_dim.
SHOWN = ("ti2v-5b-720p", "ti2v-5b-720p-cross", "a14b-480p", "a14b-720p", "clip-vit-h")


def backends(devices: list[str]) -> list[dict[str, Any]]:
    """Each backend on each device: usable if it takes a plain Wan call; else why not in bf16."""
    rows = []
    for device in devices:
        for name, backend in REGISTRY.items():
            reasons = {
                dtype: backend.why_not(Request.of(WORKLOADS["ti2v-5b-720p"], dtype, device))
                for dtype in DTYPES.values()
            }
            taken = [dtype_name(dtype) for dtype, reason in reasons.items() if reason is None]
            rows.append(
                {
                    "device": device,
                    "name": name,
                    "title": backend.TITLE,
                    "usable": bool(taken),
                    "dtypes": taken,
                    "reason": None if taken else reasons[torch.bfloat16],
                }
            )
    return rows


def kernels(devices: list[str]) -> list[dict[str, Any]]:
    """Each row of the kernel table, on the first device of its kind."""
    rows = []
    for row in op.kernels():
        device = next((d for d in devices if torch.device(d).type == row.device), None)
        reason: str | None = f"there is no {row.device} device here"
        if op.binding() == "torch":
            reason = f"the native library is not used: {op.binding_reason()}"
        elif device is not None:
            head_dim = min(max(128, row.head_dim_min), row.head_dim_max)
            probe = Workload("probe", "", 1, 257, 257, 2, 2, head_dim)
            request = Request.of(probe, row.dtypes[0], device, has_block_lists=row.is_for_lists)
            told = op.why_not(request, row.index)
            reason = without_name(told, row.name)
        rows.append(
            {
                "index": row.index,
                "name": row.name,
                "description": row.description,
                "device": device or row.device,
                "device_is_here": device is not None,
                "dtypes": [dtype_name(dtype) for dtype in row.dtypes],
                "usable": reason is None,
                "reason": reason,
            }
        )
    return rows


def choices(devices: list[str], settings: Settings) -> list[dict[str, Any]]:
    """What stock Wan2.2's calls would run on: query and key in float32, value in bf16, lengths."""
    return [_choice(device, WORKLOADS[name], settings) for device in devices for name in SHOWN]


def _choice(device: str, call: Workload, settings: Settings) -> dict[str, Any]:
    bf16 = torch.bfloat16
    dtype = compute_dtype(bf16, bf16, torch.device(device), settings.force_fp16)
    is_self = call.seqlen_q == call.seqlen_k  # cross-attention comes without lengths
    is_wans = any(call.name.startswith(name) for name in MODELS)
    told: dict[str, Any] = {
        "device": device,
        "workload": call.name,
        "title": call.title,
        "shape": call.shape,
        "dtype": dtype_name(dtype),
        "backend": None,
        "kernel": None,
        "variant": None,
        "measured": "",
        "refusals": [],
        "memory": None,
        "block_bytes": None,
        "error": None,
    }
    try:
        request = Request.of(call, dtype, device, qk_dtype=torch.float32, has_k_lens=is_self)
        choice = select(request, settings)
    except (
        RuntimeError
    ) as error:  # nothing takes it, or WAN_ATTN_STRICT=1 and the named one does not
        return {**told, "error": str(error)}
    measured = ""
    if choice.entry is not None and choice.is_measured:
        measured = f"{words.figures(choice.entry)}, {words.age(choice.entry)}"
    return {
        **told,
        "backend": choice.backend,
        "kernel": choice.kernel_name,
        "variant": choice.variant or None,
        "measured": measured,
        "refusals": [list(pair) for pair in choice.refusals],
        "memory": memory.facts(request, choice.backend, choice.variant),
        "block_bytes": memory.block_bytes(request) if is_self and is_wans else None,
    }
