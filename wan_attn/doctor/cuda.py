# SPDX-License-Identifier: Apache-2.0
"""cuda.py - which CUDA kernels are ready, what compiles the others, where those are kept.

Loads no compiler and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from wan_attn.cuda import images, nvrtc, rows, store


def facts(archs: Iterable[int]) -> dict[str, Any]:
    """Plain values; `archs` are the compute capabilities (86) of this machine's GPUs."""
    folder = images.cache_folder()
    cached = {} if folder is None else store.names(folder)
    here = store.names(images.SHIPPED_FOLDER)
    known = (*rows.SHIPPED, *rows.SHIPPED_FOR_BOARDS)
    shipped = [a for a in known if all(job.stem in here for job in rows.jobs_for(a))]
    return {
        "shipped": shipped,
        "also": [a for a in rows.gpus() if a not in shipped and _has_code(a, shipped)],
        "stale": bool(here) and not shipped,
        "nvrtc": [_short(found) for found in nvrtc.found()],
        "nvrtc_problem": "" if nvrtc.found() else nvrtc.not_found(),
        "cache": None if folder is None else str(folder),
        "cached": len(cached),
        "cached_bytes": sum(cached.values()),
        "cache_problem": store.problem(folder)
        if folder is not None and store.is_there(folder)
        else "",
        "gpus": {f"sm_{arch}": _states(arch) for arch in archs},
    }


def _short(found: nvrtc.Found) -> str:
    """Its version and its folder, without the long way to Python's packages."""
    number = "of unknown version" if found.version is None else nvrtc.version_name(found.version)
    _, _, inside = found.path.parent.as_posix().rpartition("-packages/")
    return f"NVRTC {number} ({inside})"


def _has_code(arch: int, shipped: list[int]) -> bool:
    """Whether machine code that was made for others serves this architecture, too."""
    return all(
        any(job.arch in shipped for job in rows.serving(wanted)) for wanted in rows.jobs_for(arch)
    )


def _states(arch: int) -> dict[str, int]:
    try:
        return dict(Counter(images.state(job.name, arch) for job in rows.jobs_for(arch)))
    except rows.RowError:
        return {}
