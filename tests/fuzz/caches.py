# SPDX-License-Identifier: Apache-2.0
"""caches.py - faults of the folder where compiled kernels are kept: one that cannot be used, files
that are damaged or replaced, while they are read, too.

Each is tried in a child with a time limit: what hangs is wrong, too.
"""

from __future__ import annotations

import logging
import os
import resource
import select
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from test_cuda_images import MERGE, ROW, Machine
from wan_attn import config
from wan_attn.cuda import images, store

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
    _open_to_all(machine)
    _become_nobody()


def _open_to_all(machine: Machine) -> None:
    """Every user may go down to the cache, whoever made its folders."""
    for folder in (machine.home, *machine.home.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
        if folder == Path(tempfile.gettempdir()):
            break


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


def _of_another_kernel(machine: Machine) -> None:
    """Whole, with the right checksum for its own name."""
    machine.get()
    machine.get(MERGE)
    shutil.copy2(machine.file(MERGE), machine.file())


def _replaced_meanwhile(machine: Machine) -> None:
    """Somebody puts damaged files and good ones there, all the time."""
    machine.get()
    good = machine.file().read_bytes()

    def replace() -> None:
        for number in range(1 << 30):
            new = machine.cache / ".replaced"
            new.write_bytes(good if number % 2 else good[: number % len(good)])
            new.replace(machine.file())

    threading.Thread(target=replace, daemon=True).start()


def _removed_meanwhile(machine: Machine) -> None:
    def remove() -> None:
        while True:
            shutil.rmtree(machine.home, ignore_errors=True)

    machine.get()
    threading.Thread(target=remove, daemon=True).start()


def _read_only(machine: Machine) -> None:
    """Of this user, who may look and not write."""
    machine.cache.mkdir(parents=True)
    os.chown(machine.cache, NOBODY, NOBODY)
    machine.cache.chmod(0o500)
    _open_to_all(machine)
    _become_nobody()


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
    "another kernel's file": _of_another_kernel,
    "a file that is replaced all the time": _replaced_meanwhile,
    "a folder that is removed all the time": _removed_meanwhile,
    "a folder that cannot be written to": _read_only,
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
    images.state(ROW, 89)
    made = machine.get()
    if not made.data.startswith(b"(12, 8)") or ROW.encode() not in made.data:
        return f"wrong machine code: {made.data!r}"
    machine.restart()
    again = machine.get()
    if again.data != made.data or expected is not machine.compilers:
        return "the second start gets other machine code"
    config.cache_folder()
    place = images.cache_folder()
    if place is not None:
        store.names(place)
        store.problem(place)
    return None


def cache_fault(name: str, folder: Path) -> Problem:
    """One fault of CACHES, in this empty folder."""
    return in_child(lambda: _use_cache(CACHES[name], folder))
