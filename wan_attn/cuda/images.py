# SPDX-License-Identifier: Apache-2.0
"""images.py - the machine code of a CUDA kernel for one GPU: shipped, cached, or compiled now.

    1. shipped   the package brings it, made when it was built
    2. cached    it was compiled on this machine before
    3. NVRTC     it is compiled now, once, and kept

A ready cubin is a filled cache: the same files, named by everything that went into them.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wan_attn import config, log
from wan_attn.cuda import nvrtc, store
from wan_attn.cuda.rows import Job, RowError, jobs_for, serving
from wan_attn.transient import is_transient
from wan_attn.version import REINSTALL

SHIPPED_FOLDER = Path(__file__).with_name("cubin")

# What has been compiled in this process, and what could not be: neither is tried twice.
_made: dict[Job, Image] = {}
_failed: dict[Job, str] = {}
_lock = threading.Lock()


class ImageError(RuntimeError):
    """There is no machine code for a kernel on this GPU; says why and what to do."""


@dataclass(frozen=True)
class Image:
    """A cubin, and where it came from."""

    data: bytes
    origin: str  # "shipped", "cached" or "NVRTC 12.8"
    seconds: float  # that it took
    not_kept: str = ""  # why a later process will have to compile it again


def image(kernel: str, arch: int) -> bytes:
    """The cubin of a row or helper (named as in sdpa_rows.def) for compute capability arch / 10.

    Raises:
        ImageError: there is none and none can be made.
    """
    return images([kernel], arch)[kernel].data


def images(kernels: Sequence[str], arch: int, force: bool = False) -> dict[str, Image]:
    """Returns several cubins. One log line announces what has to be compiled.

    Args:
        force: compile what is not shipped, and replace what is cached.

    Raises:
        ImageError: one of them is nowhere and cannot be made.
    """
    jobs = {job.name: job for job in _jobs(kernels, arch)}
    look = _shipped if force else _ready
    found = {name: ready for name, job in jobs.items() if (ready := look(job)) is not None}
    if len(found) < len(jobs):
        with _lock:
            # Another thread may have made some meanwhile.
            missing = {n: j for n, j in jobs.items() if n not in found}
            _announce([j for j in missing.values() if force or j not in _made])
            found |= {
                n: _make(j) if force else _made.get(j) or _make(j) for n, j in missing.items()
            }
    return {name: found[name] for name in jobs}


def state(kernel: str, arch: int) -> str:
    """Says where a cubin would come from: "shipped", "cached" or "to compile".

    Raises:
        ImageError: nothing of that name runs there.
    """
    (job,) = _jobs([kernel], arch)
    ready = _ready(job)
    return "to compile" if ready is None else "cached" if job in _made else ready.origin


def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None: this user has no place for it."""
    base = config.cache_folder()
    return None if base is None else base / "cubin"


def forget() -> None:
    """Forgets what was found, so that the next call looks again."""
    with _lock:
        _made.clear()
        _failed.clear()
    nvrtc.found.cache_clear()
    nvrtc.load.cache_clear()


def _jobs(kernels: Sequence[str], arch: int) -> tuple[Job, ...]:
    try:
        jobs = jobs_for(arch, kernels)
        for job in jobs:
            job.texts()
        return jobs
    except RowError as error:
        raise ImageError(str(error)) from error
    except OSError as error:
        if is_transient(error):
            raise
        raise ImageError(
            f"the package is damaged: the text of its kernels is missing ({error}); {REINSTALL}"
        ) from error


def _ready(job: Job) -> Image | None:
    """Returns the image if no compiler is needed."""
    if job in _made:
        return _made[job]
    if (shipped := _shipped(job)) is not None:
        return shipped
    start = time.perf_counter()
    folder = cache_folder()
    if folder is not None and _may_look(folder) and _trusted(folder):
        for name in _cached_names(job, folder):
            if (data := _read(folder, name)) is not None:
                return Image(data, "cached", time.perf_counter() - start)
    return None


