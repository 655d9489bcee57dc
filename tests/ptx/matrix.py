# SPDX-License-Identifier: Apache-2.0
"""matrix.py - which calls each kernel has to answer on the machine; `make ptx-matrix` runs all.

    python tests/ptx/matrix.py [--compiler NAME] [--kernel NAME] [--seed N]

prints, for each compiler and kernel: calls, seconds, opcodes that no call has run; then how often
each opcode ran.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from emu import cases, cases_qk8, cases_sm90
from emu.cases import Case
from emu.rows import Job, Tile, TileQk8, TileSm90
from emu.run import Schedule
from ptx import collect, pin
from ptx.calls import Runner
from ptx.helpers import HELPERS, Helpers
from ptx.machine import Knobs
from ptx.parse import Refused
from wan_attn.cuda.rows import SHIPPED

# Settings that no result may depend on: order of warps, landing of copies, what uninitialised
# registers and memory hold, where shared memory begins, how tensor cores sum, whether they keep
# subnormal sums, and how much ex2 errs.
SETTINGS = (
    Knobs(landing=0, order=0, garbage=0xFFFFFFFF),
    Knobs(landing=1, order=1, garbage=0x7FC07FC0),
    Knobs(landing=2, order=2, garbage=0, ex2_error=2, flush_sums=1),
    Knobs(landing=1, order=2, window=0x800, garbage=0x3C003C00),
    Knobs(landing=2, order=0, sum_block=16, sum_bits=25),
    Knobs(landing=0, order=2, sum_block=8, sum_bits=24),
    Knobs(landing=1, order=0, sum_block=4, sum_bits=23),
    Knobs(landing=2, order=1, rank_bits=0),
)


def short(tile: Any) -> Iterator[Case]:
    """A call of each kind: ragged, causal, window, grouped heads, lengths, f32 queries, parts,
    a negative scale, views into NaN."""
    m, n = tile.block_m, tile.block_n
    is_sm90 = isinstance(tile, TileSm90)
    yield Case(m + 1, 3 * n + 5)
    yield Case(2 * m - 1, 2 * n + 3, is_causal=True)
    yield Case(m + 3, 4 * n, window=(n + 5, 7))
    yield Case(20, n + 4, 2, 4, 2, layout="surrounded", q_lens=(20, 7), k_lens=(n + 1, 3))
    lens: dict[str, Any] = {"q_lens": (0, 9, m), "k_lens": (5, 0, n + 2)}
    yield Case(m, n + 9, 3, lens_dtype="int32", **lens, is_causal=True)
    yield Case(17, 2 * n + 1, scale=-0.3, layout="fused")
    yield Case(m, n, values="one hot", return_lse=False)
    if is_sm90:
        yield Case(2 * m + 1, 6 * n - 3, values="rising")
    else:
        yield Case(18, n + 7, heads_q=2, heads_k=2, q_is_f32=True, layout="heads first")
        yield Case(9, 3 * n + 2, 2, 2, 1, split_tiles=1)
        yield Case(m, 3 * n - 2, values="rising")


def full(tile: Any, seed: int = 0) -> Iterator[Case]:
    """All calls that the emulated sources answer, and these."""
    yield from short(tile)
    kind: Any = cases_sm90 if isinstance(tile, TileSm90) else cases
    yield from kind.by_hand(tile)
    yield from kind.by_chance(tile, 24, seed=seed)


def check(runner: Runner, case: Case, number: int) -> None:
    """Runs a call under one of the settings and holds it against the oracle.

    Of sums that are cut off and of an ex2 that errs, lse is not judged here: torch's, by which our
    error is measured, are rounded. test_ptx_knobs.py holds it against what that can add up to.
    """
    knobs = replace(SETTINGS[number % len(SETTINGS)], seed=number)
    if case.split_tiles:  # needs lse to put the parts together
        knobs = replace(knobs, sum_block=0, ex2_error=0)
    judged = case.return_lse and not knobs.sum_block and not knobs.ex2_error
    case = replace(case, schedule=Schedule(knobs.landing, number), return_lse=judged)
    judge: Any = cases_qk8.check if isinstance(runner.tile, TileQk8) else cases.check
    judge(case, runner.tile, runner=replace(runner, knobs=knobs))


def check_outputs(runner: Runner) -> None:
    """Hopper's ways out: through TMA, straight from registers, in f32: the same numbers."""
    tile = runner.tile
    m, n = tile.block_m, tile.block_n
    case = Case(m + 13, n + 9, 2, 2, 1, q_lens=(m + 5, 3), k_lens=(0, n))
    query, key, value = cases.operands(case, tile)
    by_tma = runner(tile, query, key, value, **case.call()).out
    around = torch.full((2, m + 13, 3, tile.head_dim + 4), math.nan, dtype=query.dtype)
    view = around[:, :, 1:, :-4]  # 8 bytes past a multiple of 16
    assert torch.equal(runner(tile, query, key, value, out=view, **case.call()).out, by_tma)
    assert around[:, :, 0].isnan().all() and around[..., -4:].isnan().all()
    wide = torch.full(query.shape, math.nan)
    runner(tile, query, key, value, out=wide, **case.call())
    assert torch.equal(wide.to(query.dtype), by_tma)


