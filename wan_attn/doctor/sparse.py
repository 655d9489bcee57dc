# SPDX-License-Identifier: Apache-2.0
"""sparse.py - which blocks of keys may be left out, and what would compute such calls on each
device."""

from __future__ import annotations

from typing import Any

import torch

from wan_attn.backends import native
from wan_attn.config import Settings
from wan_attn.observe import sampling
from wan_attn.request import Request
from wan_attn.sparse import kernel, report
from wan_attn.sparse.wishes import MIN_TOKENS, THRESHOLD
from wan_attn.workloads import WORKLOADS

WHAT = {"off": "nothing (WAN_ATTN_SPARSE=off)", "sparse": "blocks whose means score low"}
WHAT["near_exact"] = f"blocks whose weights are all below {THRESHOLD:g}"


def facts(device: str, settings: Settings, request: Request | None = None) -> dict[str, Any]:
    """What calls with blocks left out would be computed by, as plain values.

    Its keys: device, mode, budget, profile (a file or None), min_tokens, kernel (a name or None),
    reason (why the call, or any, is dense), error (what is wrong with the profile, or None).

    Args:
        request: the call; None: plain self-attention of TI2V-5B in bf16.
    """
    if request is None:
        call = WORKLOADS["ti2v-5b-720p"]
        request = Request.of(call, torch.bfloat16, device, qk_dtype=torch.float32)
    threshold = THRESHOLD if settings.sparse == "near_exact" else 0.0
    asked = kernel.asked(request, threshold)
    try:
        reason = _why_dense(request) or kernel.why_not(asked)
    except RuntimeError as problem:  # a device in trouble
        reason = str(problem)
    return {
        "device": device,
        "mode": settings.sparse,
        "budget": settings.sparse_budget,
        "profile": settings.sparse_profile,
        "min_tokens": MIN_TOKENS,
        "kernel": None if reason else native.kernel_name(asked),
        "reason": reason,
        "error": _profile_error(settings),
    }


def _why_dense(request: Request) -> str | None:
    """As sparse/watch.py has it, of what a request tells."""
    if request.seqlen_q != request.seqlen_k:
        return "self-attention alone leaves blocks out"
    if request.seqlen_q < MIN_TOKENS:
        return f"it has {request.seqlen_q} tokens, fewer than {MIN_TOKENS}"
    return sampling.why_not(request)


def _profile_error(settings: Settings) -> str | None:
    """What is wrong with WAN_ATTN_SPARSE_PROFILE; None: nothing, or it is not used."""
    if settings.sparse == "off" or settings.sparse_profile is None:
        return None
    name = "WAN_ATTN_SPARSE_PROFILE"
    try:
        report.profile(settings.sparse_profile, name, settings.sparse_budget)
    except ValueError as error:
        return str(error)
    return None


def told(found: dict[str, Any]) -> str:
    """One sentence."""
    if found["error"]:
        return f"WRONG: {found['error']}"
    what = WHAT[found["mode"]]
    if found["mode"] == "off":
        could = found["kernel"] or f"dense: {found['reason']}"
        return f"{what}; if asked for: {could}"
    if found["kernel"] is None:
        return f"dense: {found['reason']}"
    begins = f", which begins as {found['profile']} says" if found["profile"] else ""
    return (
        f"{found['kernel']} leaves out {what}, in self-attention of {found['min_tokens']} tokens "
        f"and more, within {100 * found['budget']:g} %{begins}"
    )
