# SPDX-License-Identifier: Apache-2.0
"""run.py - the campaign against faults, in bounded time.

    make fuzz ARGS="--seconds 600 --seed 7"        everything, the time shared out
    make fuzz ARGS="--only legal --seed 7 --case 123 [--variant sanitized]"     one case again

legal         random calls of the C ABI against float64, with guard pages, on every row (legal.c)
broken        calls of the C ABI that break its contract (broken.c)
malformed     every argument of every Python function, broken in every way (malformed.py)
driver        every call of the CUDA driver fails, with every error (driver_faults.py), and what
              Python makes of it (fallbacks.py)
surroundings  caches, threads, forks, signals (surroundings.py)

Ends with 1 if anything is wrong. The same seed makes the same cases.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "support"), str(ROOT), str(ROOT / ".ci")]

from fuzz import build  # noqa: E402 - behind the path

# Shares of the time; those that are not named take what they need.
SHARES = {"legal": 0.6, "broken": 0.1, "surroundings": 0.1}
CAMPAIGNS = ("broken", "malformed", "driver", "surroundings", "legal")


def run(command: list[str], limit: float | None = None) -> bool:
    """Whether the command ended well; its output is shown as it comes."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:4]), "OMP_WAIT_POLICY": "passive"}
    try:
        return subprocess.run(command, env=env, cwd=ROOT, timeout=limit).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"FAILED: it hangs: {' '.join(command)}")
        return False


def run_c(name: str, options: argparse.Namespace, seconds: float) -> bool:
    """A C campaign in each of its variants, each with other cases of the same seed."""
    wanted = options.variant.split(",") if options.variant else ["plain", "sanitized"]
    variants = [v for v in wanted if v in build.compilers()]
    if not variants:
        print(f"{name}: not run, there is no compiler for {', '.join(wanted)}")
    well = True
    for number, variant in enumerate(variants):
        program = str(build.program(name, variant))
        print(f"-- {name}, {variant}, seed {options.seed}", flush=True)
        if options.case is not None:
            first, count, time_limit = options.case, 1, 60.0
        else:
            first, count = number << 40, 1 << 40
            time_limit = seconds / len(variants)
        if name == "broken" and options.case is None:
            first = 0  # the single faults in both
        command = [program, str(options.seed), str(first), str(count), f"{time_limit:g}"]
        well &= run(command, time_limit + 120)
    return well


def run_campaign(name: str, options: argparse.Namespace) -> bool:
    """One campaign; its share of the time."""
    seconds = options.seconds * (1.0 if options.only else SHARES.get(name, 0.0))
    print(f"== {name}", flush=True)
    python = [sys.executable, "-X", "faulthandler"]
    if name in ("legal", "broken"):
        return run_c(name, options, seconds)
    if name == "malformed":
        return run([*python, str(HERE / "malformed.py")])
    if name == "driver":
        short = ["--short"] if options.short else []
        well = run([*python, str(HERE / "driver_faults.py"), *short])
        return run([*python, str(HERE / "fallbacks.py")]) and well
    return run([*python, str(HERE / "surroundings.py"), str(options.seed), f"{seconds:g}"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="for all of it, about")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000_000)
    parser.add_argument("--only", choices=CAMPAIGNS)
    parser.add_argument("--case", type=int, help="of legal or broken, as a failure prints it")
    parser.add_argument("--variant", help=f"some of {', '.join(build.VARIANTS)}")
    parser.add_argument("--short", action="store_true", help="fewer errors of the driver")
    options = parser.parse_args(arguments)
    print(
        f"seed {options.seed}: make fuzz ARGS='--seconds {options.seconds:g} --seed {options.seed}'"
    )
    chosen = [options.only] if options.only else list(CAMPAIGNS)
    wrong = [name for name in chosen if not run_campaign(name, options)]
    print(f"== wrong: {', '.join(wrong)}" if wrong else "== all right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
