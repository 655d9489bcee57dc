# SPDX-License-Identifier: Apache-2.0
"""odd_values.py - values that look right and are not quite, or look odd and are right: numpy's and
enum's numbers, subclasses, lazy bits, strange strides and sizes, sequences that change.

The tables of values.py take these in. LEGAL says which may be taken, and why; a call that takes one
must give what it gives for the same numbers in a plain tensor (see plain()).
"""

from __future__ import annotations

import array
import collections
import enum
import itertools
import weakref
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Make = Callable[[Any], Any]


class Number(enum.IntEnum):
    ZERO, ONE, TWO, THREE, EIGHT = 0, 1, 2, 3, 8


class Text(str):
    """Text of the user's own kind."""


class Real(float):
    """A float of the user's own kind."""


class Whole(int):
    """An integer of the user's own kind."""


class Raising:
    """Breaks where it is converted or printed."""

    def __float__(self) -> float:
        raise ZeroDivisionError("not this one")

    def __repr__(self) -> str:
        raise ZeroDivisionError("nor printed")

    __index__ = __bool__ = __len__ = __iter__ = __float__


class Anything:
    """Has every attribute, and may be called."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


class Changing(list[Any]):
    """Other numbers each time it is read."""

    def __iter__(self) -> Iterator[Any]:
        numbers = list(super().__iter__())
        self[:] = [number + 1000 for number in numbers]
        return iter(numbers)


class Endless(list[Any]):
    """Says that it has two, and never ends."""

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(1)


class Pair(NamedTuple):
    left: int
    right: int


class Tagged(Tensor):
    """A subclass that does nothing of its own."""


class Deaf(Tensor):
    """One that lets no function of torch's near it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.detach().clone()


def _unaligned(x: Tensor) -> Tensor:
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x.detach())


def _strided(x: Tensor) -> Tensor:
    """Every other element of one with twice as many."""
    return torch.stack((x.detach(), x.detach() + 1), -1)[..., 0]


def _overlapping(x: Tensor) -> Tensor:
    """Neighbours in the first dimension share all of their memory but one element."""
    plain = x.detach().contiguous()
    strides = (1, *plain.stride()[1:])
    return torch.cat((plain.flatten(), plain.flatten())).as_strided(plain.shape, strides)


def _huge(x: Tensor, size: int) -> Tensor:
    """Its second dimension this large, of no memory."""
    return x.detach()[:, :1].expand(-1, size, *x.shape[2:])


