# SPDX-License-Identifier: Apache-2.0
"""schedule.py - which heads of a call may be computed in 8 bits, by rules about its place.

The last rule that fits decides. What is not known can fit no rule that allows 8 bits, and fits
every rule that wants exactness: in doubt a call is exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from wan_attn.precision.place import KINDS, Place

MODES = ("exact", "balanced", "fast", "auto")
EXACT, QK8 = "exact", "qk8"

Numbers = frozenset[int]
Heads = tuple[tuple[int, int], ...]
"""Ranges of heads, each (first, behind its last)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for the calls that it fits. None fits everything; -1 is the last one.

    Attributes:
        precision: "exact" or "qk8", scores in 8 bits.
    """

    precision: str
    kinds: frozenset[str] | None = None
    steps: Numbers | None = None
    layers: Numbers | None = None
    experts: Numbers | None = None
    heads: Numbers | None = None

    def fits(self, place: Place, head: int, heads: int) -> bool:
        """Whether it decides about this head; see above for what is not known."""
        is_in_doubt = self.precision == EXACT
        found = (
            _within(place.step, place.steps, self.steps),
            _within(place.layer, place.layers, self.layers),
            _within(place.expert, None, self.experts),
            _within(head, heads, self.heads),
        )
        is_kind = self.kinds is None or place.kind in self.kinds
        return is_kind and all(is_in_doubt if one is None else one for one in found)


def _within(index: int | None, count: int | None, wanted: Numbers | None) -> bool | None:
    """Whether it is one of these; None: that is not known."""
    if wanted is None:
        return True
    if index is None:
        return None
    if index in wanted or (count is not None and index - count in wanted):
        return True
    return None if count is None and min(wanted) < 0 else False


_FIRST, _LAST = frozenset((0, 1, -2, -1)), frozenset((0, -1))
_BALANCED = (
    Rule(QK8, kinds=frozenset(("self",))),
    Rule(EXACT, steps=_FIRST),
    Rule(EXACT, layers=_LAST),
)
RULES: Mapping[str, tuple[Rule, ...]] = {
    "exact": (),
    "balanced": _BALANCED,
    "auto": _BALANCED,
    "fast": (Rule(QK8, kinds=frozenset(("self", "text"))),),
}
"""What each mode means, before a user's own rules."""


@cache
def lossy_heads(rules: tuple[Rule, ...], place: Place, heads: int) -> Heads:
    """The heads of this call that may be computed in 8 bits; (): none."""
    may = [_may(rules, place, head, heads) for head in range(heads)]
    begins = [i for i in range(heads) if may[i] and (i == 0 or not may[i - 1])]
    ends = [i + 1 for i in range(heads) if may[i] and (i == heads - 1 or not may[i + 1])]
    return tuple(zip(begins, ends, strict=True))


def _may(rules: tuple[Rule, ...], place: Place, head: int, heads: int) -> bool:
    fitting = [rule for rule in rules if rule.fits(place, head, heads)]
    return bool(fitting) and fitting[-1].precision == QK8


def load(path: str, name: str) -> tuple[Rule, ...]:
    """The rules of a file; `name` is what a message calls it.

    Raises:
        ValueError: it cannot be read, or a rule is none; says which and why.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} must be a JSON file, got {path!r} ({error})") from None
    return parse(data, name)


def parse(data: Any, name: str) -> tuple[Rule, ...]:
    """Rules from what JSON holds: a list of objects, or an object with that list as "rules".

    Raises:
        ValueError: "NAME must be ..., got ..." or "NAME, rule N: WHAT must be ..., got ...".
    """
    rules = data.get("rules") if isinstance(data, Mapping) and set(data) == {"rules"} else data
    if not isinstance(rules, list | tuple):
        text = 'a list of rules, or {"rules": [...]}'
        raise ValueError(f"{name} must be {text}, got {_short(data)}")
    return tuple(_rule(f"{name}, rule {n}:", one) for n, one in enumerate(rules, 1))


def _rule(where: str, data: Any) -> Rule:
    names = [field.name for field in fields(Rule)]
    if not isinstance(data, Mapping) or not set(data) <= set(names):
        raise ValueError(f"{where} it must have {', '.join(names)} only, got {_short(data)}")
    precision = data.get("precision")
    if precision not in (EXACT, QK8):
        raise ValueError(f"{where} precision must be {EXACT} or {QK8}, got {_short(precision)}")
    found: dict[str, Any] = {"precision": precision}
    if (kinds := data.get("kinds")) is not None:
        words = kinds.split(",") if isinstance(kinds, str) else kinds
        if not isinstance(words, list | tuple) or not {str(w).strip() for w in words} <= set(KINDS):
            raise ValueError(f"{where} kinds must be of {', '.join(KINDS)}, got {_short(kinds)}")
        found["kinds"] = frozenset(str(word).strip() for word in words)
        if precision == QK8 and "image" in found["kinds"]:
            raise ValueError(f"{where} kinds must not have image, which is always exact, got {QK8}")
    for name in ("steps", "layers", "experts", "heads"):
        if data.get(name) is not None:
            found[name] = _numbers(f"{where} {name}", data[name])
    return Rule(**found)


def _numbers(what: str, data: Any) -> Numbers:
    """[0, 1, -1], 3, or "0-3, 7, -2--1"."""
    parts = data.split(",") if isinstance(data, str) else data
    numbers: set[int] = set()
    for part in parts if isinstance(parts, list | tuple) else [parts]:
        match = re.fullmatch(r"(-?\d{1,6})(?:-(-?\d{1,6}))?", str(part).strip())
        ends = [] if match is None else [int(end) for end in match.groups(default=match[1])]
        if isinstance(part, bool) or not ends or ends[0] > ends[1] or ends[0] < 0 <= ends[1]:
            rule = 'numbers and ranges like "0-3, 7, -1", which count from 0, -1 is the last'
            raise ValueError(f"{what} must be {rule}; got {_short(data)}")
        numbers.update(range(ends[0], ends[1] + 1))
    if not numbers:
        raise ValueError(f"{what} must have a number, got {_short(data)}")
    return frozenset(numbers)


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 80 else text[:77] + "..."


def with_own(mode: str, own: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules of a mode, then a user's own; images are exact at last, whoever says otherwise."""
    return (*RULES[mode], *own, Rule(EXACT, kinds=frozenset(("image",))))
