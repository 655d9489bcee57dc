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

from wan_attn.observe.place import KINDS, Place
from wan_attn.request import gate

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
        ValueError: "NAME must be ..., got ..." or "NAME must have ... in rule N, got ...".
    """
    rules = data.get("rules") if isinstance(data, Mapping) and set(data) == {"rules"} else data
    if not isinstance(rules, list | tuple):
        text = 'a list of rules, or {"rules": [...]}'
        raise ValueError(f"{name} must be {text}, got {gate.shown(data)}")
    return tuple(_rule(_Where(name, number), one) for number, one in enumerate(rules, 1))


@dataclass(frozen=True, slots=True)
class _Where:
    """A rule that is being read."""

    name: str
    number: int

    def refusal(self, rule: str, got: object) -> ValueError:
        """What is wrong with it."""
        shown = gate.shown(got)
        return ValueError(f"{self.name} must have {rule} in rule {self.number}, got {shown}")


def _rule(where: _Where, data: Any) -> Rule:
    names = [field.name for field in fields(Rule)]
    if not isinstance(data, Mapping) or not set(data) <= set(names):
        raise where.refusal(f"only {', '.join(names)}", data)
    precision = data.get("precision")
    if not isinstance(precision, str) or precision not in (EXACT, QK8):
        raise where.refusal(f"precision {EXACT} or {QK8}", precision)
    found: dict[str, Any] = {"precision": precision}
    if (kinds := data.get("kinds")) is not None:
        words = kinds.split(",") if isinstance(kinds, str) else kinds
        is_list = isinstance(words, list | tuple) and all(isinstance(w, str) for w in words)
        if not is_list or not {word.strip() for word in words} <= set(KINDS):
            raise where.refusal(f"kinds of {', '.join(KINDS)}", kinds)
        found["kinds"] = frozenset(word.strip() for word in words)
        if precision == QK8 and "image" in found["kinds"]:
            raise where.refusal("image exact, as it always is,", precision)
    for name in ("steps", "layers", "experts", "heads"):
        if data.get(name) is not None:
            found[name] = _numbers(where, name, data[name])
    return Rule(**found)


def _numbers(where: _Where, name: str, data: Any) -> Numbers:
    """[0, 1, -1], 3, or "0-3, 7, -2--1"."""
    parts = data.split(",") if isinstance(data, str) else data
    numbers: set[int] = set()
    for part in parts if isinstance(parts, list | tuple) else [parts]:
        is_one = isinstance(part, int | str) and not isinstance(part, bool)
        match = re.fullmatch(r"(-?\d{1,6})(?:-(-?\d{1,6}))?", str(part).strip()) if is_one else None
        ends = [] if match is None else [int(end) for end in match.groups(default=match[1])]
        if not ends or ends[0] > ends[1] or ends[0] < 0 <= ends[1]:
            text = f'{name} like "0-3, 7, -1", from 0 on, -1 being the last,'
            raise where.refusal(text, data)
        numbers.update(range(ends[0], ends[1] + 1))
    if not numbers:
        raise where.refusal(f"a number among {name}", data)
    return frozenset(numbers)


def with_own(mode: str, own: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules of a mode, then a user's own; images are exact at last, whoever says otherwise."""
    return (*RULES[mode], *own, Rule(EXACT, kinds=frozenset(("image",))))
