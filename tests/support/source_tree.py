# SPDX-License-Identifier: Apache-2.0
"""source_tree.py - the sources as the tests of the house see them: files, C code, imports."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "wan_attn", "tests", "benchmarks", ".ci", ".github")
SOURCE_SUFFIXES = (".c", ".h", ".def", ".inc", ".cpp", ".cu", ".cuh", ".py", ".yml", ".yaml")


@functools.cache
def files() -> tuple[Path, ...]:
    """Everything that is or could be committed, relative to ROOT; without git, what our folders
    hold."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [Path(name) for name in listed.stdout.split("\0") if name]
    else:  # an unpacked source archive
        names = [p.relative_to(ROOT) for folder in FOLDERS for p in (ROOT / folder).rglob("*")]
    return tuple(sorted(n for n in names if (ROOT / n).is_file()))


def sources(*patterns: str) -> list[Path]:
    """Source files; with patterns, those that match one."""
    chosen = [f for f in files() if f.suffix in SOURCE_SUFFIXES]
    return [f for f in chosen if not patterns or any(f.match(p) for p in patterns)]


@functools.cache
def read(file: Path) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


_C_COMMENT_OR_STRING = re.compile(
    r"""/\*.*?\*/ | //[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'""", re.DOTALL | re.VERBOSE
)


@functools.cache
def python_tree(file: Path) -> ast.Module:
    return ast.parse(read(file))


@functools.cache
def python_nodes(file: Path) -> tuple[ast.AST, ...]:
    """Every node of a Python file."""
    return tuple(ast.walk(python_tree(file)))


@functools.cache
def c_code(file: Path) -> str:
    """C without comments, strings and include lines; line numbers stay."""
    blank = _C_COMMENT_OR_STRING.sub(lambda m: "\n" * m[0].count("\n"), read(file))
    return re.sub(r"^[ \t]*#[ \t]*include.*$", "", blank, flags=re.MULTILINE)


def c_includes(file: Path) -> Iterator[str]:
    """What a C file includes: "wan_attn.h" and <math.h> as wan_attn.h and <math.h>."""
    for match in re.finditer(
        r'^\s*#\s*include\s+(?:"([^"]+)"|(<[^>]+>))', read(file), re.MULTILINE
    ):
        yield match[1] or match[2]


def module_name(file: Path) -> str:
    """wan_attn/cli/why.py -> wan_attn.cli.why; a package's __init__.py is the package."""
    parts = list(file.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def python_imports(file: Path) -> tuple[tuple[str, bool], ...]:
    """(imported module, whether importing `file` imports it), but for imports that only type
    checkers see."""
    package = (
        module_name(file) if file.name == "__init__.py" else module_name(file.parent / "x")[:-2]
    )

    def visit(statements: list[ast.stmt], at_import: bool) -> Iterator[tuple[str, bool]]:
        for statement in statements:
            if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
                continue
            if isinstance(statement, ast.Import):
                yield from ((alias.name, at_import) for alias in statement.names)
            elif isinstance(statement, ast.ImportFrom):
                base = statement.module or ""
                if statement.level:
                    upper = package.split(".")[: len(package.split(".")) - statement.level + 1]
                    base = ".".join([*upper, base] if base else upper)
                # `from package import name` may name a module of the package.
                yield from ((f"{base}.{alias.name}", at_import) for alias in statement.names)
            inside = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
            for block in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from visit(getattr(statement, block, []), at_import and not inside)

    return tuple(visit(python_tree(file).body, True))


def import_graph(package: str) -> dict[str, set[str]]:
    """module of `package` -> the modules of `package` that it imports, at any time.

    A module's own packages do not count: Python imports `a` for `a.b`, whatever `a.b` says.
    """
    modules = {module_name(f): f for f in sources("*.py") if f.parts[0] == package}

    def owner(name: str) -> str:
        while name not in modules:  # a function or class of the module named before it
            name = name.rpartition(".")[0]
        return name

    return {
        module: {owner(name) for name, _ in python_imports(file) if name.split(".")[0] == package}
        - {module}
        for module, file in modules.items()
    }


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Nodes of which each leads to the next, the last of them being the first; [] if there is no
    such circle."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]  # graphlib's arrows point the other way
    return []


@functools.cache
def python_strings(file: Path) -> str:
    """Every string of a Python file but its docstrings, one a line."""
    docstrings = {
        id(node.value)
        for node in python_nodes(file)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return "\n".join(
        node.value
        for node in python_nodes(file)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    )


def c_sources() -> list[Path]:
    return [f for f in sources() if f.parts[0] == "csrc"]


def package_sources() -> list[Path]:
    return [f for f in sources() if f.parts[0] == "wan_attn"]


def expect_none(problems: Iterable[str]) -> None:
    """Fails with one line for each problem."""
    found = list(problems)
    assert not found, "\n" + "\n".join(found)
