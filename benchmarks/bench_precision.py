# SPDX-License-Identifier: Apache-2.0
"""bench_precision.py - what the guard and the measured error cost, as a share of attention.

    python benchmarks/bench_precision.py [--tokens 8192] [--heads 1] [--layers 2] [--steps 12]
    python benchmarks/bench_precision.py --model [--wan22 DIR] [--layers 2] [--rounds 40]

Without --model: first the parts, each alone. Then whole steps, one call for each layer, bf16 with
float32 query and key as Wan2.2 passes them, on the CPU. Every way computes the same lossy calls,
ways take turns; the median over rounds of the difference to the plain way counts. Times are CPU
times of the process. Beside it: what an exact call costs in Python, with precision off.

With --model: of a forward of Wan's transformer, stock Wan2.2's or diffusers', which is half a step;
one thread. A round runs each way once. What a way costs is the median over rounds of its difference
to the same without a watch, and the noise is the interval that has it in 95 of 100 cases. The error
is measured in every call there, so that a few dozen calls tell its price.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import wan_attn
from wan_attn import config, precision
from wan_attn.backends import native
from wan_attn.bench import model
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


# --- a forward of the model ----------------------------------------------------------------------

# name -> (what it is compared with, options of use(); None: precision is off).
FORWARDS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "exact": ("exact", None),
    "exact, guard": ("exact", {"mode": "exact", "guard": "all"}),
    "8 bits": ("8 bits", {"mode": "exact", "guard": "off", "rules": EVERYWHERE}),
    "8 bits, guard": ("8 bits", {"mode": "exact", "rules": EVERYWHERE}),
    "8 bits, guard, every error": ("8 bits", {"mode": "auto", "rules": EVERYWHERE}),
}


def forwards(args: argparse.Namespace) -> tuple[dict[str, list[float]], int]:
    """Way -> CPU seconds of each round's forward; and its tokens."""
    arch, device = model.reduced(model.ARCHS["a14b"]), torch.device("cpu")
    stack: Any = (
        model.Wan22Stack(arch, args.layers, torch.bfloat16, device, args.wan22)
        if args.wan22
        else model.DiffusersStack(arch, args.layers, torch.bfloat16, device)
    )
    numbers = itertools.count()

    def attend(query: Any, key: Any, value: Any, k_lens: Any) -> Any:
        layer = next(numbers) // 2 % args.layers  # self-attention, and that to the text
        with precision.at(step=4, steps=50, layer=layer, layers=args.layers, expert=0):
            return wan_attn.sdpa(query, key, value, k_lens=k_lens)

    video = model.Video(832, 480, args.frames)
    stack.show(video, 1, (1.0,))
    stack.use(attend)
    used = {n: precision.use(**options) for n, (_, options) in FORWARDS.items() if options}
    for each in used.values():
        each.end()
    found: dict[str, list[float]] = {name: [] for name in FORWARDS}
    with torch.inference_mode():
        for number in range(args.rounds + 1):  # the first one warms up
            names = list(FORWARDS)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if name in used:
                    used[name].begin()
                    grant(used[name])
                seconds = cpu_seconds(stack.forward)
                if name in used:
                    used[name].end()
                if number:
                    found[name].append(seconds)
    measured = sum(len(x["measured"]) for x in used[list(FORWARDS)[-1]].report().layers)
    assert measured == (args.rounds + 1) * args.layers, "every call has to be measured"
    stack.close()
    return found, arch.call.tokens(video.width, video.height, video.frames)


def grant(used: precision.Use) -> None:
    """The next call of each layer is measured, whatever that costs."""
    if used.watch is not None:
        for layer in used.watch.layers.values():
            layer.allowance.grant()


def interval(values: list[float]) -> tuple[float, float]:
    """That of the median, at 95 %: by rank, whatever the distribution is."""
    ranked, reach = sorted(values), 0.98 * len(values) ** 0.5
    middle = (len(values) - 1) / 2
    low, high = max(0, int(middle - reach)), min(len(values) - 1, int(middle + reach + 1))
    return ranked[low], ranked[high]


def print_forwards(args: argparse.Namespace) -> None:
    found, tokens = forwards(args)
    calls = max(1.0, sampling.COST / (sampling.SHARE * tokens))
    title = "stock Wan2.2" if args.wan22 else "diffusers"
    print(f"{title}, {args.layers} layers, {tokens} tokens, {args.rounds} rounds, CPU time")
    shares: dict[str, float] = {}
    for name, (base, _) in FORWARDS.items():
        whole = statistics.median(found[base])
        more = [100 * (a - b) / whole for a, b in zip(found[name], found[base], strict=True)]
        shares[name] = statistics.median(more)
        low, high = interval(more)
        text = f"{shares[name]:+8.2f} %  ({low:+.2f} to {high:+.2f})"
        text = "" if name == base else text
        print(f"{name:<28}{statistics.median(found[name]):9.3f} s{text}")
    guard, both = shares["8 bits, guard"], shares["8 bits, guard, every error"]
    print(
        f"as scheduled, an error every {calls:.1f} calls: {guard + (both - guard) / calls:+.2f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5, help="of whole steps; 0: the parts alone")
    parser.add_argument("--model", action="store_true", help="a forward of Wan's transformer")
    parser.add_argument("--wan22", type=Path, help="with --model: a checkout of Wan2.2")
    parser.add_argument("--frames", type=int, default=9, help="with --model: of 832x480")
    args = parser.parse_args()
    config.put("WAN_ATTN_TUNE", "off")
    if args.model:
        torch.set_num_threads(1)
        print_forwards(args)
        return
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
