# SPDX-License-Identifier: Apache-2.0
"""malformed.py - every argument of every public function, broken in every way of values.py: refused
with the argument's name, the rule and what was given, or taken where that is legal.

    python tests/fuzz/malformed.py [FUNCTION ...]      prints a table, then what is wrong
"""

from __future__ import annotations

import contextlib
import enum
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import wan_attn.config
from fuzz import odd_values
from fuzz.count import Count
from fuzz.functions import OPS, Function, allowed, functions
from wan_attn.transient import is_out_of_memory

Bits = tuple[torch.Tensor, ...]


class Outcome(enum.Enum):
    """What became of a call."""

    REFUSED = "refused"  # by its own name
    ALIAS = "by another name"  # refused with the engine's word for it: query for q
    ALLOWED = "legal"  # taken, and functions.py says why that is right
    ACCEPTED = "ACCEPTED"
    WORDS = "WORDS"  # refused, and the message does not say which argument, or which rule
    WRONG = "WRONG"  # taken, and the result is not that of the same numbers in a plain tensor
    HARMED = "HARMED"  # good calls are no longer what they were


MODES = ("inference", "training")

# Two operands do not fit each other: the message may be about either.
_MISFITS = ("another", "no heads", "head_dim", "meta", "as out", "none in", "2^")

BAD = (Outcome.ACCEPTED, Outcome.WORDS, Outcome.WRONG, Outcome.HARMED)


@dataclass(frozen=True)
class Finding:
    """One broken call."""

    function: str
    argument: str
    value: str
    mode: str
    outcome: Outcome
    said: str

    def __str__(self) -> str:
        said = " ".join(self.said.split())[:150]
        call = f"{self.function}({self.argument}={self.value}) [{self.mode}]"
        return f"{self.outcome.value} {call}: {said}"

    @property
    def key(self) -> str:
        return f"{self.function} {self.argument} {self.value}"


def _is_said_properly(text: str, names: frozenset[str]) -> bool:
    """wan_attn: [where: ]<argument> must ... , got ..."""
    found = re.match(r"wan_attn: (?:\S+: )?((?:\w+)(?: and \w+)*) must .+, got ", text, re.DOTALL)
    return found is not None and bool(set(found[1].split(" and ")) & names)


def _is_said_by_torch(function: Function, error: Exception, argument: str) -> bool:
    """The op's types are its schema's business; torch names the argument and what it expected."""
    text = str(error)
    expects = rf"Expected a value of type .* for argument '{argument}' but instead found"
    overflow = isinstance(error, (OverflowError, RuntimeError)) and argument in text
    return function.name in OPS and (re.search(expects, text) is not None or overflow)


