# SPDX-License-Identifier: Apache-2.0
"""parse.py - PTX text to a list of instructions: labels, scopes, operands (PTX ISA, "Syntax")."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SIZES = {
    "pred": 1,
    **dict.fromkeys(("b16", "u16", "s16", "f16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 64),
}


class Refused(Exception):
    """PTX that this machine does not know."""


@dataclass
class Instruction:
    """One instruction. Operands are texts: registers and labels with their scope's number."""

    line: int
    opcode: str
    operands: list[str]
    guard: str = ""
    negated: bool = False


@dataclass
class Kernel:
    """One .entry: registers by name with their size in bits, labels with where they lead."""

    name: str
    target: str
    threads: int
    cluster: int
    param: str
    param_bytes: int
    code: list[Instruction] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)


_HEADER = re.compile(
    r"""\s*\.version\s+[\d.]+\s+\.target\s+(?P<target>\w+)\s+\.address_size\s+64
    (?P<shared>(?:\s*\.extern\s+\.shared\s+\.align\s+1024\s+\.b8\s+\w+\[\];)*)
    \s*\.visible\s+\.entry\s+(?P<name>\w+)\(
    \s*\.param\s+\.align\s+\d+\s+\.b8\s+(?P<param>\w+)\[(?P<bytes>\d+)\]\s*\)
    \s*(?P<directives>[^{]*)\{(?P<body>.*)\}\s*$""",
    re.VERBOSE | re.DOTALL,
)
_DIRECTIVES = re.compile(
    r"\.maxntid\s+(\d+)(?:, 1, 1)?|\.minnctapersm\s+\d+|\.explicitcluster"
    r"|\.reqnctapercluster\s+(\d+)(?:, 1, 1)?|\.maxnreg\s+\d+"
)
_STATEMENT = re.compile(r"\s*(?:(?P<label>[\w$%]+)\s*:|(?P<brace>[{}])|(?P<text>[^;]*);)", re.S)
_OPERAND = re.compile(r"\[[^\]]*\]|\{[^}]*\}|[^,\[\]{}]+")
_NAME = re.compile(r"%?[A-Za-z_$][\w$]*(?:\.[xyz])?")

_HALVES = {"mov.b64": 32, "mov.b32": 16}  # bits of what a mov takes apart


def parsed(text: str) -> Kernel:
    """The one kernel of a module.

    Raises:
        Refused: something that this reader does not know.
    """
    text = re.sub(r"//[^\n]*", "", text)
    found = _HEADER.match(text)
    if not found:
        raise Refused(f"this is not a module of one kernel: {text[:400]!r}")
    rest = _DIRECTIVES.sub("", found["directives"]).strip()
    if rest:
        raise Refused(f"directive {rest!r}")
    numbers = [m.groups() for m in _DIRECTIVES.finditer(found["directives"])]
    threads = next((int(a) for a, _ in numbers if a), 0)
    cluster = next((int(b) for _, b in numbers if b), 1)
    kernel = Kernel(
        *(found["name"], found["target"], threads, cluster, found["param"], int(found["bytes"]))
    )
    kernel.shared = set(re.findall(r"\.b8\s+(\w+)\[\]", found["shared"]))
    first_line = text.count("\n", 0, found.start("body")) + 1
    _Body(kernel).read(found["body"], first_line)
    return kernel


class _Body:
    """Statements, in scopes that may name registers and labels of their own."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = [{}]
        self.count = 0
        self.pending: list[tuple[Instruction, tuple[dict[str, str], ...]]] = []

    def read(self, body: str, line: int) -> None:
        at = 0
        while match := _STATEMENT.match(body, at):
            begin = match.start(match.lastgroup or 0)
            line += body.count("\n", at, begin)
            if match["label"]:
                self._label(match["label"])
            elif match["brace"] == "{":
                self.scopes.append({})
                self.count += 1
            elif match["brace"] == "}":
                self.scopes.pop()
            else:
                self._statement(match["text"].strip(), line)
            line += body.count("\n", begin, match.end())
            at = match.end()
        if body[at:].strip() or len(self.scopes) != 1:
            raise Refused(f"line {line}: {body[at:].strip()[:80]!r}")
        for instruction, scopes in self.pending:
            self._resolve(instruction, scopes)

    def _own(self, name: str) -> str:
        """The name in the innermost scope, told apart from others' of that name."""
        own = name if len(self.scopes) == 1 else f"{name}@{self.count}"
        if name in self.scopes[-1]:
            raise Refused(f"{name} is declared twice")
        self.scopes[-1][name] = own
        return own

    def _label(self, name: str) -> None:
        self.kernel.labels[self._own(name)] = len(self.kernel.code)

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".pragma") or not text:
            return
        if text.startswith(".reg"):
            self._registers(text)
            return
        match = re.match(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if not match:
            raise Refused(f"line {line}: {text[:80]!r}")
        operands = [part.strip() for part in _OPERAND.findall(match[4]) if part.strip()]
        if match[3] in _HALVES:
            operands[0] = self._without_sink(operands[0], _HALVES[match[3]])
        one = Instruction(line, match[3], operands, match[2] or "", match[1] == "!")
        self.kernel.code.append(one)
        self.pending.append((one, tuple(self.scopes)))

    def _without_sink(self, operand: str, bits: int) -> str:
        """A mov may drop a part of the number, `_`: to a register that nothing reads."""
        if operand.startswith("{") and re.search(r"\b_\b", operand):
            self.kernel.registers[f"%sink{bits}"] = bits
            return re.sub(r"\b_\b", f"%sink{bits}", operand)
        return operand

    def _registers(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S)
        if not match or match[1] not in SIZES:
            raise Refused(f"declaration {text!r}")
        for name in match[2].split(","):
            many = re.match(r"\s*([%\w]+)<(\d+)>\s*$", name)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
            for one in names:
                self.kernel.registers[self._own(one)] = SIZES[match[1]]

    def _resolve(self, one: Instruction, scopes: tuple[dict[str, str], ...]) -> None:
        if len(scopes) == 1:
            return  # nothing has another name there

        def own(match: re.Match[str]) -> str:
            return next((s[match[0]] for s in reversed(scopes) if match[0] in s), match[0])

        one.operands = [_NAME.sub(own, operand) for operand in one.operands]
        if one.guard:
            one.guard = _NAME.sub(own, one.guard)
