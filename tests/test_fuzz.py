# SPDX-License-Identifier: Apache-2.0
"""test_fuzz.py - the short form of the campaign of tests/fuzz: the same cases on every run.

`make fuzz` is the long form.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import wan_attn
from emu.build import compiler
from fuzz import (
    build,
    caches,
    driver_faults,
    driver_table,
    fallbacks,
    functions,
    malformed,
    run,
    surroundings,
)
from fuzz.count import Count
from wan_attn.native import library

SEED = 12

pytestmark = pytest.mark.skipif(
    os.name == "nt" or sys.platform == "darwin", reason="guard pages, forks and signals of Linux"
)


def c_campaign(name: str, count: int) -> str:
    """What a C campaign says at the end; it must find nothing."""
    variant = next(build.compilers(), None)
    if variant is None:
        pytest.skip("no C compiler")
    command = [str(build.program(name, variant)), str(SEED), "0", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("legal", 600), ("rope", 400), ("gradient", 400)),
        *(("broken", 1000), ("broken_rope", 800), ("broken_gradient", 800)),
    ],
)
def test_calls_of_the_abi(name: str, count: int, record_property: Any) -> None:
    record_property("summary", c_campaign(name, count))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print('counted: 3 calls, 0 crashes, 0 wrong, 0 accepted')", Count(calls=3)),
        ("print('counted: 3 calls, 0 crashes, 1 wrong, 0 accepted'); exit(1)", Count(3, 0, 1)),
        ("print('counted: 3 calls, 0 crashes, 0 wrong, 0 accepted'); exit(1)", Count(3, 1)),
        ("import os; os.abort()", Count(crashes=1)),
        ("pass", Count(crashes=1)),
        ("import time; time.sleep(100)", Count(crashes=1)),
    ],
    ids=("good", "wrong", "died at the end", "died", "says nothing", "hangs"),
)
def test_what_a_campaign_comes_to(program: str, expected: Count) -> None:
    assert run.run([sys.executable, "-c", program], limit=5.0) == expected


def arguments_of(function: Any) -> set[str]:
    if isinstance(function, torch._ops.OpOverloadPacket):
        return {argument.name for argument in function.default._schema.arguments}
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}


def test_no_argument_of_a_public_function_is_left_out() -> None:
    """Whatever is added must be in the list that the malformed calls are made from."""
    public = {getattr(wan_attn, name) for name in wan_attn.__all__}
    public = {f for f in public if inspect.isfunction(f)}
    public -= {wan_attn.available, wan_attn.unpatch}  # which are given nothing to compute with
    public |= {torch.ops.wan_attn.sdpa, torch.ops.wan_attn.rms_norm_rope}
    public |= {wan_attn.sparse.sdpa, wan_attn.sparse.block_lists}
    for function in public:
        broken = {n for f in functions.functions() if f.call is function for n in f.kinds}
        assert arguments_of(function) <= broken, function


def test_malformed_python_calls(native: str, record_property: Any) -> None:
    findings = malformed.campaign(modes=malformed.MODES[:1])
    bad = [str(found) for found in findings if found.outcome in malformed.BAD]
    record_property("summary", f"{len(findings)} malformed Python calls, {len(bad)} wrong")
    assert not bad, f"{len(bad)} of {len(findings)}\n" + "\n".join(bad)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")
@pytest.mark.skipif(library.load() is None, reason="no native library")
def test_failures_of_the_driver(record_property: Any) -> None:
    rows = list(driver_faults.campaign(short=True))
    wrong = [f"{row}\n    {problem}" for row in rows for problem in row.problems]
    record_property("summary", f"{len(rows)} failures of the driver, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)
    old, new = driver_table.pages(rows, driver_faults.CODES, driver_faults.FINAL)
    assert old == new, driver_table.STALE


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")
@pytest.mark.parametrize("code", (209, 700), ids=driver_faults.CODES.get)
def test_fallbacks(code: int, native: str, tmp_path: Path) -> None:
    for function in fallbacks.FUNCTIONS[:3]:
        line, problems = fallbacks.try_fault(function, code, tmp_path)
        assert not problems, f"{line}: {problems}"


@pytest.mark.parametrize("name", caches.CACHES)
def test_a_cache_in_trouble(name: str, tmp_path: Path) -> None:
    assert caches.cache_fault(name, tmp_path) is None


def test_threads() -> None:
    assert surroundings.threads(SEED, 1.0) is None


def test_forks() -> None:
    assert surroundings.forks(SEED, 6) is None


@pytest.mark.parametrize("kind", surroundings.KINDS, ids=lambda kind: kind.__name__)
def test_signals(kind: type[BaseException]) -> None:
    assert surroundings.signals(SEED, 0.25, kind) is None