def judge(function: Function, argument: str, value: str, error: Exception | None) -> Outcome:
    """What the outcome of this call is worth."""
    is_legal = allowed(function, argument, value) is not None
    if error is None or (is_legal and (function.name in OPS or is_out_of_memory(error))):
        return Outcome.ALLOWED if is_legal else Outcome.ACCEPTED
    if not isinstance(error, (RuntimeError, TypeError, ValueError, OverflowError)):
        return Outcome.WORDS
    if _is_said_properly(str(error), frozenset({argument})):
        return Outcome.REFUSED
    others = function.words.get(argument, frozenset())
    if value.startswith(_MISFITS):
        others = others | {"query", "key", "value", "q", "k", "v", "kv", "out2", "lse1", "lse2"}
        others |= {"q_lens", "k_lens", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"}
    if _is_said_properly(str(error), others):
        return Outcome.ALIAS
    return Outcome.REFUSED if _is_said_by_torch(function, error, argument) else Outcome.WORDS


def _tensors(result: Any) -> Bits:
    parts = result if isinstance(result, tuple) else (result,)
    return tuple(x.detach().clone() for x in parts if isinstance(x, torch.Tensor))


def _same(one: Bits, other: Bits) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def _alike(one: Bits, other: Bits) -> bool:
    """Equal but for rounding: another backend may read a copy."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-2, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def _call(function: Function, arguments: dict[str, Any]) -> tuple[Any, Exception | None]:
    try:
        return function.call(**arguments), None
    except Exception as error:  # noqa: BLE001 - which one it is, is the question
        return None, error


@contextlib.contextmanager
def _mode(name: str) -> Iterator[None]:
    with torch.set_grad_enabled(name == "training"):
        yield


def _wanting_grad(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with a gradient wanted for the first operand."""
    name = next(iter(arguments), "")
    first = arguments.get(name)
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        return arguments
    return {**arguments, name: first.detach().requires_grad_()}


def break_one(function: Function, argument: str, value: str, mode: str) -> Finding | None:
    """Breaks this argument in this way; None: torch cannot make such a value."""
    good = function.good()
    arguments = _wanting_grad(good) if mode == "training" else good
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about prototypes
        try:
            bad = function.kinds[argument][value](arguments.get(argument))
        except (AttributeError, RuntimeError, TypeError):
            return None
        result, error = _call(function, {**arguments, argument: bad})
    outcome = judge(function, argument, value, error)
    said = (
        f"{type(error).__name__}: {error}" if error is not None else f"-> {type(result).__name__}"
    )
    reason = allowed(function, argument, value)
    if outcome is Outcome.ALLOWED:
        said = f"{reason}"
        if error is None and value in odd_values.SAME:
            good = function.call(**{**arguments, argument: odd_values.plain(bad)})
            if not _alike(_tensors(result), _tensors(good)):
                outcome, said = Outcome.WRONG, "another result than the same numbers in a copy"
    return Finding(function.name, argument, value, mode, outcome, said)


def _hooks_left() -> bool:
    """Whether wan_attn listens to imports although it is not patched; takes its hooks away."""
    with contextlib.suppress(Exception):  # what it says is not the question
        wan_attn.unpatch()
    ours = [hook for hook in sys.meta_path if type(hook).__module__.startswith("wan_attn")]
    for hook in ours:
        sys.meta_path.remove(hook)
    return bool(ours)


def check(function: Function, modes: tuple[str, ...] = MODES) -> Iterator[Finding]:
    """All broken calls of one function; good calls must go on giving the same bits."""
    has_good = bool(function.good()) and function.name != "patch"
    for mode in modes:
        with _mode(mode):
            before = _tensors(function.call(**function.good())) if has_good else ()
            for argument, kind in function.kinds.items():
                for value in kind:
                    found = break_one(function, argument, value, mode)
                    if found is not None:
                        yield found
                    if _hooks_left():
                        said = "an import hook is left behind, and every later import fails in it"
                        yield Finding(function.name, argument, value, mode, Outcome.HARMED, said)
                if has_good and not _same(before, _tensors(function.call(**function.good()))):
                    yield Finding(function.name, argument, "*", mode, Outcome.HARMED, "other bits")
                    wan_attn.config.refresh()  # what was decided is decided anew


def table(findings: list[Finding]) -> str:
    """How often each function came to each outcome."""
    names = list(dict.fromkeys(f.function for f in findings))
    counts = Counter((f.function, f.outcome) for f in findings)
    rows = [["function", *(o.value for o in Outcome), "calls"]]
    for name in names:
        row = [counts[name, o] for o in Outcome]
        rows.append([name, *map(str, row), str(sum(row))])
    total = [sum(counts[n, o] for n in names) for o in Outcome]
    rows.append(["all", *map(str, total), str(sum(total))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])  # noqa: B905
        for row in rows
    ]
    return "\n".join(lines)


def campaign(only: tuple[str, ...] = (), modes: tuple[str, ...] = MODES) -> list[Finding]:
    """Every broken call of these functions, or of all."""
    chosen = [f for f in functions() if not only or f.name in only]
    return [found for function in chosen for found in check(function, modes)]


def main(names: list[str]) -> int:
    findings = campaign(tuple(names))
    print(table(findings))
    bad = [f for f in findings if f.outcome in BAD]
    for found in bad:
        print(found)
    accepted = sum(f.outcome is Outcome.ACCEPTED for f in bad)
    return Count(calls=len(findings), wrong=len(bad) - accepted, accepted=accepted).end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
