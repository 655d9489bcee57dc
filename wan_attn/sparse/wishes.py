# SPDX-License-Identifier: Apache-2.0
"""wishes.py - what somebody asks for who wants blocks left out, and of which calls."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wan_attn.observe.place import Place
from wan_attn.request import Request
from wan_attn.sparse.order import Ranges

MODES = ("off", "near_exact", "sparse")
MIN_TOKENS = 12_000
DENSE_STEPS = 0.2
TAU = 1.5
THRESHOLD = 0.05


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asks for.

    Attributes:
        mode: of MODES.
        budget: the relative error that is allowed.
        tau: the largest that is tried.
        threshold: of near_exact.
        min_tokens: a call of fewer is dense.
        dense_steps: the share of steps that are dense, the first ones.
        always: tokens that all see exactly, counted as the host does.
        profile: (expert, layer, kind) -> tau of each group of heads, as an earlier run left them.
        asked_by: how the log names it: WAN_ATTN_SPARSE=sparse.
    """

    mode: str = "off"
    budget: float = 0.05
    tau: float = TAU
    threshold: float = THRESHOLD
    min_tokens: int = MIN_TOKENS
    dense_steps: float = DENSE_STEPS
    always: Ranges = ()
    profile: tuple[tuple[tuple[int | None, int | None, str], tuple[float, ...]], ...] = ()
    asked_by: str = ""

    def is_dense_here(self, where: Place) -> bool:
        """By the schedule: what is known too little of, early steps, and the first layer."""
        if where.step is None or where.steps is None or where.layer is None:
            return True
        first = math.ceil(self.dense_steps * where.steps - 1e-9)
        return where.layer == 0 or where.step < first

    def why_not(self, request: Request) -> str | None:
        """Why such a call is dense whatever computes it; None: it need not be."""
        if request.seqlen_q < self.min_tokens:
            return f"it has {request.seqlen_q} tokens, fewer than {self.min_tokens}"
        return None
