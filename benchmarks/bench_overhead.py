# SPDX-License-Identifier: Apache-2.0
"""bench_overhead.py - microseconds that torch.ops.wan_attn.sdpa costs beyond its kernel.

    python benchmarks/bench_overhead.py [--json FILE] [--rounds N] [--calls N]

The call is small (1x16x1x64 float32 on the CPU), so that dispatch, checks and allocation show. One
process per binding; rounds go around the processes and, within each, around everything measured, so
that a busy machine disturbs all alike. A figure is the median over rounds of the mean of a round's
calls; "beyond the kernel" is the median of the differences within a round.

The kernel alone: wan_attn_forward through ctypes in a loop, less the same loop over a call that the
library refuses at once (params NULL), which is what ctypes itself costs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

SHAPE = (1, 16, 1, 64)
LIMIT_US = 10.0
ROOT = Path(__file__).resolve().parents[1]
MODES = ("inference_mode", "no_grad", "grad", "needs_grad")


def seconds_per_call(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def kernel_calls() -> tuple[Callable[[], object], Callable[[], object]] | None:
    """(a call that runs the kernel, the same call refused at once), both through ctypes."""
    import torch

    from wan_attn.native import library
    from wan_attn.native.bindings import describe

    if library.load() is None:
        return None
    forward, error = library.lib().wan_attn_forward, library.Error()
    tensors = [torch.randn(SHAPE) for _ in range(4)]
    q, k, v, out = (describe(t) for t in tensors)
    params = library.Params(
        struct_size=ctypes.sizeof(library.Params),
        kernel=-1,
        q=q,
        k=k,
        v=v,
        out=out,
        window_size_left=-1,
        window_size_right=-1,
        num_threads=1,
    )
    at, size = ctypes.byref(params), ctypes.c_size_t()
    if library.lib().wan_attn_workspace_size(at, size, error) != library.OK:
        raise RuntimeError(error.text())
    workspace = torch.empty(size.value + 64, dtype=torch.uint8)
    params.workspace = -(-workspace.data_ptr() // 64) * 64
    params.workspace_size = size.value
    if forward(at, error) != library.OK:
        raise RuntimeError(error.text())
    kept = (tensors, params, workspace)  # the closure below owns what `at` points to
    return lambda: kept and forward(at, None), lambda: kept and forward(None, None)


def measured(binding: str) -> dict[str, Callable[[int], float]]:
    """name -> seconds per call, given the number of calls."""
    import torch

    import wan_attn
    from wan_attn.native import op as ops

    if ops.binding() != binding:
        raise SystemExit(f"binding {binding} is not available here: {ops.binding_reason()}")
    torch.set_num_threads(1)
    op = torch.ops.wan_attn.sdpa
    query, key, value = (torch.randn(SHAPE) for _ in range(3))
    trained = query.clone().requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    torch_sdpa = torch.nn.functional.scaled_dot_product_attention

    def under(context: Callable[[], Any], function: Callable[[], object]) -> Callable[[int], float]:
        def measure(calls: int) -> float:
            with context():
                return seconds_per_call(function, calls)

        return measure

    table = {
        "inference_mode": under(torch.inference_mode, lambda: op(query, key, value)),
        "no_grad": under(torch.no_grad, lambda: op(query, key, value)),
        "grad": under(nullcontext, lambda: op(query, key, value)),
        "needs_grad": under(nullcontext, lambda: op(trained, key, value)),
        "wan_attn.sdpa": under(torch.inference_mode, lambda: wan_attn.sdpa(query, key, value)),
        "torch SDPA": under(torch.inference_mode, lambda: torch_sdpa(q, k, v)),
    }
    kernel = kernel_calls()
    if kernel is not None:
        run, refused = kernel
        table["kernel"] = lambda n: seconds_per_call(run, n) - seconds_per_call(refused, n)
    return table


def worker(binding: str) -> None:
    """Answers each line (a number of calls) with one round: {name: microseconds}."""
    table = measured(binding)
    for measure in table.values():
        measure(200)  # caches, lazy registrations
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps({n: 1e6 * f(int(line)) for n, f in table.items()}), flush=True)


class Worker:
    """One process that measures one binding, round by round."""

    def __init__(self, binding: str) -> None:
        self.binding, self.rounds = binding, list[dict[str, float]]()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", binding],
            env=os.environ | {"WAN_ATTN_BINDING": binding, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.questions, self.answers = self.process.stdin, self.process.stdout
        self.usable = bool(self.answers.readline())
        self.why_not = "" if self.usable else self.process.stderr.read().strip().split("\n")[-1]

    def round(self, calls: int) -> None:
        self.questions.write(f"{calls}\n")
        self.questions.flush()
        self.rounds.append(json.loads(self.answers.readline()))

    def summary(self) -> dict[str, Any]:
        names = [name for name in self.rounds[0] if name != "kernel"]
        result: dict[str, Any] = {
            "per_call_us": {n: statistics.median(r[n] for r in self.rounds) for n in names}
        }
        if "kernel" in self.rounds[0]:
            result["kernel_us"] = statistics.median(r["kernel"] for r in self.rounds)
            result["beyond_kernel_us"] = {
                n: statistics.median(r[n] - r["kernel"] for r in self.rounds)
                for n in names
                if n != "torch SDPA"
            }
        return result

    def close(self) -> None:
        self.questions.close()
        self.process.wait()


def table(results: dict[str, dict[str, Any]]) -> str:
    columns = (*MODES, "wan_attn.sdpa")
    lines = [f"{'binding':8} {'kernel':>7}  " + " ".join(f"{name:>14}" for name in columns)]
    for binding, result in results.items():
        cells = result.get("beyond_kernel_us") or result["per_call_us"]
        kernel = f"{result['kernel_us']:7.2f}" if "kernel_us" in result else f"{'-':>7}"
        lines.append(f"{binding:8} {kernel}  " + " ".join(f"{cells[n]:14.2f}" for n in columns))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--rounds", type=int, default=21, help="around all bindings (default 21)")
    parser.add_argument("--calls", type=int, default=500, help="per figure and round (default 500)")
    parser.add_argument("--bindings", default="shim,ctypes,torch", help="comma-separated")
    parser.add_argument("--json", metavar="FILE", help="write the figures too; - for stdout")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return 0

    workers = [Worker(binding) for binding in args.bindings.split(",")]
    for unusable in (w for w in workers if not w.usable):
        print(f"{unusable.binding}: left out: {unusable.why_not}", file=sys.stderr)
    usable = [w for w in workers if w.usable]
    if not usable:
        return 1
    for _ in range(args.rounds):
        for w in usable:
            w.round(args.calls)
    results = {w.binding: w.summary() for w in usable}
    for w in workers:
        w.close()

    import torch

    report = {
        "shape": "x".join(map(str, SHAPE)),
        "dtype": "float32",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "rounds": args.rounds,
        "calls": args.calls,
        "bindings": results,
    }
    text = json.dumps(report, indent=2)
    if args.json == "-":
        print(text)
        return 0
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    best = next(iter(results))
    print(f"1x16x1x64 float32, torch {torch.__version__}: microseconds a call")
    print("beyond the kernel (without a kernel of ours: in all):")
    print(table(results))
    reference = results[best]["per_call_us"]["torch SDPA"]
    print(f"for comparison: torch's own SDPA on the same tensors, in all: {reference:.2f}")
    beyond = results[best].get("beyond_kernel_us")
    if beyond:
        worst = max(beyond[mode] for mode in ("inference_mode", "no_grad", "grad"))
        verdict = "met" if worst < LIMIT_US else "MISSED"
        print(f"{best}: {worst:.2f} us beyond the kernel at most; under {LIMIT_US:g}: {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
