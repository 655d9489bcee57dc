# SPDX-License-Identifier: Apache-2.0
"""surroundings.py - faults that are not in the call: a cache that cannot be used (caches.py),
threads, forks and signals in the middle of calls.

    python tests/fuzz/surroundings.py [SEED [SECONDS]]      prints a line for each
"""

from __future__ import annotations

import gc
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import wan_attn
from fuzz.caches import CACHES, LIMIT, Problem, cache_fault, in_child
from fuzz.count import Count
from wan_attn import config


def _calls() -> dict[str, Callable[[], Any]]:
    """Every public function, with fixed inputs: the same bits whoever calls it, and when."""
    generator = torch.Generator().manual_seed(11)
    query, key, value = (torch.randn(2, n, 2, 32, generator=generator) for n in (9, 21, 21))
    lens = [17, 21]
    lists = (torch.tensor([0, 8, 18]), torch.tensor([0, 21, 42]), 10, 21)
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    half = [x.to(torch.bfloat16) for x in (query, key, value)]
    lse = torch.randn(2, 2, 9, generator=generator)
    mask = torch.ones(9, 21, dtype=torch.bool).tril()
    return {
        "sdpa": lambda: wan_attn.sdpa(query, key, value, k_lens=lens, return_lse=True),
        "flash_attention": lambda: wan_attn.flash_attention(query, key, value, causal=True),
        "bfloat16": lambda: wan_attn.sdpa(*half, window=(4, 2)),
        "varlen": lambda: wan_attn.flash_attn_varlen_func(q, k, v, *lists),
        "sageattn": lambda: wan_attn.sageattn(query, key, value, "NHD", is_causal=True),
        "torch's": lambda: wan_attn.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        ),
        "wrapper": lambda: wan_attn.windows_flash_attention_wrapper(
            query, key, value, method="chunked", max_elements=64
        ),
        "merge": lambda: wan_attn.merge_states(query, lse, query * 2, lse + 1),
        "op": lambda: torch.ops.wan_attn.sdpa(query, key, value),
    }


def _bits(result: Any) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [x.clone() for x in parts if isinstance(x, torch.Tensor)]


def _is_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def threads(seed: int, seconds: float) -> Problem:
    """Eight threads call everything in any order, while the settings are read anew."""
    calls = _calls()
    expected = {name: _bits(call()) for name, call in calls.items()}
    problems: list[str] = []
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        order = random.Random(seed * 100 + number)
        while time.monotonic() < end and not problems:
            name = order.choice(list(calls))
            try:
                if not _is_same(expected[name], _bits(calls[name]())):
                    problems.append(f"{name}: other bits in a thread")
                if order.random() < 0.02:
                    config.refresh()
            except Exception as error:  # noqa: BLE001 - anything is wrong here
                problems.append(f"{name}: {type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(seconds + LIMIT)
        if worker.is_alive():
            return "a thread hangs"
    return problems[0] if problems else None


def forks(seed: int, count: int) -> Problem:
    """Children that are forked after a call, and while other threads are in the middle of one."""
    calls = _calls()
    expected = {name: _bits(call()) for name, call in calls.items()}
    order, is_over = random.Random(seed), threading.Event()

    def keep_calling() -> None:
        while not is_over.is_set():
            config.refresh()  # plans and log lines are made anew, under their locks
            for call in calls.values():
                call()

    def call_all() -> Problem:
        for name in order.sample(list(calls), len(calls)):
            if not _is_same(expected[name], _bits(calls[name]())):
                return f"{name}: other bits in a child"
        return None

    workers = [threading.Thread(target=keep_calling, daemon=True) for _ in range(3)]
    try:
        for number in range(count):
            if number == count // 3:
                for worker in workers:
                    worker.start()
            problem = in_child(call_all)
            if problem is not None:
                return (
                    f"fork {number}{' beside threads' if number >= count // 3 else ''}: {problem}"
                )
    finally:
        is_over.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join(LIMIT)
    return None


class _Interrupted(Exception):
    """What a program of somebody's raises in its signal handler."""


KINDS: tuple[type[BaseException], ...] = (
    *(TimeoutError, RuntimeError, ValueError, OSError, AssertionError, KeyError),
    *(KeyboardInterrupt, _Interrupted, SystemExit),
)


def signals(seed: int, seconds: float, kind: type[BaseException]) -> Problem:
    """A handler that raises in the middle of a call: the exception arrives, and the next calls go
    where they went before."""
    order, calls = random.Random(seed), _calls()
    config.refresh()
    expected = {name: _bits(call()) for name, call in calls.items()}
    raised = 0

    def handler(number: int, frame: Any) -> None:
        nonlocal raised
        if "unraisable" in frame.f_code.co_name or frame.f_code.co_name == "__del__":
            signal.setitimer(signal.ITIMER_REAL, 1e-4)  # nobody could get it there
            return
        raised += 1
        raise kind("the time is over")

    collects = gc.isenabled()
    gc.disable()  # what is raised within a callback of the collector arrives nowhere either
    before = signal.signal(signal.SIGALRM, handler)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            name, seen = order.choice(list(calls)), raised
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, order.uniform(1e-6, 4e-4))
                    calls[name]()
                    calls[name]()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except kind as error:
                if raised == seen:
                    return f"{name}: {error}"
            else:
                if raised > seen:
                    return f"{name}: a {kind.__name__} of a signal handler is swallowed"
            if not _is_same(expected[name], _bits(calls[name]())):
                return f"{name}: other bits for good after a {kind.__name__} of a signal handler"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if collects:
            gc.enable()
        config.refresh()
    return None


def campaign(seed: int, seconds: float) -> Iterator[tuple[str, Problem]]:
    """All of it; `seconds` in all, shared out."""
    for kind in KINDS:
        yield f"signals: {kind.__name__}", signals(seed, seconds / 4 / len(KINDS), kind)
    for name in CACHES:
        with tempfile.TemporaryDirectory() as folder:
            yield f"cache: {name}", cache_fault(name, Path(folder))
    yield "threads", threads(seed, seconds / 4)
    yield "forks", forks(seed, max(6, int(seconds)))


def main(arguments: list[str]) -> int:
    seed = int(arguments[0]) if arguments else 1
    count = Count()
    for name, problem in campaign(seed, float(arguments[1]) if len(arguments) > 1 else 20):
        print(f"{name}: {problem or 'right'}", flush=True)
        count.calls += 1
        count.crashes += problem is not None and "the process ended" in problem
        count.wrong += problem is not None and "the process ended" not in problem
    return count.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
