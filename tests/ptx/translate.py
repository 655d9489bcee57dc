# SPDX-License-Identifier: Apache-2.0
"""translate.py - instructions to what the machine executes: operands become slots of a warp.

What an instruction is called with all its modifiers, and which operands it takes, the machine's own
tables say (`Op` of machine.h). An instruction that is not there is refused.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from dataclasses import dataclass, field

from ptx.flow import meeting_points
from ptx.parse import Instruction, Kernel, Refused

# Slots that every warp begins with, as in machine.h.
SPECIAL = {
    name: slot
    for slot, name in enumerate(
        ("%tid.x", "%ctaid.x", "%cluster_ctarank", "shared", "%ntid.x", "%laneid", "shared64")
    )
}
FIRST_FREE = 8
BITS = {"p": 1, "h": 16, "r": 32, "l": 64}
Table = dict[str, list[tuple[int, list[str]]]]  # name: (number, operands), one or more of them


@dataclass
class Translated:
    """Arrays for the machine, and what each instruction is called."""

    kernel: str
    threads: int
    cluster: int
    param_bytes: int
    slots: int = 0
    code: array[int] = field(default_factory=lambda: array("i"))
    pool: array[int] = field(default_factory=lambda: array("i"))
    kinds: bytearray = field(default_factory=bytearray)
    constants: array[int] = field(default_factory=lambda: array("Q"))
    constant_slots: array[int] = field(default_factory=lambda: array("i"))
    names: list[str] = field(default_factory=list)


def translated(kernel: Kernel, table: Table) -> Translated:
    """The kernel as the machine takes it.

    Raises:
        Refused: an opcode, modifier or operand that the machine does not know.
    """
    out = Translated(kernel.name, kernel.threads, kernel.cluster, kernel.param_bytes)
    _Writer(kernel, table, out).write()
    return out


def _literal(text: str, bits: int) -> int | None:
    """The bits of a constant of this size; None if it is none (PTX ISA, "Constants")."""
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return int(match[1], 16)
    if bits == 64 and (match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text)):
        return int(match[1], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        value = int(text.rstrip("U"), 0)
        if not -(1 << max(bits - 1, 1)) <= value < 1 << max(bits, 2):
            raise Refused(f"{text} does not fit {bits} bits")
        if bits == 1:
            return 0xFFFFFFFF if value else 0
        return value & ((1 << bits) - 1)
    return None


class _Writer:
    def __init__(self, kernel: Kernel, table: Table, out: Translated) -> None:
        self.kernel, self.table, self.out = kernel, table, out
        self.next = FIRST_FREE
        self.slot: dict[str, int] = {}
        self.constant: dict[tuple[int, bool], int] = {}
        self.chosen = [self._choice(one) for one in kernel.code]
        self.local = self._temporaries()
        self.free: dict[bool, list[int]] = {False: [], True: []}
        self.ends: dict[int, list[str]] = defaultdict(list)

    def _choice(self, one: Instruction) -> tuple[int, list[str]]:
        """The entry of the table whose operands have this one's shape."""
        if one.opcode not in self.table:
            raise Refused(f"line {one.line}: {one.opcode} is not known")
        for number, pattern in self.table[one.opcode]:
            if len(pattern) == len(one.operands) and all(
                self._fits(operand, kind)
                for operand, kind in zip(one.operands, pattern, strict=True)
            ):
                return number, pattern
        raise Refused(f"line {one.line}: {one.opcode} {', '.join(one.operands)[:200]}")

    def _fits(self, operand: str, kind: str) -> bool:
        if kind.startswith("{"):
            many = re.fullmatch(r"\{=?([hrl])(\d+)\}", kind)
            assert many
            parts = _parts(operand) if operand.startswith("{") else []
            return len(parts) == int(many[2]) and all(self._fits(p, many[1]) for p in parts)
        if kind in ("m", "s"):
            match = _ADDRESS.fullmatch(operand)
            name = match[1] if match else ""
            if name in self.kernel.registers:
                return self.kernel.registers[name] == (64 if kind == "m" else 32)
            return bool(match) and (name == self.kernel.param if kind == "m" else False)
        if kind == "t4":
            return _TENSOR.fullmatch(operand) is not None
        if kind == "L":
            return operand in self.kernel.labels
        if kind == "_":
            return operand == "_"
        if kind == "_|=p":
            return operand.startswith("_|")
        if kind == "i":
            return _literal(operand, 32) is not None
        bits = BITS[kind[-1]]
        if operand in self.kernel.registers:
            return self.kernel.registers[operand] == bits
        if kind.startswith("="):
            return False
        if operand in self.kernel.shared or operand in SPECIAL:
            return bits in ((32, 64) if operand in self.kernel.shared else (32,))
        if operand == self.kernel.param:
            return bits == 64
        return _literal(operand, bits) is not None

    def _named(self, one: Instruction) -> list[tuple[str, bool]]:
        """(register, whether it is written) of an instruction, guard included."""
        names: list[tuple[str, bool]] = [(one.guard, False)] if one.guard else []
        for operand, kind in zip(one.operands, self._pattern(one), strict=True):
            for name in _WORD.findall(operand):
                if name in self.kernel.registers:
                    names.append((name, "=" in kind))
        return names

    def _pattern(self, one: Instruction) -> list[str]:
        return self.chosen[self.at[id(one)]][1]

    def _temporaries(self) -> dict[str, int]:
        """Registers that live within one basic block: name -> where it is needed last. They may
        share slots; what a wgmma holds on to may not, nor what a guard may leave unwritten."""
        self.at = {id(one): i for i, one in enumerate(self.kernel.code)}
        starts = set(self.kernel.labels.values())
        block, home, last, barred = 0, dict[str, int](), dict[str, int](), set[str]()
        for i, one in enumerate(self.kernel.code):
            block += i in starts
            holds = one.opcode.startswith("wgmma.mma")
            named = self._named(one)
            read = {name for name, written in named if not written}
            for name, written in named:
                if name not in home and (not written or one.guard or name in read):
                    barred.add(name)
                if home.setdefault(name, block) != block or holds:
                    barred.add(name)
                last[name] = i
            block += one.opcode.startswith(("bra", "ret"))
        return {name: i for name, i in last.items() if name not in barred}

    def _place(self, name: str, now: int) -> int:
        if name not in self.slot:
            is_64 = self.kernel.registers[name] == 64
            pool = self.free[is_64]
            if name in self.local and pool:
                self.slot[name] = pool.pop()
            else:
                self.slot[name] = self.next
                self.next += 1 + is_64
            if name in self.local:
                self.ends[self.local[name]].append(name)
        return self.slot[name]

    def _constant(self, value: int, bits: int) -> int:
        key = (value, bits == 64)
        if key not in self.constant:
            self.constant[key] = self.next
            self.out.constants.append(value)
            self.out.constant_slots.append(self.next << 1 | key[1])
            self.next += 1 + key[1]
        return self.constant[key]

    def _value(self, operand: str, bits: int, now: int) -> int:
        """The slot of a register, a special one, or a constant."""
        if operand in self.kernel.registers:
            return self._place(operand, now)
        if operand in self.kernel.shared:
            return SPECIAL["shared64" if bits == 64 else "shared"]
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand == self.kernel.param:
            return self._constant(0, 64)
        value = _literal(operand, bits)
        assert value is not None
        return self._constant(value, bits)

    def _put(self, entry: int, kind: int) -> None:
        self.out.pool.append(entry)
        self.out.kinds.append(kind)

    def _operand(self, operand: str, kind: str, now: int, watched: bool) -> None:
        written = (2 if "=" in kind else 1) if watched else 0
        if kind.startswith("{"):
            for part in _parts(operand):
                self._put(self._value(part, BITS[kind.strip("{}=")[0]], now), written)
        elif kind in ("m", "s", "t4"):
            match = (_TENSOR if kind == "t4" else _ADDRESS).fullmatch(operand)
            assert match
            self._put(self._value(match[1], 64, now), 1)
            if kind == "t4":
                self._put(0, 0)
                for part in _parts(match[2]):
                    self._put(self._value(part, 32, now), 1)
            else:
                self._put(int(match[2] or 0), 0)
        elif kind == "i":
            value = _literal(operand, 32)
            assert value is not None
            self._put(value - (value >> 31 << 32), 0)
        elif kind == "_|=p":
            self._put(self._value(operand[2:], 1, now), written)
        elif kind not in ("_", "L"):
            self._put(self._value(operand, BITS[kind[-1]], now), written)

    def write(self) -> None:
        meets = meeting_points(self.kernel)
        for i, one in enumerate(self.kernel.code):
            number, pattern = self.chosen[i]
            guard = self._place(one.guard, i) if one.guard else -1
            target = self.kernel.labels[one.operands[0]] if "L" in pattern else -1
            self.out.code.extend(
                (number, guard, one.negated, len(self.out.pool), target, meets.get(i, -1), one.line)
            )
            self.out.names.append(one.opcode)
            watched = not one.opcode.startswith("wgmma.mma")
            for operand, kind in zip(one.operands, pattern, strict=True):
                self._operand(operand, kind, i, watched)
            for name in self.ends.pop(i, ()):
                self.free[self.kernel.registers[name] == 64].append(self.slot[name])
        self.out.code.extend((0, -1, 0, len(self.out.pool), -1, -1, 0))
        self.out.slots = self.next


_ADDRESS = re.compile(r"\[\s*([%\w@$]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_TENSOR = re.compile(r"\[\s*([%\w@$]+)\s*,\s*(\{[^}]*\})\s*\]")
_WORD = re.compile(r"[%\w@$]+")


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]
