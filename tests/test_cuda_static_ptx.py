# SPDX-License-Identifier: Apache-2.0
"""test_cuda_static_ptx.py - the instructions behind csrc/cuda/ptx, against a reviewed list.

The emulator replaces these wrappers, so it cannot see a typing error in one: a wrong modifier, a
swapped operand. Here a kernel per wrapper is compiled to PTX and its instructions are compared
with tests/emu/golden_sm75.ptx, golden_sm80.ptx and, for Hopper's own, golden_sm90a.ptx, which
people have read beside the PTX manual.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from emu import compile as compilers
from emu.rows import CSRC

HERE = Path(__file__).resolve().parent / "emu"


def wrappers() -> set[str]:
    """The names that csrc/cuda/ptx offers to kernels."""
    text = "".join(file.read_text(encoding="utf-8") for file in (CSRC / "cuda/ptx").glob("*.cuh"))
    functions = re.findall(r"^(?:template <.*?> )?DEVICE .*?\*?(\w+)\(", text, re.M)
    macros = re.findall(r"^#define (\w+)\(", text, re.M)
    # wgmma.cuh makes its products of macros; wrappers_sm90.cu lists them as it does.
    products = {
        f"{form}({n}, {type_}"
        for form, n, type_ in re.findall(r"^WGMMA_([SR]S)\((\d+), (\w+)", text, re.M)
    }
    of_products = {macro for macro in macros if macro.startswith("WGMMA_")}
    # natural_log is the compiler's own logf, not an instruction.
    return {*functions, *macros, *products} - {"WAN_ATTN_KERNEL", "natural_log"} - of_products


def instructions(ptx: str) -> str:
    """Kernel by kernel what it does; registers are numbered as they appear, so that only what they
    carry matters."""
    lines: list[str] = []
    numbers: dict[str, str] = {}
    products = False

    def numbered(found: re.Match[str]) -> str:
        return numbers.setdefault(found[0], f"%{found[1]}{len(numbers)}")

    for line in map(str.strip, ptx.splitlines()):
        if entry := re.match(r"\.visible \.entry (\w+)\(", line):
            lines.append(f"{entry[1]}:")
            numbers.clear()
            products = entry[1].startswith(("k_ss_", "k_rs_"))
        elif re.match(r"@|\{ |[a-z][\w.:]*[\s;]", line) and line != "ret;":
            line = re.sub(r"%(r|rd|f|p|rs|fd)\d+", numbered, line)
            line = re.sub(r"\w+_param_(\d)", r"param_\1", line)
            if products and re.match(r"(ld|st)\.global\.f32 ", line):
                continue  # accumulators of wgmma, up to 128 in their order
            lines.append("    " + re.sub(r"\s+", " ", line))
    return "\n".join(lines) + "\n"


@pytest.mark.skipif(compilers.nvcc() is None, reason="no nvcc on PATH")
@pytest.mark.parametrize(
    ("arch", "source"),
    [("75", "wrappers.cu"), ("80", "wrappers.cu"), ("90a", "wrappers_sm90.cu")],
)
def test_the_wrappers_make_the_instructions_that_were_reviewed(
    arch: str, source: str, tmp_path: Path
) -> None:
    golden, output = f"golden_sm{arch}.ptx", tmp_path / "wrappers.ptx"
    compilers.to_ptx(HERE / source, arch, output)
    found = instructions(output.read_text(encoding="utf-8"))
    (tmp_path / golden).write_text(found, encoding="utf-8")
    assert found == (HERE / golden).read_text(encoding="utf-8"), (
        f"if the change is meant, read it beside the PTX manual and copy {tmp_path / golden}"
    )


def test_no_wrapper_is_left_out() -> None:
    kernels = "".join(file.read_text(encoding="utf-8") for file in HERE.glob("wrappers*.cu"))
    called = set(re.findall(r"\b(\w+)(?:<\d+>)?\(", kernels))
    called |= set(re.findall(r"^([SR]S\(\d+, \w+)", kernels, re.M))
    assert wrappers() <= called, wrappers() - called


def test_asm_is_behind_the_one_door() -> None:
    for file in (CSRC / "cuda").rglob("*.cuh"):
        if file.parent.name == "ptx":
            continue
        code = re.sub(r"/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        banned = re.search(r"\basm\b|__shared__|__sync|__shfl|threadIdx|blockIdx|#include <", code)
        assert not banned, f"{file.name}: {banned[0]}"
