# SPDX-License-Identifier: Apache-2.0
"""source_tree.py - the sources as test_architecture.py sees them: files, C code, imports."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
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


def read(file: Path) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


_C_COMMENT_OR_STRING = re.compile(
    r"""/\*.*?\*/ | //[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'""", re.DOTALL | re.VERBOSE
)


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


def python_imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(imported module, whether importing `file` imports it), but for imports that only type
    checkers see."""
    package = (
        module_name(file) if file.name == "__init__.py" else module_name(file.parent / "x")[:-2]
    )

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    upper = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*upper, base] if base else upper)
                # `from package import name` may name a module of the package.
                yield from ((f"{base}.{alias.name}", at_import) for alias in child.names)
            yield from visit(child, at_import and not inside)

    return visit(ast.parse(read(file)), True)


def python_strings(file: Path) -> str:
    """Every string of a Python file but its docstrings, one a line."""
    tree = ast.parse(read(file))
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return "\n".join(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    )
