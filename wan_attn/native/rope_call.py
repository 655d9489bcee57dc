# SPDX-License-Identifier: Apache-2.0
"""rope_call.py - one call of torch.ops.wan_attn.rms_norm_rope: its arguments and their defaults."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RopeCall(NamedTuple):
    """As the op's schema has them; the contract is in csrc/wan_attn.h."""

    x: Tensor
    weight: Tensor | None = None
    table: Tensor | None = None
    grid_sizes: Tensor | None = None
    eps: float | None = None
    per_head: bool = False
    round_norm: bool = True
    seqlen_offset: int = 0
    dtype: torch.dtype | None = None
    kernel: int = -1


OPERANDS = RopeCall._fields[:4]
"""The names of the tensors, which the schema has by position."""
