# SPDX-License-Identifier: Apache-2.0
"""ship.py - makes the cubins that travel in the package. setup.py starts this file by its path:

    python wan_attn/cuda/ship.py --into DIR --kept DIR [--record FILE] [--editable]
                                 [--cubins auto|0|1] [--site DIR] [--machine NAME]

Needs no torch, no GPU and no toolkit: only an NVRTC 12 from PyPI, whose machine code every driver
from 525 on loads (that of 13 needs 580). Without one nothing is shipped, each kernel is compiled at
its first use, and the record says how to get them. What has been made before is taken from the
folder of --kept.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

if not __package__:  # started by its path: wan_attn without its __init__.py, which wants torch
    _package = ModuleType("wan_attn")
    _package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["wan_attn"] = _package
    # Not this folder, whose names would hide others'; an isolated Python leaves it out by itself.
    _here = os.path.realpath(os.path.dirname(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != _here]

from wan_attn.cuda import nvrtc, rows, sources, store
from wan_attn.cuda.rows import Job

MAJOR = 12
REQUIREMENT = "nvidia-cuda-nvrtc-cu12==12.8.93"
REMEDY = (
    "to get them, install wan_attn without --no-build-isolation, or after"
    f" pip install {REQUIREMENT}"
)


sites: list[str] = []
"""Folders of packages that this Python does not look into by itself; --site."""


class ShipError(RuntimeError):
    """A cubin cannot be made; says which and why."""


def compiler() -> nvrtc.Found | None:
    """The newest NVRTC 12 here, or None."""
    known = [one for one in nvrtc.found() if one.version and one.version[0] == MAJOR]
    return max(known, key=lambda one: one.version or (0, 0), default=None)


def wanted(archs: Sequence[int]) -> list[Job]:
    """Every kernel of these, the longest to compile first."""
    jobs = [job for arch in archs for job in rows.jobs_for(arch)]
    return sorted(jobs, key=lambda job: -len(job.options()))  # helpers have fewer options


def make(jobs: Sequence[Job], kept: Path, workers: int) -> None:
    """Compiles these into the folder `kept`, in as many processes as `workers`.

    Raises:
        ShipError: what the compiler said of the first that failed.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(_feed, waiting, kept) for _ in range(workers)]:
            done.result()


def _feed(waiting: queue.SimpleQueue[Job], kept: Path) -> None:
    """Starts a worker and gives it one job after the other."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--kept", str(kept)]
    command += [f"--site={folder}" for folder in sites]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as worker:
        assert worker.stdin and worker.stdout
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return  # leaving the block closes the pipe, and the worker ends
            print(json.dumps([job.name, job.arch]), file=worker.stdin, flush=True)
            answer = worker.stdout.readline()
            if answer.strip() != '""':
                said = json.loads(answer) if answer else "the compiler's process died"
                raise ShipError(f"{job.name} for {job.target}: {said}")


def work(kept: Path) -> None:
    """A worker: a job a line in, "" or what went wrong a line out."""
    found = compiler()
    for line in sys.stdin:
        row, arch = json.loads(line)
        (job,) = rows.jobs_for(arch, [row])
        said = "NVRTC is gone"
        if found is not None:
            try:
                data = nvrtc.load(found).compile(job.arch, job.texts(), job.options())
                store.write(kept, job.made_by(nvrtc.load(found).version), data)
                said = ""
            except (nvrtc.NvrtcError, OSError) as error:
                said = str(error)
        print(json.dumps(said), flush=True)


def ship(into: Path, kept: Path, workers: int, machine: str = "") -> str:
    """Fills the folder `into` with every cubin for computers of this kind; says what it did.

    Raises:
        ShipError: no NVRTC 12 is here, or it cannot compile one of them.
    """
    start = time.perf_counter()
    found = compiler()
    if found is None or found.version is None:
        raise ShipError(f"no NVRTC {MAJOR}.x here; {REMEDY}")
    kept.mkdir(parents=True, exist_ok=True)
    try:
        known = nvrtc.load(found).archs
    except nvrtc.NvrtcError as error:
        raise ShipError(str(error)) from error
    boards = rows.SHIPPED_FOR_BOARDS if machine == "aarch64" else ()
    archs = [arch for arch in (*rows.SHIPPED, *boards) if arch in known]
    jobs = wanted(archs)
    missing = [job for job in jobs if _kept(kept, job, found.version) is None]
    if missing:
        make(missing, kept, min(workers, len(missing)))
    into.mkdir(parents=True, exist_ok=True)
    size = 0
    for job in jobs:
        data = _kept(kept, job, found.version)
        if data is None:
            raise ShipError(f"{kept} was emptied while it was being filled")
        store.write(into, job.stem, data, mode=0o644)
        size += len(data)
    for name in set(store.names(into)) - {job.stem for job in jobs}:
        store.remove(into, name)
    names = " ".join(f"sm_{arch}" for arch in archs)
    return (
        f"{len(jobs)} CUDA kernels for {names}, {size / 2**20:.1f} MiB ({len(missing)} compiled by"
        f" NVRTC {nvrtc.version_name(found.version)} in {time.perf_counter() - start:.1f} s)"
    )


def _kept(kept: Path, job: Job, version: tuple[int, int]) -> bytes | None:
    try:
        return store.read(kept, job.made_by(version))
    except store.StoreError:
        return None  # damaged: made anew


def copy_texts(into: Path) -> None:
    """The list and every kernel's text, for machines that compile."""
    names = {"cuda/sdpa_rows.def"}
    for kernel in {kernel for arch in rows.gpus() for kernel in rows.kernels_for(arch)}:
        names |= set(sources.closure(kernel.source))
    for name in sorted(names):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sources.root() / name, into / name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 only for --cubins 1, if there are none."""
    parser = argparse.ArgumentParser(description="Make what the package has of CUDA kernels.")
    parser.add_argument("--into", type=Path, help="the package's folder wan_attn/cuda")
    parser.add_argument("--kept", type=Path, required=True, help="what earlier builds have made")
    parser.add_argument("--record", type=Path, help="JSON: how many were made, what was left out")
    parser.add_argument("--editable", action="store_true", help="the texts stay in csrc/")
    parser.add_argument("--site", action="append", default=[], help="another site-packages")
    parser.add_argument(
        "--cubins",
        choices=("auto", "0", "1"),
        default="auto",
        help="machine code: if it can be made, never, or fail without",
    )
    parser.add_argument("--machine", default="", help="platform.machine() of where it will run")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    sites[:] = args.site
    sys.path += sites
    if args.worker:
        work(args.kept)
        return 0
    if args.into is None:
        parser.error("--into is required")
    shutil.rmtree(args.into / "src", ignore_errors=True)
    if not args.editable:
        copy_texts(args.into / "src")
    left_out = []
    try:
        if args.cubins == "0":
            raise ShipError("WAN_ATTN_CUDA=0; to get them, install wan_attn again without it")
        said = ship(args.into / "cubin", args.kept, args.workers, args.machine)
        print(f"wan_attn: {said}", flush=True)
    except (ShipError, OSError) as error:
        # A package that installs beats one that is ready for every card.
        shutil.rmtree(args.into / "cubin", ignore_errors=True)
        left_out = [f"ready CUDA kernels, so that each is compiled at its first use ({error})"]
        print(f"wan_attn: this build leaves out {left_out[0]}", flush=True)
    if args.record is not None:
        cubins = len(store.names(args.into / "cubin"))
        args.record.write_text(json.dumps({"cubins": cubins, "left_out": left_out}))
    return int(args.cubins == "1" and bool(left_out))


if __name__ == "__main__":
    raise SystemExit(main())
