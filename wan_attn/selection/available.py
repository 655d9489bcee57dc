# SPDX-License-Identifier: Apache-2.0
"""available.py - wan_attn.backends(): what could run here, and why the rest could not."""

from __future__ import annotations

import torch

from wan_attn.backends import REGISTRY
from wan_attn.request import Request
from wan_attn.workloads import WORKLOADS


def backends(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, str | None]:
    """Every backend, in the order of the selection, with why it cannot run here; None: it can.

    Asked for Wan2.2's plain self-attention (TI2V-5B at 1280x704); `python -m wan_attn why` asks for
    any other call. Allocates nothing.

    Args:
        device: None: the current CUDA device where there is one, else the CPU.
        dtype: what would be computed in.

    Returns:
        name, as in USE_ATTENTION_BACKEND -> reason or None.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    call = WORKLOADS["ti2v-5b-720p"]
    request = Request(
        batch=call.batch,
        seqlen_q=call.seqlen_q,
        seqlen_k=call.seqlen_k,
        num_heads_q=call.num_heads_q,
        num_heads_k=call.num_heads_k,
        head_dim=call.head_dim,
        dtype=dtype,
        query_dtype=dtype,
        key_dtype=dtype,
        device=torch.device(device),
    )
    return {name: backend.why_not(request) for name, backend in REGISTRY.items()}
