# SPDX-License-Identifier: Apache-2.0
"""bench_precision.py - what the guard and the measured error cost, as a share of attention.

    python benchmarks/bench_precision.py [--tokens 8192] [--heads 1] [--layers 2] [--steps 12]

First the parts, each alone. Then whole steps, one call for each layer, bf16 with float32 query and
key as Wan2.2 passes them, on the CPU: every way computes the same lossy calls, the ways take turns,
and the median over rounds of the difference to the plain way counts. Times are CPU times of the
process. Beside it: what an exact call costs in Python, with precision off.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import wan_attn
from wan_attn import config, precision
from wan_attn.backends import native
from wan_attn.native import bindings
from wan_attn.observe import sampling
from wan_attn.request import PLAIN

# name -> (mode, guard). `auto` with every layer allowed computes what `fast` computes.
EVERYWHERE = [{"precision": "qk8", "kinds": "self"}]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"mode": "fast", "guard": "off"},
    "guard": {"mode": "fast", "guard": "auto"},
    "guard and measured error": {"mode": "auto", "guard": "auto", "rules": EVERYWHERE},
}


def steps(operands: list[torch.Tensor], layers: int, count: int) -> None:
    for step in range(count):
        for layer in range(layers):
            with precision.at(step=step, steps=count, layer=layer, layers=layers, expert=0):
                wan_attn.sdpa(*operands)


def cpu_seconds(run: Callable[[], object]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def _operands(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, args.tokens, args.heads, 128)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    return query, key, value.bfloat16()


def shares(args: argparse.Namespace) -> dict[str, list[float]]:
    """way -> seconds of each round. The first call of a layer is always measured: it is paid
    before, as a run has hundreds of calls behind it."""
    operands = list(_operands(args))
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    used = {name: precision.use(**options) for name, options in WAYS.items()}
    for each in used.values():
        each.end()

    def run(name: str) -> None:
        used[name].begin()
        steps(operands, args.layers, args.steps)
        used[name].end()

    for name in WAYS:
        run(name)
    for number in range(args.rounds):
        names = list(WAYS)
        for name in names[number % 3 :] + names[: number % 3]:
            found[name].append(cpu_seconds(lambda name=name: run(name)))  # type: ignore[misc]
    for name, each in used.items():
        lossy = sum(layer["lossy_calls"] for layer in each.report().layers)
        assert lossy == (args.rounds + 1) * args.steps * args.layers, f"{name}: a call was exact"
    return found


def parts(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one thread, the least of several runs: of a lossy call, of the guard's look
    at V and the result, and of measuring the error once. Short runs find a quiet moment on a busy
    machine, which the ways above need all the time.

    The guard's time is twice what it adds to a call of 8 rows, where it looks at V alone.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    query, key, value = _operands(args)
    few, guard = query[:, :8].contiguous(), precision.guard.make(query.device)
    groups = sampling.groups(args.heads, args.heads)

    def lossy(rows: torch.Tensor, **options: Any) -> Callable[[], object]:
        return lambda: bindings.ctypes_sdpa(rows, key, value, precision=1, **options)

    out, _ = bindings.ctypes_sdpa(query, key, value, precision=1)
    rows = sampling.Allowance().rows(args.tokens)
    x = (query, key, value)
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "a lossy call": (lossy(query), 5),
        "8 rows": (lossy(few), 15),
        "8 rows and guard": (lossy(few, guard=guard), 15),
        "measuring the error once": (
            lambda: sampling.errors(native.run, rows, groups, x, out, PLAIN),
            15,
        ),
    }
    found = {name: 1e3 * min(cpu_seconds(run) for _ in range(n)) for name, (run, n) in runs.items()}
    torch.set_num_threads(threads)
    with_guard, without = found.pop("8 rows and guard"), found.pop("8 rows")
    return {**found, "the guard": 2 * (with_guard - without)}


def python_overhead(calls: int = 3000) -> dict[str, float]:
    """Microseconds of an exact call of almost no work, off and on."""
    x = [torch.randn(1, 1, 1, 16) for _ in range(3)]

    def best(run: Callable[[], object]) -> float:
        return 1e6 * min(cpu_seconds(run) for _ in range(7)) / calls

    def many() -> None:
        for _ in range(calls):
            wan_attn.sdpa(*x)

    many()
    off = best(many)
    with precision.use("balanced"):
        many()
        on = best(many)
    return {"off": off, "balanced, exact by its place": on}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5, help="of whole steps; 0: the parts alone")
    args = parser.parse_args()
    config.put("WAN_ATTN_TUNE", "off")
    counted = parts(args)
    every = max(1.0, sampling.COST / (sampling.SHARE * args.tokens))
    whole = counted["a lossy call"]
    for name, ms in counted.items():
        print(f"{name:<28}{ms:9.2f} ms")
    share = counted["the guard"] / whole
    print(f"{'guard, of a call':<28}{100 * share:9.2f} %")
    share = counted["measuring the error once"] / every / whole
    print(f"{f'error, every {every:.1f} calls':<28}{100 * share:9.2f} %")
    if args.rounds < 1:
        return
    found = shares(args)
    plain = statistics.median(found["plain"])
    print(f"{args.layers} layers x {args.steps} steps of 1x{args.tokens}x{args.heads}x128")
    for name, seconds in found.items():
        more = statistics.median(s - p for s, p in zip(seconds, found["plain"], strict=True))
        print(f"{name:<28}{statistics.median(seconds):9.3f} s{100 * more / plain:+8.2f} %")
    for name, micro in python_overhead().items():
        print(f"an exact call, precision {name}: {micro:.2f} us")


if __name__ == "__main__":
    main()
