# SPDX-License-Identifier: Apache-2.0
"""gate.py - what arguments may be, value by value: every public function asks here.

Nothing is cut, rounded or guessed at: a value that is not what its argument wants is refused by the
argument's name, the rule and what was given, before anything is computed. Callers test for the
usual type themselves, so that an ordinary call enters nothing here. Knows no attention.
"""

from __future__ import annotations

import math
import numbers
import operator
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from wan_attn.transient import is_transient

# Compared with, as a tracer cannot look for its own integers in a range.
_LEAST, _MOST = -(1 << 63), (1 << 63) - 1
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)  # numbers that a tracer follows
DENSE = "a dense tensor on cpu or cuda"


class Refusal(RuntimeError):
    """A bad argument: no backend has failed, and none could do better.

    Attributes:
        argument, verb, rule, got: the parts of the message.
    """

    def __init__(self, argument: str, rule: str, got: object, verb: str = "be") -> None:
        super().__init__(f"wan_attn: {argument} must {verb} {rule}, got {got}")
        self.argument, self.rule, self.got, self.verb = argument, rule, str(got), verb

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, self.rule, self.got, self.verb)

    def under(self, names: Mapping[str, str]) -> Refusal:
        """The same in the words of a function that calls its arguments by other names."""
        words = re.compile(rf"\b({'|'.join(names)})\b")
        argument, rule = (
            words.sub(lambda found: names[found[1]], text) for text in (self.argument, self.rule)
        )
        owners = re.compile(rf"\b({'|'.join(names)})(?='s\b)")
        got = owners.sub(lambda found: names[found[1]], self.got)
        return Refusal(argument, rule, got, self.verb)


def refuse(argument: str, rule: str, got: object) -> NoReturn:
    """Raise the error of a broken rule."""
    raise Refusal(argument, rule, got)


def refuse_having(argument: str, rule: str, got: object) -> NoReturn:
    """The same, of what an argument must have."""
    raise Refusal(argument, rule, got, "have")


def kind_of(value: object) -> str:
    """What stands in place of a tensor, a model or a function: a short value as it is, else its
    type alone, as its contents may be endless."""
    if value is None or isinstance(value, (bool, int, float)):
        return shown(value)
    if isinstance(value, str) and len(value) <= 60:
        return repr(value)
    return f"a {type(value).__name__}"


def shown(value: object) -> str:
    """A value as messages show it: short, and tensors by their shape."""
    try:
        if isinstance(value, Tensor):
            if value.is_nested:  # which has no one shape
                return "a nested Tensor"
            return f"a Tensor of shape {list(value.shape)}"
        return reprlib.repr(value)
    except Exception as error:  # noqa: BLE001 - an integer too long to print, a repr that raises
        if is_transient(error):
            raise
        return f"a {type(value).__name__}"


def number(name: str, value: object) -> float:
    """A finite number as a float; one that a tracer follows as it is.

    Raises:
        Refusal: it is a bool, text, a tensor or another object, or not finite.
    """
    if type(value) is not float:
        if isinstance(value, _SYMBOLIC):
            return value  # type: ignore[return-value]  # stands for a float
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            refuse(name, "a number", shown(value))
        try:
            value = float(value)
        except OverflowError:
            refuse(name, "finite as a float", shown(value))
        except Exception as error:  # noqa: BLE001 - of the value's own kind; numpy's times are Real
            if is_transient(error):
                raise
            refuse(name, "a number", shown(value))
    if not -math.inf < value < math.inf:
        refuse(name, "finite", f"{value:g}")
    return value


def probability(name: str, value: object) -> float:
    """A number in [0, 1)."""
    found = value if type(value) is float else number(name, value)
    if not 0 <= found < 1:  # NaN and infinity are not
        refuse(name, "in [0, 1)", shown(value))
    return found


def flag(name: str, value: object) -> bool:
    """A bool, 0 or 1: what else is true or false to Python is more likely a mistake.

    Raises:
        Refusal: it is anything else.
    """
    if isinstance(value, (bool, torch.SymBool)) or (type(value) is int and value in (0, 1)):
        return bool(value)
    refuse(name, "a bool, 0 or 1", shown(value))


