# SPDX-License-Identifier: Apache-2.0
"""test_kernel_table.py - the names of the kernel table, and the tables of the documentation."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import readme_tables as tables

from source_tree import c_code, c_sources, package_sources, python_strings, read
from wan_attn import config
from wan_attn.native import library, op

KERNEL_NAME = re.compile(
    rf"sdpa_(?:ref|{'|'.join(library.cpu_features())}|sm\d+)"  # instruction set
    r"(?:_[a-z][a-z0-9]*)*?"  # variant
    r"(?:_d(?P<head_dim>\d+))?"
)


def test_kernel_names_follow_the_grammar() -> None:
    rows = op.kernels()
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        match = KERNEL_NAME.fullmatch(row.name)
        assert match, f"{row.name} must be sdpa_<isa>[_variant][_d<head_dim>]"
        if row.device == "cuda" or match["head_dim"]:
            assert match["head_dim"] == str(row.head_dim_max), row.name


def test_every_instruction_set_can_be_chosen() -> None:
    """A new line of WAN_ATTN_CPU_FEATURE_LIST is a value of WAN_ATTN_CPU_ISA, too."""
    (variable,) = (v for v in config.VARIABLES if v.name == "WAN_ATTN_CPU_ISA")
    assert variable.values == ("auto", "portable", *library.cpu_features())


def test_a_kernel_is_named_in_its_row_and_its_own_file() -> None:
    for row in op.kernels():
        name = re.compile(rf"\b(?:wan_attn_)?{row.name}\b")
        named = {f.as_posix() for f in c_sources() if name.search(c_code(f))}
        named |= {f.as_posix() for f in package_sources() if name.search(python_strings(f))}
        if row.device == "cuda":
            assert named == {"csrc/cuda/sdpa_rows.def"}, f"{row.name} is named in {named}"
            continue
        own = {f for f in named if Path(f).stem.startswith("sdpa_")}
        assert own, f"{row.name} has no file sdpa_*"
        assert named - own == {"csrc/core/kernels.def"}, f"{row.name} is named in {named}"


def test_the_tables_of_the_documentation_are_current() -> None:
    if not op.kernels() or platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("docs/cards.md shows the kernels of x86-64, and this build has others")
    for file, name, make in tables.TABLES:
        text = read(file)
        assert tables.up_to_date(text, name, make()) == text, f"{file}: run: make tables"
