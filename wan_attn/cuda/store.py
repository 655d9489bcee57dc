# SPDX-License-Identifier: Apache-2.0
"""store.py - machine code in a folder: private, written whole or not at all, verified when read.

A file is a cubin with a SHA-256 behind it, of its name and contents; tools that read ELF files do
not mind. Any number of processes may read and write one folder: there is no lock, because two that
make the same file make the same contents, and a rename is atomic.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from wan_attn.transient import is_transient

SUFFIX = ".cubin"
# No cubin is larger by far: what is, is none, and must not be read into memory.
_BYTES_MAX = 1 << 26
_DIGEST = hashlib.sha256().digest_size


class StoreError(OSError):
    """The folder cannot be used, or the file must not be trusted; says why."""


def _digest(name: str, data: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + data).digest()


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
        StoreError: another user may write to the folder, and its contents will run.
        OSError: it cannot be created.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if why := problem(folder):
        raise StoreError(why)


def read(folder: Path, name: str) -> bytes | None:
    """Returns the cubin of this name; None if there is none.

    Raises:
        StoreError: the file is truncated, changed, of another name, or no file of a cubin's size.
        OSError: it cannot be read.
    """
    path = folder / f"{name}{SUFFIX}"
    try:
        text = contents(path)
    except FileNotFoundError:
        return None
    data, digest = text[:-_DIGEST], text[-_DIGEST:]
    if not data or digest != _digest(name, data):
        raise StoreError(f"{path} is damaged (its checksum does not fit)")
    return data


def contents(path: Path) -> bytes:
    """The bytes of a regular file; never waits, as opening a FIFO would.

    Raises:
        StoreError: it is no regular file, or a huge one.
        OSError: it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode) or state.st_size > _BYTES_MAX:
            raise StoreError(f"{path} is no file of at most {_BYTES_MAX >> 20} MiB")
    except BaseException:
        os.close(handle)
        raise
    with os.fdopen(handle, "rb") as file:
        return file.read(_BYTES_MAX)


def write(folder: Path, name: str, data: bytes, mode: int = 0o600) -> None:
    """Writes the cubin, whole or not at all.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    try:
        replace(folder / f"{name}{SUFFIX}", data + _digest(name, data), mode)
    except PermissionError:
        # Windows does not replace a file that is being read. Then its contents are the same.
        if read(folder, name) != data:
            raise


def replace(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Puts a file of these contents where there was another or none, whole or not at all.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    handle, partial = tempfile.mkstemp(prefix=".", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(partial, mode)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def names(folder: Path) -> dict[str, int]:
    """Returns {name: size in bytes} of every file; none where the folder cannot be looked at."""
    try:
        files = sorted(folder.glob(f"[!.]*{SUFFIX}")) if folder.is_dir() else []
        return {file.stem: file.stat().st_size for file in files}
    except OSError as error:
        if is_transient(error):
            raise
        return {}


def remove(folder: Path, name: str) -> None:
    """Removes the file, if it exists."""
    (folder / f"{name}{SUFFIX}").unlink(missing_ok=True)
