# SPDX-License-Identifier: Apache-2.0
"""worker.py - the process in which the items of a check run, one after another.

A kernel may hang, or break the device for its process. So they run here, in a process of their own,
which says what it will do, what it begins and how that ended; run.py listens, ends it when it
hangs, and starts another one at the next item.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from wan_attn.check import plan, sanitizer, speed
from wan_attn.check.calls import Detail, WrongError
from wan_attn.check.plan import STEPS, Item
from wan_attn.check.results import ENDED_A_WORKER
from wan_attn.check.target import Kernel, Target, label, of_device
from wan_attn.selfcheck import child, proof_child
from wan_attn.transient import is_interruption, is_out_of_memory


def main(argv: Sequence[str], make_target: Callable[[torch.device], Target] = of_device) -> int:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", default="")
    parser.add_argument("--without", default="", help="what ended a worker before")
    parser.add_argument("--touch", action="store_true")
    options = parser.parse_args(argv)
    proof_child.allow_all()
    target = make_target(options.device)
    with torch.no_grad():
        target.only, target.without = words(options.rows), words(options.without)
        if options.touch:
            sanitizer.touch(target)
            return 0
        items = plan.make(target, words(options.only))
        child.say(
            plan=[asdict(item) for item in items],
            kernels=[kernel.name for kernel in target.kernels()],
            shapes={call.name: label(call) for call in target.sizes.shapes},
            environment=target.environment(),
            state=asdict(target.state()),
        )
        work(target, items, options.start, options.seconds)
    return 0


def words(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word for word in text.split(",") if word)


def work(target: Target, items: list[Item], start: int, seconds: float) -> None:
    """Run items from `start` on, as long as there is time to begin one."""
    began = time.perf_counter()
    kernels = {kernel.name: kernel for kernel in target.kernels()}
    for number, item in enumerate(items[start:], start):
        if time.perf_counter() - began > seconds:
            child.say(out_of_time=number)
            return
        child.say(begin=number)
        at = time.perf_counter()
        if item.kernel in target.without:
            detail, problem, is_lost = {"skipped": ENDED_A_WORKER}, "", False
        else:
            detail, problem, is_lost = _try(target, item, kernels.get(item.kernel), number)
        took = round(time.perf_counter() - at, 3)
        child.say(end=number, problem=problem, detail=detail, seconds=took, is_lost=is_lost)
        if is_lost:
            os._exit(1)  # torch's own end would ask the device again
    child.say(done=True)


def _try(
    target: Target, item: Item, kernel: Kernel | None, number: int
) -> tuple[Detail, str, bool]:
    """One item: (what it found, what is wrong, whether the device is lost to this process)."""
    torch.manual_seed(number)
    step: Callable[..., Detail] = STEPS[item.step]
    if step is speed.measure_speed:
        step = partial(step, announce=lambda name: child.say(at=name))
    try:
        detail = step(target, kernel, item.argument)
        target.synchronize()
    except WrongError as error:
        return {}, proof_child.line_of(error), False
    except Exception as error:  # noqa: BLE001 - any error is this item's result
        if is_interruption(error):
            raise
        if is_out_of_memory(error):
            target.drop_memory()
            return {"skipped": f"out of memory: {proof_child.line_of(error)[:160]}"}, "", False
        problem = f"{type(error).__name__}: {proof_child.line_of(error)}"
        is_lost = (
            target.has_streams
            and isinstance(error, RuntimeError)
            and proof_child.is_lost(target.card, error)
        )
        return {}, problem, is_lost
    return plain(detail), "", False


def plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, list):
        return [plain(x) for x in value]
    if isinstance(value, float) and not value - value == 0.0:
        return None
    return value
