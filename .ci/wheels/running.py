# SPDX-License-Identifier: Apache-2.0
"""running.py - starts programs for the tests of wheels, and prints one line for each test."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The op against the formula in float64, written out; then what was used.
CALL = """import platform, time; from pathlib import Path; import torch; had = time.perf_counter()
import wan_attn; took = time.perf_counter() - had
from wan_attn.native import kernels, library, op
torch.manual_seed(0)
q, k, v = (torch.randn(2, n, 3, 64) for n in (5, 70, 70))
scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8
expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double())
error = (wan_attn.sdpa(q, k, v).double() - expected).abs().max().item()
assert error < 1e-5, error
assert not torch.cuda.is_initialized()
has = set(kernels.cpu_features())
rows = [k.name for k in kernels.kernels() if k.device == "cpu" and has.issuperset(k.cpu_features)]
ready = len(list(Path(wan_attn.__file__).parent.glob("cuda/cubin/*.cubin")))
print(
    f"Python {platform.python_version()}, torch {torch.__version__}: {op.binding()},",
    f"off by {error:.0e}, import {1000 * took:.0f} ms, {ready} CUDA kernels,",
    rows[0] if library.load_error() is None else "without our library",
)
"""


class Failed(RuntimeError):
    """A program has said something else than it should."""


class Skipped(RuntimeError):
    """This machine lacks something; says what."""


def run(
    words: Sequence[str | Path],
    cwd: Path,
    code: int = 0,
    more: dict[str, str] | None = None,
    seconds: int = 1200,
) -> str:
    """A program's output; Failed if its exit code is another."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in left_out} | (more or {})
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode != code:
        shown = " ".join(map(str, words))[:300]
        raise Failed(f"{shown}: exit code {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def attempt(name: str, what: str, test: Callable[[], str]) -> bool:
    """Prints one line of the table; whether the test did not fail."""
    start = time.monotonic()
    try:
        verdict, said = "ok", test()
    except Skipped as reason:
        verdict, said = "not run", str(reason)
    except (Failed, OSError, subprocess.TimeoutExpired) as error:
        verdict, said = "PROBLEM", str(error)
    took = time.monotonic() - start
    print(f"   {name:22} {what:20} {verdict:8} {took:5.0f} s  {said}", flush=True)
    return verdict != "PROBLEM"
