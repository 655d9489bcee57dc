# SPDX-License-Identifier: Apache-2.0
"""book.py - what was measured on this machine: in memory, and in one file for each kind of call.

A file belongs to a card or CPU, its driver, torch, our version and our kernels: its name is a hash
of them and of the kind. The first writer's file stays, so that two processes that measure at the
same time choose alike, and what is kept is never measured again unless the user asks for it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wan_attn import config, log
from wan_attn.store import record
from wan_attn.store.folder import StoreError
from wan_attn.transient import is_transient
from wan_attn.tuning.candidates import Candidate, version
from wan_attn.tuning.kinds import Kind

SCHEMA = 1
FOLDER = "tuning"
LEAD = 0.03  # by how much another candidate must be faster to go before those of today's order


@dataclass(frozen=True)
class Entry:
    """One measurement, as its file holds it.

    Attributes:
        kind: Kind.text. machine: see kinds.machine.
        times: by a candidate's name, the median milliseconds of the slice.
        least: likewise, of the fastest round.
        left_out: by its name, why a candidate was not timed.
        versions: by backend, of the library that was measured.
        is_whole: False where the time was over before all were tried: today's order stays.
        slice: what was measured, in words.
        date: when, as 2026-11-29T12:00Z.
        seconds: what it took.
    """

    kind: str
    machine: dict[str, str]
    times: dict[str, float]
    least: dict[str, float]
    left_out: dict[str, str]
    versions: dict[str, str]
    is_whole: bool
    slice: str
    date: str
    seconds: float

    def knows(self, candidate: Candidate) -> bool:
        """Whether this very candidate was tried: not one that was installed, or renewed, since."""
        if candidate.name not in self.times and candidate.name not in self.left_out:
            return False
        return self.versions.get(candidate.backend, "") == version(candidate.backend)

    def best(self, candidates: tuple[Candidate, ...]) -> Candidate | None:
        """The first in today's order that no other is faster than; None: today's order.

        Args:
            candidates: those that may run now, in today's order.
        """
        timed = [one for one in candidates if one.name in self.times]
        if not self.is_whole or not timed:
            return None
        return next(one for one in timed if not any(self._is_faster(other, one) for other in timed))

    def _is_faster(self, other: Candidate, one: Candidate) -> bool:
        """By LEAD, and both in the median and in the fastest round: where other programs compute as
        well, either of them alone is often a matter of luck."""
        return all(
            found[other.name] <= found[one.name] * (1 - LEAD) for found in (self.times, self.least)
        )


_entries: dict[Kind, Entry | None] = {}
_lock = threading.Lock()
_ENTRIES_MAX = 4096
_settings: tuple[str, str | None] | None = None


def forget() -> None:
    """Read the files again, as a new process would."""
    with _lock:
        _entries.clear()


def _obey(settings: config.Settings) -> None:
    global _settings
    now = (settings.tune, settings.cache_dir)
    if now != _settings:
        _settings = now
        forget()


config.memory(forget)
config.follow(_obey)


def folder() -> Path | None:
    """Where the files are; None: this user has no place for them."""
    cache = config.cache_folder()
    return None if cache is None else cache / FOLDER


def name_of(kind: Kind, machine: dict[str, str]) -> str:
    """The name of a file."""
    text = json.dumps([kind.text, machine], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def look_up(kind: Kind, machine: dict[str, str]) -> Entry | None:
    """What is known of a kind; None: nothing, or nothing of this process's own under
    WAN_ATTN_TUNE=again."""
    with _lock:
        if kind in _entries:
            return _entries[kind]
    entry = None if config.current().tune == "again" else _read(kind, machine)
    with _lock:
        if len(_entries) >= _ENTRIES_MAX:
            _entries.clear()
        return _entries.setdefault(kind, entry)


def _read(kind: Kind, machine: dict[str, str]) -> Entry | None:
    place = folder()
    if place is None:
        return None
    try:
        found = record.read(place, name_of(kind, machine), SCHEMA)
        return None if found is None else _entry(found, kind, machine)
    except OSError as error:
        if is_transient(error):
            raise
        _tell(str(error))
    return None


def _tell(problem: str) -> None:
    log.once(("tuning", problem), logging.WARNING, f"measurements are ignored: {problem}")


def _entry(found: dict[str, Any], kind: Kind, machine: dict[str, str]) -> Entry:
    """The entry in a file.

    Raises:
        StoreError: it has not this form, or is of another machine or kind.
    """
    values = {name: found.get(name) for name in Entry.__dataclass_fields__}
    times, least = values["times"], values["least"]
    is_whole, seconds = values["is_whole"], values["seconds"]
    is_well_formed = (
        all(_is_text(values[name]) for name in ("left_out", "versions", "machine"))
        and all(isinstance(values[name], str) for name in ("kind", "slice", "date"))
        and isinstance(times, dict)
        and isinstance(least, dict)
        and set(times) == set(least)
        and all(_is_positive(time) for time in (*times.values(), *least.values()))
        and isinstance(is_whole, bool)
        and _is_positive(seconds)
    )
    if not is_well_formed:
        raise StoreError(f"a file in {folder()} is damaged: {name_of(kind, machine)}")
    if values["kind"] != kind.text or values["machine"] != machine:
        raise StoreError(f"a file in {folder()} is another machine's: {name_of(kind, machine)}")
    return Entry(**values)  # type: ignore[arg-type]  # checked above


def _is_text(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and value > 0


def keep(kind: Kind, entry: Entry, *, replaces: bool, is_lasting: bool = True) -> Entry:
    """Keeps a measurement, in memory where it cannot be written; returns the one that holds now.

    Args:
        replaces: what stands there: it is out of date, or the user asked for a new one.
        is_lasting: another process would find the same; else it is this one's alone.
    """
    place = folder() if is_lasting else None
    if place is not None:
        name = name_of(kind, entry.machine)
        try:
            entry = _write(place, name, kind, entry, replaces)
        except OSError as error:
            if is_transient(error):
                raise
            problem = f"measurements are not kept: {error}"
            log.once(("tuning", problem), logging.WARNING, problem)
    with _lock:
        _entries[kind] = entry
    return entry


def _write(place: Path, name: str, kind: Kind, entry: Entry, replaces: bool) -> Entry:
    values = {"schema": SCHEMA, **asdict(entry)}
    if record.write(place, name, values, replaces=replaces):
        return entry
    first = _read(kind, entry.machine)  # another process was faster
    if first is None:  # what stands there is no measurement
        record.write(place, name, values, replaces=True)
    return first or entry


def today() -> str:
    """Now, as an entry has it."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
