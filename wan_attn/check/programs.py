# SPDX-License-Identifier: Apache-2.0
"""programs.py - how programs call a kernel on a GPU: in a captured graph, and on other streams."""

from __future__ import annotations

import torch

from wan_attn.check.calls import Detail, WrongError
from wan_attn.check.target import Kernel, Target

REPLAYS = 3
LATE_PRODUCTS = 10  # of large matrices, so that the copies behind them come late


def check_graph(target: Target, kernel: Kernel, _: str) -> Detail:
    """A captured call, replayed with new inputs and new lengths on the device."""
    row, dtype, device = kernel.row, kernel.dtype, target.device
    head_dim = kernel.head_dim_near(128)
    q, k, v = (torch.randn(2, 300, 2, head_dim, device=device).to(dtype) for _ in range(3))
    lens = torch.tensor([300, 211], device=device)
    replay = target.card.captured(lambda: target.run(row, (q, k, v), None, lens))
    if replay is None:
        return {"skipped": "; ".join(target.card.skipped) or "there are no graphs here"}
    for number in range(REPLAYS):
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape, device=device))
        lens.copy_(torch.tensor([17 + number, 300 - 31 * number]))
        out, _lse = replay()
        target.synchronize()
        eager, _lse = target.run(row, (q, k, v), None, lens)
        if not torch.equal(out, eager):
            raise WrongError(f"replay {number} differs from the call itself")
    return {"replays": REPLAYS}


def check_stream(target: Target, kernel: Kernel, _: str) -> Detail:
    """On a second stream, behind work that is still running there, while the first one is busy."""
    if target.device.type != "cuda":
        return {"skipped": "there are no streams here"}
    dtype, device = kernel.dtype, target.device
    head_dim = kernel.head_dim_near(128)
    q, k, v = (torch.randn(1, 777, 4, head_dim, device=device).to(dtype) for _ in range(3))
    want, _lse = target.run(kernel.row, (q, k, v))
    target.synchronize()
    side = torch.cuda.Stream(device)
    late = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    busy = torch.randn(4096, 4096, device=device)
    target.synchronize()
    for _turn in range(3):
        busy @ busy
    with torch.cuda.stream(side):
        # The copies come late: a call on the wrong stream reads zeros.
        for _turn in range(LATE_PRODUCTS):
            busy @ busy
        for late_copy, source in zip(late, (q, k, v), strict=True):
            late_copy.copy_(source)
        got, _lse = target.run(kernel.row, late)
    side.synchronize()
    if not torch.equal(got, want):
        raise WrongError("on a second stream the result differs")
    return {"stream": "second"}
