# SPDX-License-Identifier: Apache-2.0
"""run.py - the campaign against faults, in bounded time.

    make fuzz MINUTES=10 ARGS="--seed 7"                everything, the time shared out
    make fuzz ARGS="--only legal --seed 7 --case 123 [--variant sanitized]"     one case again

broken           calls of the C ABI that break its contract (broken.c)
broken_rope      the same of rms_norm_rope (broken_rope.c)
broken_gradient  and of gradients (broken_gradient.c)
malformed        every argument of every Python function, broken in every way (malformed.py)
driver           every call of the CUDA driver fails, with every error (driver_faults.py), and what
                 Python makes of it (fallbacks.py); --write writes docs/driver-faults.md
surroundings     caches, threads, forks, signals (surroundings.py)
rope             random calls of rms_norm_rope against float64, guard pages, each row (rope.c)
gradient         the same of gradients (gradient.c)
legal            the same of attention (legal.c)

The C campaigns run plain, under the address and undefined-behaviour sanitizers of gcc and clang,
and under gcc's thread sanitizer. Ends with a line for each campaign, and with 1 if anything is
wrong. The same seed makes the same cases.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "support"), str(ROOT), str(ROOT / ".ci")]

from fuzz import build  # noqa: E402 - behind the path
from fuzz.count import Count, counted  # noqa: E402

# Shares of the time; malformed and driver take what they need, and legal gets the rest.
SHARES = {
    **{"broken": 0.1, "broken_rope": 0.05, "broken_gradient": 0.05},
    **{"surroundings": 0.1, "rope": 0.1, "gradient": 0.2},
}
LEAST_FOR_LEGAL = 0.3
_LEGAL = ("rope", "gradient", "legal")
_BROKEN = ("broken", "broken_rope", "broken_gradient")
CAMPAIGNS = (*_BROKEN, "malformed", "driver", "surroundings", *_LEGAL)
VARIANTS = {
    **dict.fromkeys(_LEGAL, ("plain", "sanitized", "sanitized clang", "threads")),
    **dict.fromkeys(_BROKEN, ("plain", "sanitized", "sanitized clang")),
}
SPARE = 120.0  # seconds beyond its own time after which a campaign hangs
LIMIT = 900.0  # of those that have none


def run(command: list[str], limit: float = LIMIT) -> Count:
    """What the command counts; its output is shown as it comes."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:4]), "OMP_WAIT_POLICY": "passive"}
    found = None
    with subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        timer = threading.Timer(limit, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            found = counted(line) or found
        process.wait()
        is_over = not timer.is_alive()
        timer.cancel()
    if found is not None and found.is_bad == bool(process.returncode):
        return found
    how = "hangs" if is_over else f"ended with {process.returncode}"
    print(f"FAILED: {' '.join(command)}: {how}", flush=True)
    return (found or Count()) + Count(crashes=1)


def run_c(name: str, options: argparse.Namespace, seconds: float) -> Count:
    """A C campaign in each of its variants, each with other cases of the same seed."""
    wanted = options.variant.split(",") if options.variant else VARIANTS[name]
    variants = [v for v in wanted if v in build.compilers()]
    for missing in set(wanted) - set(variants):
        print(f"-- {name}, {missing}: not run, there is no such compiler here")
    programs = {v: str(build.program(name, v)) for v in variants}  # which takes time of its own
    total, end = Count(), time.monotonic() + seconds
    for number, (variant, program) in enumerate(programs.items()):
        print(f"-- {name}, {variant}, seed {options.seed}", flush=True)
        if options.case is not None:
            first, count, time_limit = options.case, 1, 60.0
        else:
            first, count = number << 40, 1 << 40
            time_limit = max(1.0, (end - time.monotonic()) / (len(programs) - number))
        if name.startswith("broken") and options.case is None:
            first = 0  # the single faults in each
        command = [program, str(options.seed), str(first), str(count), f"{time_limit:g}"]
        total += run(command, time_limit + SPARE)
    return total


def run_campaign(name: str, options: argparse.Namespace, left: float) -> Count:
    """One campaign; its share of the time, or what is left of it."""
    whole = options.minutes * 60
    seconds = whole * SHARES.get(name, 0.0)
    if name == "legal" or options.only:
        seconds = max(left, whole * LEAST_FOR_LEGAL)
    print(f"== {name}", flush=True)
    python = [sys.executable, "-X", "faulthandler"]
    if name in VARIANTS:
        return run_c(name, options, seconds)
    if name == "malformed":
        return run([*python, str(HERE / "malformed.py")])
    if name == "driver":
        more = [f"--{name}" for name in ("short", "write") if getattr(options, name)]
        found = run([*python, str(HERE / "driver_faults.py"), *more])
        return found + run([*python, str(HERE / "fallbacks.py")])
    command = [*python, str(HERE / "surroundings.py"), str(options.seed), f"{seconds:g}"]
    return run(command, seconds + LIMIT)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="for all of it, about")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000_000)
    parser.add_argument("--only", choices=CAMPAIGNS)
    parser.add_argument("--case", type=int, help="of a campaign in C, as a failure prints it")
    parser.add_argument("--variant", help=f"some of {', '.join(build.VARIANTS)}")
    parser.add_argument("--short", action="store_true", help="fewer errors of the driver")
    parser.add_argument("--write", action="store_true", help="write docs/driver-faults.md")
    options = parser.parse_args(arguments)
    again = f"make fuzz MINUTES={options.minutes:g} ARGS='--seed {options.seed}'"
    print(f"seed {options.seed}: {again}", flush=True)
    end = time.monotonic() + options.minutes * 60
    chosen = [options.only] if options.only else list(CAMPAIGNS)
    found = {name: run_campaign(name, options, end - time.monotonic()) for name in chosen}
    print("== summary")
    for name, count in found.items():
        print(f"{name:15} {count}")
    total = sum(found.values(), Count())
    print(f"{'all':15} {total}: {'WRONG' if total.is_bad else 'all right'} (seed {options.seed})")
    return int(total.is_bad)


if __name__ == "__main__":
    sys.exit(main())