def integer(name: str, value: object, at_least: int | None = None) -> int:
    """An integer of 64 bits: Python's, numpy's, or a tensor of one that can be read here.

    Raises:
        Refusal: it is a bool or a fraction, even a whole one, or too large, or below `at_least`.
    """
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # stands for an int
    result = value if type(value) is int else _index(value)
    if result is None:
        refuse(name, "an integer", shown(value))
    if not _LEAST <= result <= _MOST:
        refuse(name, "an integer of 64 bits", shown(result))
    if at_least is not None and result < at_least:
        refuse(name, f"at least {at_least}", result)
    return result


def _index(value: Any) -> int | None:
    """`value` as an integer; None: it is none."""
    if isinstance(value, Tensor):
        is_integer = not (value.is_floating_point() or value.is_complex())
        if not is_integer or value.dtype == torch.bool or value.is_quantized or value.is_meta:
            return None
        if value.layout != torch.strided or value.is_nested or value.numel() != 1:
            return None
        return int(value)
    # numpy's array of one has __index__ too, and bool is a kind of int.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except Exception as error:  # noqa: BLE001 - of the value's own kind
        if is_transient(error):
            raise
        return None


def integers(name: str, values: object, rule: str = "a tensor or a list of integers") -> list[int]:
    """A list, a tuple, a range or numpy's array of integers, as a list.

    Raises:
        Refusal: it is text, a set, a mapping or a generator, or one of its elements is no integer.
    """
    is_array = hasattr(values, "__array__") and getattr(values, "ndim", 0) == 1
    is_sequence = isinstance(values, Sequence) or is_array
    if not is_sequence or isinstance(values, (str, bytes, bytearray, memoryview)):
        refuse(name, rule, shown(values))
    found: list[int] = []
    for value in values:  # type: ignore[attr-defined]
        if len(found) == len(values):  # type: ignore[arg-type]  # one of an endless sequence
            refuse(name, rule, kind_of(values))
        if type(value) is not int:
            if isinstance(value, (Sequence, Mapping)) or _index(value) is None:
                refuse(name, rule, shown(values))
            value = _index(value)
        if not _LEAST <= value <= _MOST:
            refuse(name, "of integers of 64 bits", shown(values))
        found.append(value)
    return found


def lengths(name: str, values: object) -> Tensor | None:
    """Real lengths as a tensor; one that is given is only checked with the rest of the call."""
    if values is None or type(values) is Tensor:
        return values
    if isinstance(values, Tensor):
        dense(name, values)
        return values
    # The CPU by name: the program may have another default device.
    return torch.tensor(integers(name, values), dtype=torch.int64, device="cpu")


def pair(name: str, value: object) -> tuple[int, int]:
    """(left, right), a tuple or a list of two integers.

    Raises:
        Refusal: it is anything else.
    """
    if type(value) is tuple and len(value) == 2:  # the usual case
        left, right = value
        are_integers = type(left) is int and type(right) is int
        if are_integers and _LEAST <= left <= _MOST and _LEAST <= right <= _MOST:
            return value
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        refuse(name, "a pair (left, right)", shown(value))
    left, right = integers(name, value, "a pair of integers (left, right)")
    return left, right


def nothing(name: str, value: object, why: str) -> None:
    """Refuse whatever is given for an argument that nothing here has."""
    if value is not None:
        refuse(name, f"None, as {why}", shown(value))


def dense(name: str, value: object) -> None:
    """A tensor that lies in memory by strides.

    Raises:
        Refusal: it is no tensor, or sparse, nested, of mkldnn, or spread over processes.
    """
    # A weak reference passes for an instance, and is none.
    if not isinstance(value, Tensor) or not issubclass(type(value), Tensor):
        refuse(name, "a tensor", kind_of(value))
    try:
        is_nested = value.is_nested
    except TypeError:  # a subclass whose __torch_function__ takes nothing
        refuse(name, "a tensor that torch's functions take", kind_of(value))
    if is_nested:  # of which one kind calls its layout strided
        refuse(name, DENSE, "a nested tensor")
    if value.layout != torch.strided:
        refuse(name, DENSE, f"{value.layout} on {value.device}")
    # Known by name, as importing it costs more than all of this package.
    if type(value) is not Tensor and "DTensor" in (x.__name__ for x in type(value).__mro__):
        refuse(name, "this process's own part, as .to_local() gives", "a DTensor")
