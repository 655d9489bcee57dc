# SPDX-License-Identifier: Apache-2.0
"""maps.py - cuTensorMapEncodeTiled, field by field: its rules, and what the machine needs.

Rules: CUDA driver API, "Tensor Map Object Management". One of its sentences is not asked for: that
a stride is at least the size of the dimension below it times that one's stride. Everybody's maps
of [batch, seqlen, heads, head_dim] tensors break it (heads lie closer than rows).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_uint, c_ulonglong
from dataclasses import dataclass

from torch import Tensor

MAGIC = 0x70A9ED00


class Encoded(ctypes.Structure):
    """What the machine reads at a map's place (bulk.cpp)."""

    _fields_ = [
        *(("magic", c_uint), ("element_bytes", c_uint), ("data", c_ulonglong)),
        *(("size", c_ulonglong * 4), ("stride", c_ulonglong * 3), ("box", c_uint * 4)),
        *(("swizzle", c_uint), ("unused", c_uint)),
    ]


class MapError(AssertionError):
    """A rule that the driver would not accept to be broken."""


@dataclass(frozen=True)
class Tiled:
    """The arguments of cuTensorMapEncodeTiled, as csrc/cuda/README.md has the host pass them."""

    element_bytes: int
    address: int
    size: Sequence[int]
    strides: Sequence[int]  # in bytes, of all dimensions but the innermost
    box: Sequence[int]
    element_strides: Sequence[int] = (1, 1, 1, 1)
    swizzle: int = 128

    def broken(self) -> str | None:
        """The first rule that is broken."""
        rules = {
            "globalAddress is a multiple of 16": self.address % 16 == 0,
            "globalDim from 1 to 2^32": all(1 <= n <= 2**32 for n in self.size),
            "globalStrides multiples of 16": all(s % 16 == 0 for s in self.strides),
            "globalStrides below 2^40": all(0 < s < 2**40 for s in self.strides),
            "boxDim from 1 to 256": all(1 <= n <= 256 for n in self.box),
            "elementStrides from 1 to 8": all(1 <= n <= 8 for n in self.element_strides),
            "no elementStrides other than 1 here": all(n == 1 for n in self.element_strides),
            "boxDim[0] in bytes a multiple of 16": self.box[0] * self.element_bytes % 16 == 0,
            "boxDim[0] in bytes at most the swizzle": (
                self.box[0] * self.element_bytes <= self.swizzle
            ),
            "rank 4": len(self.size) == len(self.box) == len(self.strides) + 1 == 4,
            # Of this machine: a chunk of 16 bytes is inside or outside as a whole.
            "globalDim[0] in whole chunks": self.size[0] * self.element_bytes % 16 == 0,
        }
        return next((rule for rule, holds in rules.items() if not holds), None)

    def encode(self, place: int) -> None:
        """Writes the map to an address, which must be a multiple of 64.

        Raises:
            MapError: the rule that is broken.
        """
        broken = "tensorMap is a multiple of 64" if place % 64 else self.broken()
        if broken:
            raise MapError(f"{broken}: {self}")
        ctypes.memset(place, 0xEE, 128)
        made = Encoded(MAGIC, self.element_bytes, self.address)
        made.size[:] = list(self.size)
        made.stride[:] = list(self.strides)
        made.box[:] = list(self.box)
        made.swizzle = int(self.swizzle == 128)
        ctypes.memmove(place, ctypes.byref(made), ctypes.sizeof(made))


def of_operand(x: Tensor, box_rows: int) -> Tiled:
    """The map of a [batch, seqlen, heads, head_dim] operand: 64 columns of box_rows rows."""
    batch, seqlen, heads, head_dim = x.shape
    alone = {1: 2 * head_dim, 2: 16, 0: 16}  # strides of dimensions of size 1
    strides = [x.stride(d) * 2 if x.shape[d] > 1 else alone[d] for d in (1, 2, 0)]
    size = (head_dim, seqlen, heads, batch)
    return Tiled(x.itemsize, x.data_ptr(), size, strides, (64, box_rows, 1, 1))