def _shipped(job: Job) -> Image | None:
    start = time.perf_counter()
    for other in serving(job):
        if (data := _read(SHIPPED_FOLDER, other.stem)) is not None:
            return Image(data, "shipped", time.perf_counter() - start)
    return None


def _cached_names(job: Job, folder: Path) -> list[str]:
    """Returns its possible names in the cache: of the compilers here; without one, of any."""
    versions = []
    for found in nvrtc.found():
        try:
            versions.append(found.version or nvrtc.load(found).version)
        except nvrtc.NvrtcError as error:
            log.LOGGER.debug("%s %s", log.PREFIX, error)
    if versions:
        return [job.made_by(version) for version in dict.fromkeys(versions)]
    return [name for name in store.names(folder) if name.startswith(f"{job.stem}-nvrtc")]


def _read(folder: Path, name: str) -> bytes | None:
    try:
        return store.read(folder, name)
    except OSError as error:
        if is_transient(error):
            raise
        _warn(("damaged", folder, name), f"{error}: not used")
        return None


def _may_look(folder: Path) -> bool:
    """Whether it is there; one that we are kept from is left out, which one line says."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if is_transient(error):
            raise
        why = f"{error}; WAN_ATTN_CACHE_DIR names another folder"
        _warn(("not kept", folder), f"the cache of CUDA kernels is not used: {why}")
        return False
    return True


def _trusted(folder: Path) -> bool:
    if why := store.problem(folder):
        _warn(("not trusted", folder), f"the cache of CUDA kernels is not used: {why}")
    return not why


def _warn(key: object, text: str) -> None:
    log.once(("cuda image", key), logging.WARNING, text)


def _announce(jobs: Sequence[Job]) -> None:
    jobs = [job for job in jobs if job not in _failed]
    if jobs and nvrtc.found():
        names = ", ".join(job.name for job in jobs)
        count = f"{len(jobs)} kernel{'s' if len(jobs) > 1 else ''}"
        log.LOGGER.info(
            "%s compiling %s for %s, once: %s", log.PREFIX, count, jobs[0].target, names
        )


def _make(job: Job) -> Image:
    if job in _failed:
        raise ImageError(_failed[job])
    start = time.perf_counter()
    reasons: list[nvrtc.NvrtcError] = []
    for found in nvrtc.found():
        try:
            compiler = nvrtc.load(found)
            data = compiler.compile(job.arch, job.texts(), job.options())
        except nvrtc.NvrtcError as error:
            reasons.append(error)
            continue
        origin = f"NVRTC {nvrtc.version_name(compiler.version)}"
        seconds = time.perf_counter() - start
        _made[job] = Image(data, origin, seconds, _keep(job, compiler.version, data))
        return _made[job]
    why = "; ".join(map(str, reasons)) or nvrtc.not_found()
    if reasons and all(isinstance(reason, nvrtc.UnknownArch) for reason in reasons):
        why += "; a newer torch brings a newer NVRTC"
    why = (
        f"{job.name} for {job.target}: the package has no ready machine code for this GPU and"
        f" it cannot be compiled: {why}"
    )
    if not any(map(is_transient, reasons)):
        _failed[job] = why
    raise ImageError(why)


def _keep(job: Job, version: tuple[int, int], data: bytes) -> str:
    """Puts the image into the cache; returns "" or why it could not."""
    folder = cache_folder()
    if folder is None:
        why = "this user has no home directory"
    else:
        try:
            store.make_private(folder)
            store.write(folder, job.made_by(version), data)
            return ""
        except OSError as error:
            if is_transient(error):
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = f"{folder} is full" if full else str(error)
    why += "; WAN_ATTN_CACHE_DIR names another folder"
    _warn(("not kept", folder), f"compiled CUDA kernels are not kept for the next start: {why}")
    return why