def plain(value: Any) -> Any:
    """The same numbers in a plain tensor of its own memory; what is no tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty(value.shape, dtype=value.dtype)
    return copy.copy_(value.detach())


def list_of_itself() -> list[Any]:
    made: list[Any] = []
    made.extend((made, made))
    return made


# Operands: what they hold is read, so that where it lies is the tensor's business.
TENSORS: dict[str, Make] = {
    "transposed memory": lambda x: x.detach().transpose(0, 1).contiguous().transpose(0, 1),
    "unaligned memory": _unaligned,
    "every other element": _strided,
    "overlapping": _overlapping,
    "one expanded": lambda x: x.detach()[:1].expand(x.shape),
    "negative bit": lambda x: torch._neg_view(-x.detach()),
    "part of a conjugate": lambda x: torch.complex(x.detach().float(), -x.float()).conj().imag,
    "view of a leaf": lambda x: x.detach().requires_grad_().view(x.shape),
    "inference tensor": _inference,
    "Parameter": lambda x: torch.nn.Parameter(x.detach()),
    "subclass": lambda x: x.detach().as_subclass(Tagged),
    "deaf subclass": lambda x: x.detach().as_subclass(Deaf),
    "named": lambda x: x.detach().rename(*"ABCDE"[: x.ndim]),
    "conjugate": lambda x: torch.complex(x.float(), x.float()).conj(),
    "none in the first": lambda x: x[:0],
    "none in the second": lambda x: x[:, :0],
    "none in the third": lambda x: x[:, :, :0],
    "none in the last": lambda x: x[..., :0],
    "none at all": lambda x: torch.empty(0),
    "2^40 in the second": lambda x: _huge(x, 1 << 40),
    "2^45 in the second": lambda x: _huge(x, 1 << 45),
    "2^50 in the second": lambda x: _huge(x, 1 << 50),
    "Anything": lambda x: Anything(),
    "Raising": lambda x: Raising(),
    "0d numpy": lambda x: np.array(0.5),
    "weak": lambda x: weakref.proxy(x),
}
_ITS_MEMORY = "the numbers are the same wherever they lie"
_MISFIT = "what has no elements has a result, if it fits the other operands"
LEGAL_TENSORS = {
    "2^40 in the second": "a size for which only memory is wanting",
    **dict.fromkeys(
        ("transposed memory", "unaligned memory", "every other element", "overlapping"), _ITS_MEMORY
    ),
    **dict.fromkeys(("one expanded", "negative bit", "part of a conjugate"), _ITS_MEMORY),
    **dict.fromkeys(("view of a leaf", "inference tensor", "Parameter", "subclass"), _ITS_MEMORY),
    **dict.fromkeys(("none in the first", "none in the second", "none in the third"), _MISFIT),
}

SAME = frozenset(name for name, why in LEGAL_TENSORS.items() if why is _ITS_MEMORY)

INTEGERS: dict[str, Make] = {
    "every other number": lambda x: torch.stack((x, x + 1000), 1)[:, 0],
    "one expanded": lambda x: x[:1].expand(x.shape),
    "negative bit": lambda x: torch._neg_view(-x),
    "inference tensor": _inference,
    "subclass": lambda x: x.as_subclass(Tagged),
    "deaf subclass": lambda x: x.as_subclass(Deaf),
    "named": lambda x: x.rename("A"),
    "uint64 tensor": lambda x: x.to(torch.uint64),
    "2^62 expanded": lambda x: x[:1].expand(1 << 62),
    "Raising": lambda x: Raising(),
    "Anything": lambda x: Anything(),
    "weak": lambda x: weakref.proxy(x),
}
LEGAL_INTEGERS = dict.fromkeys(
    ("every other number", "one expanded", "negative bit", "inference tensor", "subclass"),
    _ITS_MEMORY,
)

LISTS: dict[str, Make] = {
    "numpy": lambda x: x.numpy(),
    "numpy backwards": lambda x: x.numpy()[::-1],
    "list of numpy's": lambda x: [np.int64(n) for n in x.tolist()],
    "list of tensors": lambda x: list(x),
    "list of an enum's": lambda x: [Number.ONE, Number.TWO],
    "user's list": lambda x: collections.UserList(x.tolist()),
    "deque": lambda x: collections.deque(x.tolist()),
    "range": lambda x: range(1, 3),
    "array": lambda x: array.array("q", x.tolist()),
    "changing": lambda x: Changing(x.tolist()),
    "array of floats": lambda x: array.array("d", [1.5, 2.5]),
    "numpy beyond 64 bit": lambda x: np.array([1 << 63, 1], dtype=np.uint64),
    "numpy objects": lambda x: np.array([1.5, None], dtype=object),
    "numpy 2d": lambda x: np.ones((2, 1), dtype=np.int64),
    "0d numpy": lambda x: np.array(2),
    "numpy times": lambda x: np.array([1, 2], dtype="timedelta64[s]"),
    "endless": lambda x: Endless([1, 2]),
    "list of Raising": lambda x: [Raising(), Raising()],
    "list of itself": lambda x: list_of_itself(),
    "text of one's own": lambda x: Text("12"),
    "bytearray": lambda x: bytearray(b"\1\2"),
    "memoryview": lambda x: memoryview(b"\1\2"),
}
LEGAL_LISTS = dict.fromkeys(
    (
        *("numpy", "numpy backwards", "list of numpy's", "list of tensors", "list of an enum's"),
        *("user's list", "deque", "range", "array", "changing"),
    ),
    "a sequence of integers",
)

NUMBERS: dict[str, Make] = {
    "enum": lambda x: Number.ONE,
    "user's float": lambda x: Real(0.5),
    "user's nan": lambda x: Real("nan"),
    "numpy half": lambda x: np.float16(0.5),
    "numpy long": lambda x: np.longdouble(0.5),
    "numpy beyond float": lambda x: np.longdouble("1e4000"),
    "numpy bool": lambda x: np.bool_(True),
    "numpy complex": lambda x: np.complex64(0.5),
    "numpy time": lambda x: np.timedelta64(1, "s"),
    "0d numpy": lambda x: np.array(0.5),
    "numpy of one": lambda x: np.array([0.5]),
    "Decimal nan": lambda x: Decimal("nan"),
    "Fraction beyond float": lambda x: Fraction(10**400),
    "text of one's own": lambda x: Text("0.5"),
    "numpy's text": lambda x: np.str_("0.5"),
    "0d int tensor": lambda x: torch.tensor(1),
    "leaf": lambda x: torch.tensor(0.5, requires_grad=True),
    "Parameter": lambda x: torch.nn.Parameter(torch.tensor(0.5)),
    "Raising": lambda x: Raising(),
    "Anything": lambda x: Anything(),
}
LEGAL_NUMBERS = dict.fromkeys(
    ("enum", "user's float", "numpy half", "numpy long", "0d int tensor"), "it is a number"
)

COUNTS: dict[str, Make] = {
    "enum": lambda x: Number.EIGHT,
    "user's int": lambda x: Whole(9),
    "numpy": lambda x: np.int32(9),
    "0d numpy": lambda x: np.array(9),
    "2^63 - 1": lambda x: (1 << 63) - 1,
    "2^63": lambda x: 1 << 63,
    "numpy 2^63": lambda x: np.uint64(1 << 63),
    "-2^63 - 1": lambda x: -(1 << 63) - 1,
    "10^5000": lambda x: 10**5000,
    "whole float": lambda x: 9.0,
    "numpy whole float": lambda x: np.float64(9.0),
    "numpy bool": lambda x: np.bool_(True),
    "numpy time": lambda x: np.timedelta64(9, "s"),
    "text of one's own": lambda x: Text("9"),
    "Fraction": lambda x: Fraction(9),
    "Raising": lambda x: Raising(),
    "Anything": lambda x: Anything(),
}
LEGAL_COUNTS = dict.fromkeys(
    ("enum", "user's int", "numpy", "0d numpy", "2^63 - 1"), "it is an integer of 64 bits"
)

FLAGS: dict[str, Make] = {
    "enum": lambda x: Number.ONE,
    "numpy": lambda x: np.bool_(False),
    "0d numpy": lambda x: np.array(False),
    "numpy of one": lambda x: np.array([False]),
    "0d tensor": lambda x: torch.tensor(False),
    "user's int": lambda x: Whole(1),
    "whole float": lambda x: 0.0,
    "text of one's own": lambda x: Text("False"),
    "Raising": lambda x: Raising(),
    "Anything": lambda x: Anything(),
}
LEGAL_FLAGS = dict.fromkeys(("enum", "numpy", "user's int"), "it is false or true, or 0 or 1")

PAIRS: dict[str, Make] = {
    "named": lambda x: Pair(3, 0),
    "torch.Size": lambda x: torch.Size((3, 0)),
    "numpy's": lambda x: (np.int64(3), np.int32(0)),
    "enum's": lambda x: (Number.THREE, Number.ZERO),
    "2^63 - 1": lambda x: ((1 << 63) - 1, (1 << 63) - 1),
    "2^63": lambda x: (1 << 63, 0),
    "numpy": lambda x: np.array([3, 0]),
    "tensors": lambda x: (torch.tensor(3), torch.tensor(0)),
    "changing": lambda x: Changing([3, 0]),
    "endless": lambda x: Endless([3, 0]),
    "whole floats": lambda x: (3.0, 0.0),
    "Raisings": lambda x: (Raising(), Raising()),
    "Raising": lambda x: Raising(),
    "Anything": lambda x: Anything(),
    "text of one's own": lambda x: Text("30"),
}
LEGAL_PAIRS = dict.fromkeys(
    ("named", "torch.Size", "numpy's", "enum's", "2^63 - 1", "numpy", "tensors", "changing"),
    "two integers",
)

# What is one of a few words, a dtype, a model, or nothing.
OBJECTS: dict[str, Make] = {
    "Raising": lambda x: Raising(),
    "Anything": lambda x: Anything(),
    "0d numpy": lambda x: np.array(2),
    "numpy": lambda x: np.ones(3),
    "deaf subclass": lambda x: torch.ones(2).as_subclass(Deaf),
    "text of one's own": lambda x: Text("nothing"),
    "list of itself": LISTS["list of itself"],
}
