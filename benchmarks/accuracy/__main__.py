# SPDX-License-Identifier: Apache-2.0
"""Prints how far each 8-bit scheme is from exact attention, on every family of inputs.

    python -m benchmarks.accuracy [--wan22 DIR] [--parts] [--small] [--json FILE]

Relative L2, 1 - cosine and the largest error (as a share of the largest number of the result). The
library's own kernel stands beside the simulations. The exit status is 1 if our scheme breaks one of
its promises: 1.1 % on N(0, 1); on every family 2/3 of SageAttention2's scheme at most, and no more
than comfy-kitchen's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from . import families, library, schemes
from .families import Case
from .schemes import Array, Scheme

OURS = "qk8"
SCHEMES: dict[str, Scheme] = {
    OURS: schemes.qk8,
    "qk8 f16": partial(schemes.qk8, sums_in_f16=True),
    "qk8 integers": partial(schemes.qk8, in_integers=True),
    "Sage2": schemes.sage2,
    "comfy-kitchen": schemes.comfy_kitchen,
    "Sage f16": schemes.sage_f16,
}
if row := library.lossy_row():
    SCHEMES[f"{OURS} ({row.name})"] = library.scheme(row)
WITHOUT: dict[str, Scheme] = {
    OURS: schemes.qk8,
    "K's mean stays": partial(schemes.qk8, removes_mean=False),
    "not rotated": partial(schemes.qk8, rotates=False),
    "scales per thread": partial(schemes.qk8, per_token=False),
}

MOST_ON_NORMAL = 0.011
SHARE_OF = {"Sage2": 2 / 3, "comfy-kitchen": 1.0}


@dataclass(frozen=True)
class Error:
    """How far a result is from the exact one."""

    relative_l2: float
    one_less_cosine: float
    largest: float


def error(got: Array, want: Array) -> Error:
    """Both [rows, D]."""
    size = float(np.linalg.norm(want))
    cosine = float((got * want).sum()) / (float(np.linalg.norm(got)) * size)
    largest = float(np.abs(got - want).max() / np.abs(want).max())
    return Error(float(np.linalg.norm(got - want)) / size, 1.0 - cosine, largest)


def judge(case: Case, candidates: dict[str, Scheme]) -> dict[str, Error]:
    """Every scheme's error on one case."""
    want = schemes.exact(case.q, case.k, case.v, case.scale)
    return {
        name: error(scheme(case.q, case.k, case.v, case.scale), want)
        for name, scheme in candidates.items()
    }


def broken_promises(family: str, errors: dict[str, Error]) -> Iterator[str]:
    """What of the promises at this file's head does not hold, for each of our ways to sum P V."""
    for ours in (name for name in errors if name.startswith(OURS)):
        mine = errors[ours].relative_l2
        if family == "normal" and mine > MOST_ON_NORMAL:
            yield f"{family}: {ours} has {mine:.2%}, promised {MOST_ON_NORMAL:.1%}"
        for name, share in SHARE_OF.items():
            theirs = errors[name].relative_l2
            if mine > share * theirs:
                yield f"{family}: {ours} has {mine / theirs:.2f} of {name}'s, promised {share:.2f}"


def cell(found: Error) -> str:
    """One scheme on one family, as the table shows it."""
    return f"{found.relative_l2:.2%}  {found.one_less_cosine:.0e}  {found.largest:.1%}"


def cases(small: bool, wan22: Path | None) -> Iterator[Case]:
    """The families, and the recorded stack's heads if there is a checkout."""
    if small:
        yield from families.synthetic(keys=1024, long=4096)
    else:
        yield from families.synthetic()
    if wan22:
        from . import wan_stack

        yield from wan_stack.record(wan22)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--wan22", type=Path, help="a checkout of Wan2.2: its block stack as well")
    parser.add_argument("--parts", action="store_true", help="what each part of our scheme brings")
    parser.add_argument("--small", action="store_true", help="1,024 keys: seconds, not minutes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(None if arguments is None else list(arguments))

    candidates = WITHOUT if options.parts else SCHEMES
    print("relative L2, 1 - cosine, largest error\n")
    print(f"| family | {' | '.join(candidates)} |\n|---|{'---|' * len(candidates)}")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    broken: list[str] = []
    for case in cases(options.small, options.wan22):
        errors = judge(case, candidates)
        print(f"| {case.family} | {' | '.join(cell(e) for e in errors.values())} |", flush=True)
        figures[case.family] = {name: asdict(found) for name, found in errors.items()}
        if not options.parts:
            broken += broken_promises(case.family, errors)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if not options.parts:
        print("\n" + ("\n".join(broken) or "every promise holds"))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
