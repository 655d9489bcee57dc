# SPDX-License-Identifier: Apache-2.0
"""surroundings.py - faults that are not in the call: a cache that cannot be used, threads, forks
and signals in the middle of calls.

    python tests/fuzz/surroundings.py [SEED [SECONDS]]      prints a line for each

Each fault of the cache is tried in a child with a time limit: what hangs is wrong, too.
"""

from __future__ import annotations

import logging
import os
import random
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import wan_attn
from test_cuda_images import Machine
from wan_attn import config
from wan_attn.cuda import images

LIMIT = 20  # seconds for a child
NOBODY = 65534

Problem = str | None


def in_child(work: Callable[[], Problem]) -> Problem:
    """Runs `work` in a fork: what it says is wrong, how it died, or that it hangs; or None."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                found = work()
            except BaseException as error:  # noqa: BLE001 - a child must not return
                where = traceback.extract_tb(error.__traceback__)[-1]
                found = (
                    f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
                )
            os.write(writer, (found or "").encode("utf-8", "replace")[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        is_over = bool(select.select([pipe], [], [], LIMIT)[0])
        if not is_over:
            os.kill(child, signal.SIGKILL)
        said = pipe.read().decode()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not is_over:
        return f"it hangs (more than {LIMIT} s)"
    return said or (f"the process ended with {ended}" if ended else None)


# --- the cache of compiled kernels ----------------------------------------------------------------


def _folder(name: str) -> Callable[[Machine], None]:
    def prepare(machine: Machine) -> None:
        machine.patch.setenv("WAN_ATTN_CACHE_DIR", name.format(home=machine.home))

    return prepare


def _loop(machine: Machine) -> None:
    machine.home.symlink_to(machine.home)


def _dangling(machine: Machine) -> None:
    machine.home.symlink_to(machine.home.with_name("nowhere"))


def _file_for_home(machine: Machine) -> None:
    machine.home.write_text("a file")


def _of_root(machine: Machine) -> None:
    """A home that this user may not even look into, as in containers that keep root's HOME."""
    machine.get()
    machine.home.chmod(0o700)
    _become_nobody()


def _unreadable_file(machine: Machine) -> None:
    machine.get()
    machine.file().chmod(0)
    os.chown(machine.cache, NOBODY, NOBODY)
    for folder in (machine.home, *machine.home.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
        if folder == Path(tempfile.gettempdir()):
            break
    _become_nobody()


def _become_nobody() -> None:
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _in_place_of_the_file(make: Callable[[Path], Any]) -> Callable[[Machine], None]:
    def prepare(machine: Machine) -> None:
        machine.get()
        machine.file().unlink()
        make(machine.file())

    return prepare


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Machine], None]:
    def prepare(machine: Machine) -> None:
        machine.get()
        machine.file().write_bytes(change(machine.file().read_bytes()))

    return prepare


def _enormous(file: Path) -> None:
    with file.open("wb") as made:
        made.truncate(1 << 40)


def _no_files_left(machine: Machine) -> None:
    del machine
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), 4096))


def _full(machine: Machine) -> None:
    del machine
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))


CACHES: dict[str, Callable[[Machine], None]] = {
    "a name of 5,000 characters": _folder("{home}/" + "x" * 5000),
    "a name of 300 characters": _folder("{home}/" + "x" * 300),
    "a path of 4,500 characters": _folder("{home}" + "/x" * 2250),
    "not UTF-8": _folder("{home}/\udcff"),
    "a relative name": _folder("cache"),
    "below a device": _folder("/dev/null/cache"),
    "below /proc": _folder("/proc/self/cache"),
    "a device": _folder("/dev/null"),
    "a link to itself": _loop,
    "a link to nothing": _dangling,
    "a file": _file_for_home,
    "the home of another user": _of_root,
    "a file that cannot be read": _unreadable_file,
    "a folder for a file": _in_place_of_the_file(Path.mkdir),
    "a pipe for a file": _in_place_of_the_file(os.mkfifo),
    "a link to itself for a file": _in_place_of_the_file(lambda f: f.symlink_to(f)),
    "a link to nothing for a file": _in_place_of_the_file(lambda f: f.symlink_to("nothing")),
    "a file of a terabyte": _in_place_of_the_file(_enormous),
    "an empty file": _bytes(lambda text: b""),
    "a file cut off": _bytes(lambda text: text[:-7]),
    "a file of its checksum alone": _bytes(lambda text: text[-32:]),
    "a flipped bit": _bytes(lambda text: bytes([text[0] ^ 1]) + text[1:]),
    "a longer file": _bytes(lambda text: text + b"\0"),
    "no file handle left": _no_files_left,
    "a full disk": _full,
}


def _use_cache(prepare: Callable[[Machine], None], folder: Path) -> Problem:
    """The right machine code all the same, and every question about the cache is answered."""
    patch = pytest.MonkeyPatch()
    machine = Machine(patch, folder)
    os.chdir(folder)
    logging.getLogger("wan_attn").setLevel(logging.CRITICAL)
    expected = machine.compilers
    prepare(machine)
    machine.restart()
    images.state("sdpa_sm80_bf16_d128", 89)
    made = machine.get()
    if not made.data.startswith(b"(12, 8)"):
        return f"wrong machine code: {made.data!r}"
    machine.restart()
    again = machine.get()
    if again.data != made.data or expected is not machine.compilers:
        return "the second start gets other machine code"
    config.cache_folder()
    from wan_attn.cuda import store

    place = images.cache_folder()
    if place is not None:
        store.names(place)
        store.problem(place)
    return None


def cache_fault(name: str, folder: Path) -> Problem:
    """One fault of CACHES, in this empty folder."""
    return in_child(lambda: _use_cache(CACHES[name], folder))


# --- threads, forks, signals ----------------------------------------------------------------------


def _calls() -> dict[str, Callable[[], Any]]:
    """Every public function, with fixed inputs: the same bits whoever calls it, and when."""
    generator = torch.Generator().manual_seed(11)
    query, key, value = (torch.randn(2, n, 2, 32, generator=generator) for n in (9, 21, 21))
    lens = [17, 21]
    lists = (torch.tensor([0, 8, 18]), torch.tensor([0, 21, 42]), 10, 21)
    packed = [x.flatten(0, 1) for x in (query, key, value)]
    half = [x.to(torch.bfloat16) for x in (query, key, value)]
    lse = torch.randn(2, 2, 9, generator=generator)
    return {
        "sdpa": lambda: wan_attn.sdpa(query, key, value, k_lens=lens, return_lse=True),
        "flash_attention": lambda: wan_attn.flash_attention(query, key, value, causal=True),
        "bfloat16": lambda: wan_attn.sdpa(*half, window=(4, 2)),
        "varlen": lambda: wan_attn.flash_attn_varlen_func(*packed, *lists),
        "sageattn": lambda: wan_attn.sageattn(query, key, value, "NHD", is_causal=True),
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
    wrong = 0
    for name, problem in campaign(seed, float(arguments[1]) if len(arguments) > 1 else 20):
        print(f"{name}: {problem or 'right'}", flush=True)
        wrong += problem is not None
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
