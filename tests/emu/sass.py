# SPDX-License-Identifier: Apache-2.0
"""sass.py - what a cubin holds: instructions, loops, registers."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@cache
def nvdisasm() -> str | None:
    """From PATH, the toolkit, PyPI's nvidia-cuda-nvdisasm or the triton that torch brings."""
    places = ["nvdisasm", "/usr/local/cuda/bin/nvdisasm"]
    for entry in sys.path:
        places += map(str, Path(entry).glob("nvidia/*/bin/nvdisasm"))
        places.append(str(Path(entry) / "triton/backends/nvidia/bin/nvdisasm"))
    return next((found for found in map(shutil.which, places) if found), None)


@dataclass(frozen=True)
class Instruction:
    text: str

    @property
    def opcode(self) -> str:
        """HMMA.16816.F32.BF16 of "@!P0 HMMA.16816.F32.BF16 R4, ..."."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def is_executed(self) -> bool:
        """False for padding and for the never-executed loads that ptxas puts before LDGSTS."""
        return not re.match(r"@!U?PT\b", self.text) and self.opcode != "NOP"


Loop = tuple[Instruction, ...]


@dataclass(frozen=True)
class Kernel:
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]
    jumps: dict[int, int]  # number of a branch -> number of the instruction it goes to

    def reachable(self, begin: int, *ends: str) -> tuple[Instruction, ...]:
        """What may be executed from instruction `begin` on, up to one of these opcodes."""
        seen: set[int] = set()
        ahead = [begin]
        while ahead:
            at = ahead.pop()
            if at in seen or at >= len(self.instructions):
                continue
            instruction = self.instructions[at]
            if count((instruction,), *ends):
                ahead += [at + 1] * instruction.text.startswith("@")  # for those that go on
                continue
            seen.add(at)
            if at in self.jumps:
                ahead.append(self.jumps[at])
            if at not in self.jumps or instruction.text.startswith("@"):
                ahead.append(at + 1)
        return tuple(self.instructions[at] for at in sorted(seen))

    def main_loop(self) -> Loop:
        """The shortest loop with a tensor core product: the clean tiles, without the masked ones
        around them."""
        return min((loop for loop in self.loops if count(loop, "HMMA", "HGMMA")), key=len)

    def usual_way(self, exponentials: int) -> Loop:
        """What most tiles execute of the main loop: with all its products and copies, at least so
        many MUFU, and as little else as branches allow."""
        loop = self.main_loop()
        ends = len(loop)
        begin = next(
            at for at in range(len(self.instructions)) if self.instructions[at : at + ends] == loop
        )
        Ways = dict[tuple[int, int], Loop]  # products and copies, MUFU -> the shortest way
        ways: dict[int, Ways] = {ends: {(0, 0): ()}}
        for at in reversed(range(ends)):
            one, found = loop[at], Ways()
            to = self.jumps.get(begin + at, begin + at + 1) - begin
            goes_on = one.text.startswith("@") or re.match(r"BRA\S*\s+!?U?P\d", one.text)
            ahead = [ends if to == 0 else to]
            ahead += [at + 1] if goes_on or one.opcode.startswith("BRA.DIV") else []
            for way in (way for to in ahead for way in ways.get(to, {}).items()):
                (works, mufu), rest = way
                works += count((one,), "HMMA", "LDGSTS", "LDG.E.128")
                mufu = min(mufu + count((one,), "MUFU"), exponentials)
                rest = (one, *rest) if one.is_executed else rest
                if len(rest) < len(found.get((works, mufu), (*rest, one))):
                    found[works, mufu] = rest
            ways[at] = found
        return ways[0][max((works, mufu) for works, mufu in ways[0] if mufu == exponentials)]


def count(code: tuple[Instruction, ...], *opcodes: str) -> int:
    """Executed instructions that are one of these, whatever modifiers follow: LDS is LDS and
    LDS.128, not LDSM."""
    return sum(
        i.is_executed and any(f"{i.opcode}.".startswith(f"{opcode}.") for opcode in opcodes)
        for i in code
    )


def loads_under_way(code: tuple[Instruction, ...], opcode: str) -> int:
    """Most loads that begin like `opcode` that straight code issues before it uses one of them."""
    most, waiting = 0, set[str]()
    for i in code:
        if not i.is_executed:
            continue
        named = re.findall(r"\bR(\d+)\b", i.text)
        if i.opcode.startswith(opcode):
            waiting.add(named[0])
        elif re.match(r"(BRA|BSSY|BSYNC|BAR|CALL|EXIT|WARPSYNC)\b", i.opcode):
            waiting.clear()
        elif waiting.intersection(named):
            waiting.clear()
        most = max(most, len(waiting))
    return most


def histogram(code: tuple[Instruction, ...]) -> Counter[str]:
    return Counter(i.opcode for i in code if i.is_executed)


def read(cubin: Path) -> Kernel:
    done = subprocess.run(
        [nvdisasm() or "", "-c", str(cubin)], capture_output=True, text=True, check=True
    )
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(Instruction(found[1]))
    loops, jumps = [], {}
    for at, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction.text)
        if target:
            jumps[at] = labels[target[1]]
        if target and labels.get(target[1], at) < at:  # one that jumps to itself ends a kernel
            loops.append(tuple(code[labels[target[1]] : at + 1]))
    return Kernel(tuple(code), tuple(loops), jumps)


def registers(cubin: Path) -> int:
    """Registers a thread, from the ELF attribute EIATTR_REGCOUNT."""
    data = cubin.read_bytes()
    sections, entry_size, entries, names_at = struct.unpack_from("<Q10xHHH", data, 40)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", data, sections + i * entry_size) for i in range(entries)
    ]
    names = headers[names_at][4]
    for name, _, _, _, offset, size, *_ in headers:
        if data[names + name :].split(b"\0", 1)[0] != b".nv.info":
            continue
        at = offset
        while at < offset + size:
            kind, attribute, length = struct.unpack_from("<BBH", data, at)
            if (kind, attribute) == (4, 0x2F):
                return int(struct.unpack_from("<I", data, at + 8)[0])
            at += 4 + (length if kind == 4 else 0)
    raise ValueError(f"{cubin} does not say how many registers it uses")
