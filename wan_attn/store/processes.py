# SPDX-License-Identifier: Apache-2.0
"""processes.py - which of several processes this one is, and the file that it writes."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path


def rank() -> int:
    """Of this process among those of torchrun; -1: alone. To be asked while the process group is
    there: Wan2.2's generate.py destroys it before it exits."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return -1
    return int(distributed.get_rank()) if distributed.get_world_size() > 1 else -1


def is_child() -> bool:
    """Whether another Python process has started this one to share its work."""
    return multiprocessing.parent_process() is not None


def file_for(path: Path, rank: int | None) -> Path:
    """This process's own file: FILE.rank1.json, FILE.pid123.json in a child, else FILE.json.

    Args:
        rank: what rank() has said; None: nothing was asked.
    """
    if rank is not None and rank >= 0:
        return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
    if is_child():
        return path.with_name(f"{path.stem}.pid{os.getpid()}{path.suffix}")
    return path
