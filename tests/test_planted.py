# SPDX-License-Identifier: Apache-2.0
"""test_planted.py - every bug that a test plants still has its place in the sources.

Most are planted in `make nightly` alone; what moves their place must not wait for that.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from emu.rows import CSRC
from ptx import bug_list

TESTS = Path(__file__).parent


def has_bugs(file: Path) -> bool:
    """Whether it has a table BUGS of its own."""
    names = (
        target.id
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    )
    return "BUGS" in names


TABLES = [file.stem for file in sorted(TESTS.glob("test_*.py")) if has_bugs(file)]


def test_there_are_tables() -> None:
    assert len(TABLES) > 10


@pytest.mark.parametrize("table", TABLES)
def test_the_place_of_a_bug_is_there_once(table: str) -> None:
    lost = [
        bug.name
        for bug in importlib.import_module(table).BUGS
        if hasattr(bug, "file")  # else all are of one file, which its test names
        and (CSRC / bug.file).read_text(encoding="utf-8").count(bug.right) != 1
    ]
    assert not lost, "plant them elsewhere"


def test_the_place_of_a_bug_of_the_machine_is_there() -> None:
    for bug in bug_list.BUGS:
        text = (CSRC / "cuda" / bug.file).read_text(encoding="utf-8")
        assert text.count(bug.right) > bug.which, bug.name
