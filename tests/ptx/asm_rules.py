# SPDX-License-Identifier: Apache-2.0
"""asm_rules.py - what an asm statement has to promise to the compiler, by what is in it.

NVIDIA, "Using Inline PTX Assembly in CUDA", 1.2: an asm whose effect is not in its results must be
volatile, else it may be dropped, repeated or moved; one that touches memory by itself must say
"memory", else loads and stores move across it. Whether today's compilers make use of what they are
allowed to cannot be seen in PTX, so that the text is held against the rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# Instructions that do more than compute their results, and those that read, write or order memory
# that other instructions write.
_EFFECTS = re.compile(
    r"(?<![\w.])(st\.|ld\.shared|ldmatrix|stmatrix|cp\.async|bar\.|barrier\.|mbarrier\.|fence\."
    r"|wgmma\.|setmaxnreg|prefetch|shfl\.|vote\.|elect\.|red\.|atom\.)"
)
_MEMORY = re.compile(
    r"(?<![\w.])(st\.|ld\.shared|ldmatrix|stmatrix|cp\.async|bar\.|barrier\.|mbarrier\.|fence\."
    r"|wgmma\.(fence|commit_group|wait_group)|prefetch|red\.|atom\.)"
)


def _statements(text: str) -> Iterator[tuple[int, bool, str]]:
    """(line, whether it is volatile, what is between the parentheses) of every asm."""
    for match in re.finditer(r"\basm(\s+volatile)?\s*\(", text):
        depth, at, quoted = 1, match.end(), False
        while depth:
            char = text[at]
            quoted ^= char == '"'
            depth += (char == "(") - (char == ")") if not quoted else 0
            at += 1
        yield text.count("\n", 0, match.start()) + 1, bool(match[1]), text[match.end() : at - 1]


def broken(folder: Path) -> list[str]:
    """Every asm below this folder that promises less than it has to."""
    found = []
    for file in sorted(folder.glob("*.cuh")):
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), file.read_text(), flags=re.S)
        for line, is_volatile, inside in _statements(text):
            template = "".join(re.findall(r'"([^"]*)"', inside))
            holds = inside.lstrip().startswith('""')  # no instruction: there to keep an order
            if (holds or _EFFECTS.search(template)) and not is_volatile:
                found.append(f"asm rules: {file.name}:{line} must be volatile")
            if (holds or _MEMORY.search(template)) and '"memory"' not in inside:
                found.append(f'asm rules: {file.name}:{line} must say "memory"')
    return found
