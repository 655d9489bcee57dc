# SPDX-License-Identifier: Apache-2.0
"""words.py - what pages, messages and comments name: options, commands, variables, paths, names.

A Text is one thing that somebody reads, with its place. Each function here finds names of one kind
in a Text; test_words.py knows which of them exist.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from source_tree import files, python_nodes, read

C_SUFFIXES = (".c", ".h", ".cuh", ".inc", ".def", ".cpp", ".cu")
SUFFIXES = ("py", "c", "h", "cuh", "inc", "def", "cpp", "cu", "md", "txt", "toml", "csv", "ptx")


@dataclass(frozen=True)
class Text:
    """One string, comment or line of a page.

    Attributes:
        file, line: where it begins.
        text: what it says; values of f-strings are "{}".
        kind: "page", "code" (of a page), "message", "docstring" or "comment".
    """

    file: Path
    line: int
    text: str
    kind: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def pages() -> list[Path]:
    """Every page of the repository."""
    return [file for file in files() if file.suffix == ".md"]


def page_texts(file: Path) -> Iterator[Text]:
    """The code of a page: lines of its fenced blocks, and what stands between backticks."""
    fenced = False
    for number, line in enumerate(read(file).splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced:
            yield Text(file, number, line, "code")
        else:
            for span in re.findall(r"`([^`]+)`", line):
                yield Text(file, number, span.replace("\\|", "|"), "code")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def python_texts(file: Path) -> Iterator[Text]:
    """Strings and comments of a Python file."""
    docstrings = {
        id(node.value)
        for node in python_nodes(file)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    inside: set[int] = set()
    for node in python_nodes(file):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            said = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
            yield Text(file, node.lineno, said, "message")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in inside:
                kind = "docstring" if id(node) in docstrings else "message"
                yield Text(file, node.lineno, node.value, kind)
    for token in tokenize.generate_tokens(io.StringIO(read(file)).readline):
        if token.type == tokenize.COMMENT:
            yield Text(file, token.start[0], token.string, "comment")


_C_TEXT = re.compile(r'/\*.*?\*/|//[^\n]*|(?:"(?:\\.|[^"\\\n])*"\s*)+', re.DOTALL)


def c_texts(file: Path) -> Iterator[Text]:
    """Strings and comments of a C file; strings that stand side by side are one."""
    source = read(file)
    for match in _C_TEXT.finditer(source):
        line_begin = source.rfind("\n", 0, match.start()) + 1
        if "#include" in source[line_begin : match.start()].replace(" ", ""):
            continue
        kind = "message" if match[0].startswith('"') else "comment"
        said = re.sub(r'"\s*"', "", match[0]) if kind == "message" else match[0]
        yield Text(file, source.count("\n", 0, match.start()) + 1, said, kind)


def texts(*folders: str) -> Iterator[Text]:
    """Every string and comment of the Python and C files in these folders."""
    for file in files():
        if file.parts[0] in folders or file.as_posix() in folders:
            if file.suffix == ".py":
                yield from python_texts(file)
            elif file.suffix in C_SUFFIXES:
                yield from c_texts(file)


OPTION = re.compile(r"(?<![\w/=.-])--[a-z][\w-]*[a-z0-9]")
MODULE = re.compile(r"(?:python\S*|torchrun)(?: \S+)*? -m ([A-Za-z_][\w.]*)")
OUR_COMMAND = re.compile(r"(?:-m wan_attn|wan-attn) ([a-z][\w-]*)((?: [^`\n|;)]*)?)")
VARIABLE = re.compile(r"\b(?:WAN_[A-Z0-9_]*[A-Z0-9]|WAN\d+_DIR|USE_[A-Z_]+[A-Z]|DISABLE_[A-Z_]+)\b")
ANY_VARIABLE = re.compile(r"\b[A-Z][A-Z0-9]+(?:_[A-Z0-9]+)+\b")
ASSIGNED = re.compile(r"(?<![\w./-])([A-Z][A-Z0-9_]{3,})=[\w\"$]")
# `make` as a command: at the beginning of a page's code, after "run:" or a backtick in a message.
TARGET = {
    "code": re.compile(r"^(?:\$ )?make ((?:[a-z][a-z-]+ ?)+)"),
    "message": re.compile(r"(?:run: |`)make ([a-z][a-z-]+)"),
}
PIP = re.compile(r"pip (?:install|wheel|download) ([^`\n;)]*)")
OURS_ON_PYPI = re.compile(r"^[\"']?wan[-_]attn(?:\[.*\])?(?:[=<>~!]=?.*)?[\"']?$", re.IGNORECASE)
NAME = re.compile(r"\bwan_attn(?:\.[A-Za-z_]\w*)+(?![\w*/{-])")
_FOLDERS = r"(?:csrc|tests|benchmarks|wan_attn|docs|\.ci|\.github)"
PATH = re.compile(
    rf"(?<![\w./*<{{%$-])(?:(?:\.\./)*[\w.*-]+/)*[\w*.-]*[\w*]\.(?:{'|'.join(SUFFIXES)})(?![\w*({{-]|\.\w)"
    rf"|(?<![\w./*<{{-]){_FOLDERS}/[\w./*-]*"
)


def unpublished(text: str) -> list[str]:
    """What `pip install` is told to fetch under our name, which no index has."""
    return [
        word
        for rest in PIP.findall(text)
        for word in rest.split()
        if OURS_ON_PYPI.match(word.rstrip(".,:"))
    ]


def our_commands(text: str) -> list[tuple[str, list[str]]]:
    """(command, its options) of each `python -m wan_attn COMMAND ...`; after run's SCRIPT: not."""
    found = []
    for command, rest in OUR_COMMAND.findall(text):
        options = []
        for word in re.split(r"  #|&&", rest)[0].split():
            if word.startswith("--"):
                options.append(word.split("=")[0].rstrip(".,:'\""))
            elif command == "run" and re.search(r"\.py\b|SCRIPT", word):
                break
        found.append((command, options))
    return found


def paths(text: str) -> list[str]:
    """What looks like a path or a file name of this repository."""
    return [match.rstrip("/.") for match in PATH.findall(text)]
