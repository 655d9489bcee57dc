# SPDX-License-Identifier: Apache-2.0
"""bugs.py - changes of the wrappers of csrc/cuda/ptx, each of which a named check has to catch.

What is planted is text: it is compiled again, and what comes out is run. CHECKS says by which words
of its finding a check is known.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from emu import cases
from emu.rows import Job
from ptx import asm_rules, collect, matrix
from ptx.bug_list import BUGS, Bug
from ptx.calls import Runner
from ptx.helpers import Helpers
from ptx.machine import Knobs
from ptx.parse import Refused

# Words of a finding -> the name of the check that it comes from; the first that fits.
CHECKS = {
    "asm rules": "asm rules",
    "compiler: ": "compiler",
    "is not known": "unknown instruction",
    "machine: ": "unknown instruction",
    "uninitialised register": "uninitialised register",
    "uninitialised memory": "uninitialised memory",
    "misaligned": "alignment",
    "out of every tensor": "address",
    "outside of": "address",
    "written twice": "written twice",
    "no fence.proxy.async": "proxy fence",
    "in flight": "in flight",
    "still reads it": "in flight",
    "wgmma.fence": "wgmma.fence",
    "no barrier orders": "order",
    "no barrier lies": "order",
    "initialis": "mbarrier initialisation",
    "diverged": "divergence",
    "deadlock": "deadlock",
    "goes on for ever": "deadlock",
    "arrivals than": "mbarrier count",
    "has left": "early exit",
    "of another block": "rank of an address",
    "no block": "rank of an address",
    "setmaxnreg": "setmaxnreg",
    "barrier": "barrier",
    "descriptor": "descriptor",
    "tensor map": "tensor map",
    "cp-size": "operands of cp.async",
    "is wrong": "result",
    "error of": "result",
    "NaN": "result",
    "": "result",
}

ROWS = {
    "slim": ("sdpa_sm80_bf16_d64", 86),
    "f16": ("sdpa_sm80_f16_d64", 86),
    "wide": ("sdpa_sm80_bf16_d80", 80),
    "turing": ("sdpa_sm75_bf16_d64", 75),
    "pv16": ("sdpa_sm80_pv16_bf16_d128", 86),
    "hopper": ("sdpa_sm90_bf16_d64_n128_w3_s2_c2", 90),
    "hopper128": ("sdpa_sm90_bf16_d128_n176_w2_s2_c2", 90),
    "alone": ("sdpa_sm90_bf16_d128_n128_w2_s2_c1", 90),
    "convert": ("wan_attn_convert", 80),
}


def job_of(row: str) -> Job:
    name, arch = ROWS[row]
    return next(j for j in collect.shipped() if j.name == name and j.arch == arch)


def finding(bug: Bug, csrc: Path, knobs: Knobs | None = None) -> str:
    """What is found in these sources, under some settings or one; empty if nothing is."""
    if rules := asm_rules.broken(csrc / "cuda" / "ptx"):
        return rules[0]
    try:
        if bug.row == "convert":
            Helpers(collect.nvrtcs()[0], 80, csrc).check_one_conversion()
            return ""
        runner = Runner(job_of(bug.row), collect.nvrtcs()[0], csrc)
        for number, case in enumerate(matrix.short(runner.tile)):
            if knobs is None:
                matrix.check(runner, case, number)
            else:
                cases.check(case, runner.tile, runner=replace(runner, knobs=knobs))
    except collect.CompileError as error:
        return f"compiler: {error}"
    except Refused as error:
        return f"machine: {error}"
    except AssertionError as error:
        return str(error).split("check_order=True)): ")[-1] or "is wrong"
    return ""


def check_of(found: str) -> str:
    """The name of the check that has caught it."""
    return next(name for words, name in CHECKS.items() if words in found)


def main() -> None:
    """Plants each and prints a table of what caught it."""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for bug in BUGS:
            csrc = bug.plant(Path(folder))
            found = finding(bug, csrc)
            bug.remove(csrc)
            missed += not found
            print(
                f"| {bug.file} | {bug.name} | {check_of(found) if found else 'MISSED'} |",
                flush=True,
            )
    print(f"{len(BUGS)} planted, {missed} missed")


if __name__ == "__main__":
    main()
