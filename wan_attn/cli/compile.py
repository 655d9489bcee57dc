# SPDX-License-Identifier: Apache-2.0
"""compile.py - `wan-attn compile`: makes the CUDA kernels of a GPU before they are first needed.

What is made goes into the cache that every later process reads; the GPU need not be in this
machine, nor any GPU.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias

from wan_attn import console
from wan_attn.cli import FINE, WRONG, refuse
from wan_attn.cuda import images, rows
from wan_attn.doctor.facts import cuda_devices

Line: TypeAlias = tuple[str, str, str, str, str]
HEAD: Line = ("row", "arch", "seconds", "bytes", "from")

CARDS = (
    "RTX 20 and T4: 75; A100: 80; RTX 30: 86; RTX 40 and L4: 89; H100 and H200: 90; B200: 100; "
    "RTX 50: 120"
)


class CannotCompile(Exception):
    """The arguments name nothing to compile; says why and what to name."""


def architecture(text: str) -> int:
    """Reads 86, 8.6 or sm_86 as 86."""
    match = re.fullmatch(r"(?:sm_)?(\d{2,3})|(\d{1,2})\.(\d)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"must be a compute capability, as 86, 8.6 or sm_86, got {text!r}"
        )
    return int(match[1] or match[2] + match[3])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `compile`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--arch",
        nargs="+",
        type=architecture,
        metavar="N",
        help=f"GPUs by compute capability, default: those of this machine ({CARDS})",
    )
    which.add_argument("--all", action="store_true", help="all GPUs that our kernels support")
    parser.add_argument("--row", nargs="+", metavar="NAME", help="only these kernels")
    parser.add_argument(
        "--force",
        action="store_true",
        help="compile cached kernels again; ready kernels of the package stay as they are",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="show what is ready, compile nothing; a line for each GPU, with --row for each kernel",
    )
    parser.epilog = (
        "Exit code: 0 every kernel is ready; 1 one cannot be compiled or the cache cannot be"
        " written; 2 nothing to do. WAN_ATTN_CACHE_DIR names another cache."
    )


def main(args: argparse.Namespace) -> int:
    """Print what is ready and what was made; 0, 1 or 2."""
    try:
        jobs = chosen(args)
    except CannotCompile as error:
        return refuse("compile", error)
    failures: list[str] = []
    if args.list and not args.row:
        for text in _summaries(jobs, failures):
            console.emit(text)
    else:
        width = max(len(job.name) for job in jobs)
        console.emit(_line(HEAD, width))
        for line in _states(jobs, failures) if args.list else _compiled(jobs, args.force, failures):
            console.emit(_line(line, width))
    where = images.cache_folder()
    console.emit(f"\ncache: {where or 'none, this user has no home directory'}")
    for failure in dict.fromkeys(failures):
        console.emit("\n" + console.wrap(failure, "", "  "))
    return WRONG if failures else FINE


def chosen(args: argparse.Namespace) -> list[rows.Job]:
    """Returns what the arguments name, architecture by architecture.

    Raises:
        CannotCompile: nothing.
    """
    archs = sorted(rows.gpus()) if args.all else args.arch or _devices()
    if not archs and args.list:
        archs = sorted(rows.gpus())
    if not archs:
        raise CannotCompile(
            f"no CUDA device here ({cuda_devices()[1]}): name the GPUs, as in --arch 86 89, or all"
            f" with --all. {CARDS}"
        )
    jobs: list[rows.Job] = []
    refusals: list[str] = []
    for arch in dict.fromkeys(archs):
        for name in args.row or [None]:
            try:
                jobs += rows.jobs_for(arch, None if name is None else [name])
            except rows.RowError as error:
                refusals.append(str(error))
    # A row that some of the GPUs have no tile for is not an error, unless none of them has.
    named = {job.name for job in jobs}
    if not jobs or (args.row and set(args.row) - named):
        raise CannotCompile("; ".join(dict.fromkeys(refusals)))
    return jobs


def _devices() -> list[int]:
    found, _ = cuda_devices()
    return sorted({10 * gpu.capability[0] + gpu.capability[1] for gpu in found})


def _states(jobs: list[rows.Job], failures: list[str]) -> Iterator[Line]:
    for job in jobs:
        try:
            where = images.state(job.name, job.arch)
        except images.ImageError as error:
            failures.append(str(error))
            where = "FAILED, see below"
        yield job.name, job.target, "", "", where


def _summaries(jobs: list[rows.Job], failures: list[str]) -> Iterator[str]:
    """One line for each architecture: how many of its kernels are in which state."""
    for arch in dict.fromkeys(job.arch for job in jobs):
        states = Counter(line[4] for line in _states([j for j in jobs if j.arch == arch], failures))
        yield f"sm_{arch:<5}" + ", ".join(f"{n:>2} {state}" for state, n in states.items())


def _compiled(jobs: list[rows.Job], force: bool, failures: list[str]) -> Iterator[Line]:
    """One line for each, as soon as it is ready: that is the progress."""
    for job in jobs:
        name = job.name
        try:
            made = images.images([name], job.arch, force)[name]
        except images.ImageError as error:
            failures.append(str(error))
            yield name, job.target, "", "", "FAILED, see below"
            continue
        if made.not_kept:
            failures.append(f"compiled, but not saved: {made.not_kept}")
        yield name, job.target, f"{made.seconds:.3f}", str(len(made.data)), made.origin


def _line(cells: Line, width: int) -> str:
    row, arch, seconds, size, origin = cells
    return f"{row:<{width}}  {arch:<7}{seconds:>8}{size:>8}  {origin}".rstrip()
