# SPDX-License-Identifier: Apache-2.0
"""_enum_member - one more member for a closed `class X(str, Enum)`, and out again.

Knows Python's enumerations; knows nothing about attention or diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def add(enumeration: Any, name: str, value: str, restored: Callable[[], Any]) -> Any:
    """Append `name = value`, as the class's body would have; returns the member.

    Args:
        restored: a function of a module, which pickle stores in the member's place: a process that
            loads it may not have the member.
    """
    member = str.__new__(enumeration, value)
    member._name_, member._value_ = name, value
    member._sort_order_ = len(enumeration._member_names_)
    member.__objclass__ = enumeration
    member.__reduce_ex__ = lambda protocol: (restored, ())
    member.__copy__ = lambda: member
    member.__deepcopy__ = lambda memo: member
    type.__setattr__(enumeration, name, member)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[value] = member
    if hasattr(enumeration, "_hashable_values_"):  # Python 3.12 and newer
        enumeration._hashable_values_.append(value)
    return member


def remove(enumeration: Any, name: str, value: str) -> None:
    """Undo add(); without it, do nothing."""
    for values, entry in (("_member_names_", name), ("_hashable_values_", value)):
        if entry in getattr(enumeration, values, ()):
            getattr(enumeration, values).remove(entry)
    enumeration._member_map_.pop(name, None)
    enumeration._value2member_map_.pop(value, None)
    if name in vars(enumeration):
        type.__delattr__(enumeration, name)
