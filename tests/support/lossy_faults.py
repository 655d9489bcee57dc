# SPDX-License-Identifier: Apache-2.0
"""lossy_faults.py - a lossy row that overflows where no exact one does, for tests of whole runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wan_attn.native import bindings


def plant(monkeypatch: pytest.MonkeyPatch, value: float, which: Callable[[int], bool]) -> list[int]:
    """Each lossy call whose number `which` picks has this value in its result, and its guard says
    so, as C's does. The list returned counts them."""
    real, planted, count = bindings.ctypes_sdpa, [], 0

    def overflowing(
        *operands: Tensor, guard: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        nonlocal count
        out, lse = real(*operands, guard=guard, **options)
        if options.get("precision"):
            if which(count):
                out[:, ::3, :, 1] = value
                if guard is not None:
                    guard[3] += int((~torch.isfinite(out)).sum())
                planted.append(count)
            count += 1
        return out, lse

    monkeypatch.setattr(bindings, "ctypes_sdpa", overflowing)
    return planted
