# SPDX-License-Identifier: Apache-2.0
"""verdicts.py - which CUDA kernels have shown on which card that they are right: a file for each
card, driver, torch and build, in the user's cache folder.

Private, replaced whole or not at all, and checked when read. One process at a time makes a proof:
the lock beside the file ends with the process that holds it. The process that runs a kernel for the
first time writes "running" before it does, so that a kernel which ends it, or stops the machine, is
known by the next one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from wan_attn import config, log
from wan_attn.cuda import store
from wan_attn.cuda.rows import RowError, jobs_for
from wan_attn.native import cuda_driver, library
from wan_attn.store.machine import driver_version
from wan_attn.transient import is_transient
from wan_attn.version import __version__

SCHEMA = 1
UNTRIED, RUNNING, PASSED, FAILED = STATES = ("untried", "running", "passed", "failed")


@dataclass(frozen=True)
class Key:
    """What a verdict is about: when one of these changes, it is made anew."""

    card: str
    capability: str
    driver: str
    torch: str
    wan_attn: str
    kernels: str  # a digest of their text, of what compilers are told, and of libwan_attn

    @property
    def digest(self) -> str:
        text = json.dumps(dataclasses.astuple(self))
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass
class Row:
    """What is known of one row of the kernel table for one dtype of value."""

    state: str = UNTRIED
    said: str = ""  # why it failed
    seconds: float = 0.0
    at: int = 0  # seconds since 1970; 0: never


@dataclass
class Verdict:
    """What is known of one card. Names of rows: sdpa_sm80_d128/bf16."""

    key: Key
    rows: dict[str, Row] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # what the proof could not try here

    @property
    def is_complete(self) -> bool:
        return bool(self.rows) and not self.names(UNTRIED, RUNNING)

    def names(self, *states: str) -> list[str]:
        """Names of the rows in one of these states."""
        return [name for name, row in self.rows.items() if row.state in states]

    def put(self, names: list[str], state: str, said: str = "", seconds: float = 0.0) -> None:
        """Says this of the rows, now."""
        for name in names:
            self.rows[name] = Row(state, said, round(seconds, 2), int(time.time()))


def key_of(index: int) -> Key | str:
    """What a verdict for cuda:`index` is kept under, or why there can be none. Makes no context."""
    device = cuda_driver.device(index)
    if isinstance(device, str):
        return device
    try:
        kernels = _kernels(device.arch)
    except (RowError, OSError) as error:
        if is_transient(error):
            raise
        return str(error)
    version = ".".join(map(str, device.driver_version))
    driver = f"{driver_version() or 'driver'} (CUDA {version})"
    capability = f"{device.arch // 10}.{device.arch % 10}"
    return Key(device.name, capability, driver, torch.__version__, __version__, kernels)


@cache
def _kernels(arch: int) -> str:
    digest = hashlib.sha256(library.binary())
    for job in jobs_for(arch):
        digest.update(job.stem.encode() + b"\0")
    return digest.hexdigest()[:20]


def folder() -> Path | None:
    """Where verdicts are kept; None: this user has no place for them."""
    base = config.cache_folder()
    return None if base is None else base / "proof"


def path_of(key: Key) -> Path | None:
    """The file of this key's verdict, which need not exist."""
    place = folder()
    return None if place is None else place / f"{key.digest}.json"


def read(key: Key) -> Verdict | None:
    """The verdict on disk; None if there is none. One line says why a file is not used."""
    path = path_of(key)
    try:
        if path is None or not store.is_there(path):
            return None
        if why := store.problem(path.parent):
            raise store.StoreError(why)
        return _parsed(key, store.contents(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if is_transient(error):
            raise
        text = f"the verdict on the CUDA kernels is not used: {path}: {error}"
        log.once(("verdict", str(path)), logging.WARNING, text)
        return None


def _parsed(key: Key, text: bytes) -> Verdict:
    """The verdict in a file.

    Raises:
        ValueError: it is damaged, of another version, or about something else.
    """
    try:
        found = json.loads(text)
        if found["schema"] != SCHEMA:
            raise ValueError(f"it has schema {found['schema']!r}, this version needs {SCHEMA}")
        if found["key"] != dataclasses.asdict(key):
            raise ValueError("it is about another card, driver, torch or build")
        rows = {name: _row(row) for name, row in found["rows"].items()}
        skipped = [_of(str, what) for what in found["skipped"]]
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error
    return Verdict(key, rows, skipped)


def _row(row: dict[str, Any]) -> Row:
    found = Row(
        _of(str, row["state"]), _of(str, row["said"]), float(row["seconds"]), _of(int, row["at"])
    )
    if found.state not in STATES:
        raise ValueError(f"it is damaged (state {found.state!r})")
    return found


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value


def write(verdict: Verdict) -> None:
    """Replaces the file.

    Raises:
        OSError: there is no place for it, it cannot be written, or others could write there.
    """
    path = path_of(verdict.key)
    if path is None:
        raise OSError("this user has no home directory")
    store.make_private(path.parent)
    data = {
        "schema": SCHEMA,
        "key": dataclasses.asdict(verdict.key),
        "rows": {name: dataclasses.asdict(row) for name, row in verdict.rows.items()},
        "skipped": verdict.skipped,
    }
    text = json.dumps(data, indent=1).encode() + b"\n"
    for left in reversed(range(20)):
        try:
            return store.replace(path, text)
        except PermissionError:  # on Windows somebody is reading it
            if os.name != "nt" or left == 0:
                raise
            time.sleep(0.05)


class Lock:
    """Held by the one process that makes the proof of this key; ends with it."""

    def __init__(self, key: Key) -> None:
        path = path_of(key)
        if path is None:
            raise OSError("this user has no home directory")
        store.make_private(path.parent)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self.handle = os.open(path.with_suffix(".lock"), flags, 0o600)

    def take(self) -> bool:
        """Whether nobody else holds it: then this process does."""
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(self.handle, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def close(self) -> None:
        """Lets it go."""
        os.close(self.handle)