def takes_these_calls(job: Job) -> bool:
    """Kernels of attention but for those of lists (test_ptx_listed.py); gradients are asked other
    things (test_ptx_backward.py)."""
    return type(job.kernel) in (Tile, TileQk8, TileSm90)


def attention_jobs() -> tuple[Job, ...]:
    """Kernels of attention, each tile on the first architecture that ships it."""
    first: dict[str, Job] = {}
    for job in collect.shipped():
        if takes_these_calls(job):
            first.setdefault(f"{job.kernel}", job)
    return tuple(first.values())


def never_run(runner: Runner) -> list[str]:
    """Opcodes of the kernel that no call has run."""
    return sorted(name for name, times in runner.program.counts().items() if times == 0)


@dataclass
class Total:
    """What a compiler's kernels have done."""

    kernels: int = 0
    calls: int = 0
    wrong: int = 0
    seconds: float = 0.0
    opcodes: Counter[str] = field(default_factory=Counter)


def _attention(runner: Runner, seed: int, total: Total) -> None:
    begin, count, failed = time.process_time(), 0, 0
    for number, case in enumerate(full(runner.tile, seed)):
        try:
            check(runner, case, number)
        except (AssertionError, Refused) as error:
            failed += 1
            print(f"    WRONG {error}", flush=True)
            if isinstance(error, Refused):
                total.wrong += 1
                return
        count += 1
    if isinstance(runner.tile, TileSm90):
        check_outputs(runner)
        count += 3
    seconds = time.process_time() - begin
    idle = [name for name, n in runner.program.counts().items() if not n]
    print(
        f"{runner.compiler.name:12} {runner.job.name:36} {runner.job.target:7} {count:4} calls"
        f" {seconds:6.1f} s  {failed} wrong  opcodes never run: {' '.join(sorted(idle)) or 'none'}",
        flush=True,
    )
    total.kernels += 1
    total.calls += count
    total.wrong += failed
    total.seconds += seconds
    total.opcodes += Counter({name: 0 for name in idle})
    total.opcodes.update(runner.program.counts())


def _helpers(compiler: collect.Compiler, total: Total) -> None:
    begin = time.process_time()
    for arch in SHIPPED:
        calls = Helpers(compiler, arch)
        try:
            calls.check_all()
        except (AssertionError, Refused) as error:
            total.wrong += 1
            print(f"    WRONG {arch}: {error}", flush=True)
            continue
        total.opcodes.update(calls.counts())
        total.kernels += len(HELPERS)
    if 90 in SHIPPED:
        total.opcodes.update(pin.check())  # the one store that no kernel makes
    seconds = time.process_time() - begin
    total.seconds += seconds
    print(
        f"{compiler.name:12} helpers on {len(SHIPPED)} architectures {seconds:6.1f} s", flush=True
    )


def _body(text: str) -> str:
    """A module without what says whom it is for."""
    return re.sub(r"//[^\n]*|\.(target|version)[^\n]*", "", text)


def main() -> None:
    parser = argparse.ArgumentParser(description="every kernel from its PTX, against the oracle")
    parser.add_argument("--compiler", default="", help="only those whose name contains this")
    parser.add_argument("--kernel", default="", help="only those whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    for compiler in collect.all_compilers():
        if wanted.compiler not in compiler.name:
            continue
        total = Total()
        if wanted.kernel in "helpers":
            _helpers(compiler, total)
        texts: dict[str, Job] = {}
        for job in collect.shipped():
            if not takes_these_calls(job) or wanted.kernel not in f"{job.name} {job.target}":
                continue
            first = texts.setdefault(_body(collect.ptx_of(job, compiler)), job)
            if first is job:
                _attention(Runner(job, compiler), wanted.seed, total)
            else:
                total.kernels += 1
                named = f"{compiler.name:12} {job.name:36} {job.target:7}"
                print(f"{named} has the text of {first.target}", flush=True)
        print(
            f"{compiler.name}: {total.kernels} kernels, {total.calls} calls of attention,"
            f" {total.seconds:.0f} s, {total.wrong} wrong; how often each opcode ran"
        )
        for name, times in sorted(total.opcodes.items()):
            print(f"    {times:14,} {name}{'' if times else '   NEVER'}")


if __name__ == "__main__":
    main()
