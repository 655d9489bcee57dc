# SPDX-License-Identifier: Apache-2.0
"""__main__.py - every CUDA kernel on this machine's card: right, and how fast, in one command.

    python -m benchmarks.gpu_check [--seconds 420] [--out FOLDER] [--only STEP,..] [--rows NAME,..]
    python -m benchmarks.gpu_check --dry-run-on-cpu      the same steps with the CPU kernels

Steps, the most telling first, each for every kernel that takes this card (kernel= of the op):
small calls and lengths 1 to 300 against float64 with NaN behind every length; masks, grouped heads,
fused views; Wan's real shapes against float64 on 64 rows of every head; CUDA graph replay with new
inputs; a second stream; offsets beyond 2^31; compute-sanitizer where installed; then TFLOP/s beside
torch's flash, cuDNN and efficient SDPA and the measured matmul peak, L2 flushed, in turn, clocks,
power and throttling noted.

A hanging or crashing kernel costs its own item only: items run in another process, which is ended
and begun again. gpu_check-CARD.json and .md are written after every item.

Exit code: 0 everything that ran passed; 1 a check failed; 2 bad arguments; 3 there is no GPU; 4
this build has no CUDA kernel for the card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.report import Results, save, title_of
from benchmarks.gpu_check.run import orchestrate

BENCHMARKS = Path(__file__).resolve().parents[1]
PASSED, FAILED, BAD, NO_GPU, NO_ROWS = range(5)
STEPS = "small matmul speed lengths wan masks graph stream offsets sanitizer".split()


def verdict(results: Results) -> int:
    """The exit code."""
    if results.trouble or results.failures:
        return FAILED
    if not results.facts.get("rows"):
        return NO_ROWS
    return PASSED


def why_no_gpu() -> str | None:
    """torch's own words; None: there is one."""
    import torch

    from wan_attn.doctor import facts

    if torch.cuda.is_available():
        return None
    return facts.cuda_devices()[1]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=str(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=420, help="default: 420")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results; dry: build/gpu-check"
    )
    parser.add_argument("--dry-run-on-cpu", action="store_true")
    parser.add_argument("--only", default="", metavar="STEP,...", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--rows", default="", metavar="NAME,...", help="rows of the kernel table")
    options = parser.parse_args(argv)
    if not options.seconds > 0:
        parser.error(f"--seconds must be above 0, got {options.seconds:g}")
    for step in filter(None, options.only.split(",")):
        if step not in STEPS:
            parser.error(f"--only must name some of {', '.join(STEPS)}; got {step!r}")
    if options.rows:
        from wan_attn.native import op

        known = [row.name for row in op.kernels()]
        for row in options.rows.split(","):
            if row not in known:
                parser.error(f"--rows must name some of {', '.join(known)}; got {row!r}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    is_dry = options.dry_run_on_cpu
    if not is_dry:
        reason = why_no_gpu()
        if reason is not None:
            print(f"gpu_check: there is no GPU to check: {reason}", file=sys.stderr)
            print("gpu_check: --dry-run-on-cpu tries the checks themselves", file=sys.stderr)
            return NO_GPU
    folder = options.out or (
        BENCHMARKS.parent / "build/gpu-check" if is_dry else BENCHMARKS / "results"
    )
    command = [sys.executable, "-m", "benchmarks.gpu_check.worker"]
    command += ["--dry-run-on-cpu"] if is_dry else []
    for option, value in (("--only", options.only), ("--rows", options.rows)):
        command += [option, value] if value else []
    said = 0

    def on_change(results: Results) -> None:
        nonlocal said
        for number, end in sorted(results.ended.items())[said:]:
            skipped = end["detail"].get("skipped", "")
            word = end["problem"] or (skipped if isinstance(skipped, str) else "") or "ok"
            print(
                f"{title_of(results.plan[number]):58} {end['seconds']:5.1f} s  {word}", flush=True
            )
            said += 1
        if results.plan:
            save(folder, results, is_dry)

    results = orchestrate(command, options.seconds, on_change)
    code = verdict(results)
    if code == NO_ROWS:
        print("gpu_check: this build has no CUDA kernel for this card", file=sys.stderr)
        return code
    if results.trouble:
        print(f"gpu_check: {results.trouble}", file=sys.stderr)
    left = len(results.plan) - len(results.ended)
    print(
        f"\n{len(results.ended) - len(results.failures)} passed, {len(results.failures)} failed, "
        f"{left} not run, {results.seconds:.0f} s"
    )
    if results.plan:
        print(f"written: {save(folder, results, is_dry)}, and .json beside it")
    return code


if __name__ == "__main__":
    sys.exit(main())
