# SPDX-License-Identifier: Apache-2.0
"""folder.py - a folder of this user alone, and files in it that are written whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from wan_attn.transient import is_transient


class StoreError(OSError):
    """The folder cannot be used, or the file must not be trusted; says why."""


def problem(folder: Path) -> str:
    """Why the contents of `folder` must not be trusted; "" if they may. Changes nothing."""
    try:
        state = folder.lstat()
    except OSError as error:
        if is_transient(error):
            raise
        return str(error)
    if os.name == "nt":
        return ""
    if not stat.S_ISDIR(state.st_mode):
        return f"{folder} must be a folder, not a link to one"
    if state.st_uid != os.geteuid():
        return (
            f"{folder} belongs to another user (uid {state.st_uid}, this process is {os.geteuid()})"
        )
    if state.st_mode & 0o022:
        return f"{folder} can be written to by other users (fix: chmod 700 {folder})"
    return ""


def is_there(folder: Path) -> bool:
    """Whether there is something of that name, or something keeps us from looking."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if is_transient(error):
            raise
        # problem() says what
    return True


def make_private(folder: Path) -> None:
    """Creates `folder` for this user alone.

    Raises:
        StoreError: another user may write to the folder, and its contents will be trusted.
        OSError: it cannot be created.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if why := problem(folder):
        raise StoreError(why)


def contents(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most`; never waits, as opening a FIFO would.

    Raises:
        StoreError: it is no such file. OSError: it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode) or state.st_size > most:
            size = f"{most >> 20} MiB" if most >= 1 << 20 else f"{most >> 10} KiB"
            raise StoreError(f"{path} is no file of at most {size}")
    except BaseException:
        os.close(handle)  # fdopen would not, of a folder
        raise
    with os.fdopen(handle, "rb") as file:
        return file.read(most)


def write(path: Path, data: bytes, mode: int = 0o600, *, replaces: bool = True) -> bool:
    """Writes the file, whole or not at all.

    Args:
        replaces: what stands there; else the first writer's file stays.

    Returns:
        Whether the file holds `data` of this call now: False where another writer was first.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    handle, name = tempfile.mkstemp(prefix=".", suffix=".new", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(partial, mode)
        if replaces:
            os.replace(partial, path)
            return True
        return _put_first(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _put_first(partial: Path, path: Path) -> bool:
    """Gives the file its name unless there is one of that name, in one step."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links. Where rename replaces, two writers at the same moment
        # may both believe that they were first.
        if path.exists():
            return False
        os.replace(partial, path)
    return True
