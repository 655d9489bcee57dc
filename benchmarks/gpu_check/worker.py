# SPDX-License-Identifier: Apache-2.0
"""worker.py - the process in which gpu_check's items run, one after another.

A kernel that has never run on hardware may hang, or break the device for its process. So they run
here, in a process of their own, which says on stdout, one JSON object a line, what it will do, what
it begins and how that ended; gpu_check listens, ends it when it hangs, and starts another one at
the next item.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# A waiting OpenMP thread that spins takes the core from whom it waits for; read at torch's start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from benchmarks.gpu_check import items as gpu_items
from benchmarks.gpu_check import speed
from benchmarks.gpu_check.items import Bench
from wan_attn.bench import facts
from wan_attn.bench.timing import describe_failure
from wan_attn.selfcheck import proof_child

WAN_SHAPES = ("ti2v-5b-720p", "a14b-480p", "a14b-720p")
CROSS_SHAPES = ("ti2v-5b-720p-cross", "a14b-720p-image", "clip-vit-h")
DRY_SHAPES = ("1x300x2x128", "1x513:77x3x128", "2x257x2x80")


@dataclass(frozen=True)
class Item:
    """One thing to do: a step, for a row of the kernel table or for all ("")."""

    step: str
    row: str
    argument: str = ""
    limit_s: float = 45.0


def plan(bench: Bench) -> list[Item]:
    """Everything, the most telling first: a run that stops early then knows the most."""
    names = [row.name for row in bench.rows()]
    shapes = DRY_SHAPES[:2] if bench.is_dry else WAN_SHAPES
    cross = DRY_SHAPES[2:] if bench.is_dry else CROSS_SHAPES
    items = [Item("small", name) for name in names]
    items += [Item("matmul", "", limit_s=30), Item("speed", "", shapes[0], 120)]
    items += [Item("lengths", name) for name in names]
    items += [Item("wan", name, shape) for shape in shapes[:1] for name in names]
    items += [Item("masks", name) for name in names]
    items += [Item("graph", name) for name in names] + [Item("stream", name) for name in names]
    items += [Item("speed", "", shapes[1], 120)]
    items += [Item("wan", name, shape) for shape in shapes[1:2] for name in names]
    items += [Item("offsets", name, limit_s=60) for name in names]
    if len(shapes) > 2:
        items += [Item("speed", "", shapes[2], 150)]
    items += [Item("wan", name, shape) for shape in (*cross, *shapes[2:]) for name in names]
    if not bench.is_dry:
        items += [Item("sanitizer", "", tool, 150) for tool in speed.SANITIZER_TOOLS]
    return items


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "small": gpu_items.check_small,
    "lengths": gpu_items.check_lengths,
    "masks": gpu_items.check_masks,
    "wan": gpu_items.check_wan,
    "offsets": gpu_items.check_offsets,
    "graph": gpu_items.check_graph,
    "stream": gpu_items.check_stream,
    "matmul": speed.measure_matmul,
    "speed": speed.measure_speed,
    "sanitizer": speed.run_sanitizer,
}


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def work(bench: Bench, items: list[Item], start: int, seconds: float) -> None:
    """Run items from `start` on, as long as there is time to begin one."""
    began = time.perf_counter()
    for number, item in enumerate(items[start:], start):
        if time.perf_counter() - began > seconds:
            say(out_of_time=number)
            return
        say(begin=number)
        torch.manual_seed(number)
        at = time.perf_counter()
        row = bench.row(item.row) if item.row else None
        try:
            detail, problem = STEPS[item.step](bench, row, item.argument), ""
            bench.synchronize()
        except Exception as error:  # noqa: BLE001 - any error is this item's result
            detail, problem = {}, describe_failure(error)
            if row is not None and gpu_items.is_refusal(row, error):
                detail, problem = {"skipped": str(error)}, ""
        say(end=number, problem=problem, detail=detail, seconds=time.perf_counter() - at)
        if problem and bench.device.type == "cuda":
            try:
                bench.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:  # the device is lost to this process
                os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--dry-run-on-cpu", action="store_true")
    parser.add_argument("--touch", action="store_true")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", default="")
    options = parser.parse_args()
    is_dry = options.dry_run_on_cpu
    torch.set_num_threads(min(2, torch.get_num_threads()))  # what runs on the CPU here is small
    bench = Bench(torch.device("cpu" if is_dry else "cuda:0"), is_dry)
    proof_child.allow_all()
    if options.touch:
        speed.touch(bench)
        return 0
    steps, rows = options.only.split(","), options.rows.split(",")
    items = [
        item
        for item in plan(bench)
        if (not options.only or item.step in steps)
        and (not options.rows or not item.row or item.row in rows)
    ]
    say(
        plan=[asdict(item) for item in items],
        rows=[row.name for row in bench.rows()],
        environment=facts.environment(bench.device),
        datasheet=facts.datasheet_tflops(bench.device, torch.bfloat16),
        state=asdict(facts.state(bench.device)),
    )
    work(bench, items, options.start, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
