# SPDX-License-Identifier: Apache-2.0
"""store.py - machine code in a folder: private, written whole or not at all, verified when read.

A file is a cubin with a SHA-256 behind it, of its name and contents; tools that read ELF files do
not mind. Any number of processes may read and write one folder: there is no lock, because two that
make the same file make the same contents, and a rename is atomic.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from wan_attn.store import folder as files
from wan_attn.store.folder import StoreError, is_there, make_private, problem
from wan_attn.transient import is_transient

__all__ = [
    "StoreError",
    "contents",
    "is_there",
    "make_private",
    "names",
    "problem",
    "read",
    "remove",
    "replace",
    "write",
]

SUFFIX = ".cubin"
# No cubin is larger by far: what is, is none, and must not be read into memory.
_BYTES_MAX = 1 << 26
_DIGEST = hashlib.sha256().digest_size


def _digest(name: str, data: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + data).digest()


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
    """The bytes of a regular file of a cubin's size; never waits, as opening a FIFO would.

    Raises:
        StoreError: it is no regular file, or a huge one.
        OSError: it cannot be read.
    """
    return files.contents(path, _BYTES_MAX)


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
    files.write(path, data, mode)


def names(folder: Path) -> dict[str, int]:
    """Returns {name: size in bytes} of every file; none where the folder cannot be looked at."""
    try:
        found = sorted(folder.glob(f"[!.]*{SUFFIX}")) if folder.is_dir() else []
        return {file.stem: file.stat().st_size for file in found}
    except OSError as error:
        if is_transient(error):
            raise
        return {}


def remove(folder: Path, name: str) -> None:
    """Removes the file, if it exists."""
    (folder / f"{name}{SUFFIX}").unlink(missing_ok=True)
