# SPDX-License-Identifier: Apache-2.0
"""record.py - small JSON objects in a private folder, one file each: the first writer's stays.

What two processes found out at the same time may differ. One file for each record, which gets its
name in one step, makes them agree without a lock: who comes second reads what the first has kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wan_attn.store import folder as files
from wan_attn.store.folder import StoreError

SUFFIX = ".json"
BYTES_MAX = 1 << 18  # no record is larger by far

Record = dict[str, Any]


def read(folder: Path, name: str, schema: int) -> Record | None:
    """Returns the record of this name; None if there is none.

    Raises:
        StoreError: the folder or the file must not be trusted: it may belong to another user, be
            damaged, or be of another schema. OSError: it cannot be read.
    """
    path = folder / f"{name}{SUFFIX}"
    if not files.is_there(path):
        return None
    if why := files.problem(folder):
        raise StoreError(why)
    try:
        text = files.contents(path, BYTES_MAX)
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({error})") from None
    if not isinstance(found, dict) or found.get("schema") != schema:
        raise StoreError(f"{path} is not of schema {schema}")
    return found


def write(folder: Path, name: str, record: Record, *, replaces: bool = False) -> bool:
    """Keeps the record, which names its schema; creates the folder.

    Returns:
        False where another process was first: its record stays.

    Raises:
        StoreError: the folder must not be trusted. OSError: it cannot be written to, or is full.
    """
    files.make_private(folder)
    data = json.dumps(record, indent=1, allow_nan=False).encode() + b"\n"
    return files.write(folder / f"{name}{SUFFIX}", data, replaces=replaces)
