# SPDX-License-Identifier: Apache-2.0
"""guard.py - what a call's status word says: NaN, infinity, values that did not fit.

The word is wan_attn_guard of csrc/wan_attn.h, four numbers on the call's device. On the CPU it is
read at once. On a GPU a copy goes to the host beside the work, and is read when it is there.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor


def make(device: torch.device) -> Tensor:
    """A guard of a call that is about to run: [4] int32, zeros."""
    return torch.zeros(4, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class Words:
    """The fields of wan_attn_guard."""

    largest_value: float
    clipped_values: int
    nonfinite_values: int
    nonfinite_results: int

    @classmethod
    def of(cls, numbers: list[int]) -> Words:
        """From the four int32 of a guard."""
        largest = struct.unpack("f", struct.pack("i", numbers[0]))[0]
        return cls(largest, *(number & 0xFFFFFFFF for number in numbers[1:]))

    def hit(self) -> str | None:
        """What went wrong, for people; None: nothing."""
        found = []
        if self.nonfinite_results:
            found.append(f"{self.nonfinite_results} NaN or infinite numbers in its result")
        if self.nonfinite_values:
            found.append(f"{self.nonfinite_values} in v")
        if self.clipped_values:
            found.append(f"{self.clipped_values} numbers of v too large for float16")
        if not found:
            return None
        largest = "NaN" if math.isnan(self.largest_value) else f"{self.largest_value:.4g}"
        return f"{', '.join(found)}; largest |v|: {largest}"
