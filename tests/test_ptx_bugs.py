# SPDX-License-Identifier: Apache-2.0
"""test_ptx_bugs.py - changes of the wrappers in csrc/cuda/ptx, each of which must be caught.

Every fourth of the list; `make ptx-matrix` plants them all. tests/ptx/README.md says which check
has caught which.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emu.rows import CSRC
from nightly import every
from ptx import asm_rules, bugs, collect, machine
from ptx.bug_list import BUGS, Bug

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)"),
    pytest.mark.skipif(not collect.nvrtcs(), reason="no NVRTC among Python's packages"),
]


def test_every_asm_promises_what_it_has_to() -> None:
    assert not asm_rules.broken(CSRC / "cuda" / "ptx")


@pytest.mark.parametrize("bug", every(5, BUGS), ids=lambda bug: bug.name)
def test_a_planted_change_is_caught(bug: Bug, tmp_path: Path) -> None:
    assert bugs.finding(bug, bug.plant(tmp_path)), "nothing has noticed"


def test_without_the_mask_the_rank_in_an_address_shows(tmp_path: Path) -> None:
    """The fault that the emulated sources once had missed: in every second block of a cluster the
    rank stood in V's descriptor. With the same addresses for all blocks it does not show."""
    bug = next(bug for bug in BUGS if bug.name == "a descriptor without mask")
    found = {}
    for rank_bits in (0, 1):
        csrc = bug.plant(tmp_path)
        found[rank_bits] = bugs.finding(bug, csrc, machine.Knobs(rank_bits=rank_bits))
    assert not found[0] and found[1]
